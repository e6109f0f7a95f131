"""The pages of this project as a web site of plain HTML.

    python .github/pages.py FOLDER    # then open FOLDER/index.html

Published is README.md, as the front page, and all else in START; then whatever a published page links to, and so on:
Markdown, notebooks, source and folders as pages of their own, other files as they are. So the site is whole without a
network and without a name of the repository, and a link to nothing ends with an error.
"""

import html
import json
import os
import pathlib
import re
import shutil
import sys

from markdown_it import MarkdownIt

ROOT = pathlib.Path(__file__).resolve().parent.parent
START = ("README.md", "LOG.md", "CONTRIBUTING.md", "docs/*.md", "exercises/*.md", "results/run/*.md")
SOURCE = (".py", ".sh", ".yaml", ".yml")
NAV = {
    "nanoBTX": "README.md",
    "lecture": "docs/lecture.md",
    "results": "docs/results.md",
    "exercises": "exercises/README.md",
    "one run": "results/run/report.md",
}
TOKENS = "results/run/tokens-*.html"  # in the navigation, too
STYLE = pathlib.Path(__file__).with_suffix(".css")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
{style}
{nav}
<main class="page">
{body}</main>
</html>
"""


def file_of(path):
    """A path of the project, relative to its root -> where it is in the site: README.md -> index.html, model.py ->
    model.py.html."""
    if (ROOT / path).is_dir():
        return path / "index.html"
    if path.name == "README.md":
        return path.with_name("index.html")
    if path.suffix in (".md", ".ipynb"):
        return path.with_suffix(".html")
    return path.with_name(f"{path.name}.html") if path.suffix in SOURCE else path


def link(source, path):
    """The address of one path's file in the site, seen from another's."""
    return pathlib.PurePath(os.path.relpath(file_of(path), file_of(source).parent)).as_posix()


def fenced(text, language=""):
    return f"````{language}\n{text.rstrip()}\n````\n"


def markdown_of(path):
    """What a path's page says, in Markdown; None for a file that is published as it is."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(one.name + "/" * one.is_dir() for one in file.iterdir() if one.name[0] not in "._")
        return f"# {path.as_posix()}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    if path.suffix == ".md":
        return file.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
        return "\n\n".join(fenced(text, "python") if is_code else text for text, is_code in texts)
    if path.suffix in SOURCE:
        return f"# {path.as_posix()}\n\n" + fenced(file.read_text(encoding="utf-8"))
    return None


def anchor(words, times):
    """GitHub's name for a heading: in lower case, without punctuation, each space a dash; a repeated one gets -1, -2
    and so on. times: {name: how often it was there}, brought up to date."""
    name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
    times[name] = times.get(name, -1) + 1
    return f"{name}-{times[name]}" if times[name] else name


def render(path, text):
    """(title, HTML, the paths it links to) of a page. Raises SystemExit for a link that leads nowhere."""
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(text)
    titles, linked, times = [], [], {}
    for token, heading in zip(tokens[1:], tokens, strict=False):
        if heading.type == "heading_open":
            titles.append("".join(child.content for child in token.children))
            heading.attrSet("id", anchor(titles[-1], times))
    for token in (child for parent in tokens for child in parent.children or ()):
        key = {"link_open": "href", "image": "src"}.get(token.type)
        name, hash_mark, fragment = token.attrGet(key).partition("#") if key else ("", "", "")
        if not name or ":" in name:
            continue
        target = pathlib.Path(os.path.normpath(path / name if (ROOT / path).is_dir() else path.parent / name))
        if not (ROOT / target).exists():
            raise SystemExit(f"error: {path} links to {name}, which is not there; mend the link")
        linked.append(target)
        token.attrSet(key, link(path, target) + hash_mark + fragment)
    body = markdown.renderer.render(tokens, markdown.options, {})
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
    # a picture that is small on a phone opens by itself
    body = re.sub(r'<img src="([^"]+)"[^>]*>', r'<a class="picture" href="\1">\g<0></a>', body)
    return titles[0] if titles else path.name, body, linked


def navigation(path, tokens):
    """The links at the top of a page. tokens: the paths of TOKENS."""

    def one(words, page):
        here = ' aria-current="page"' * (page == path)
        return f'<a href="{link(path, page)}"{here}>{words}</a>'

    links = [one(words, pathlib.Path(page)) for words, page in NAV.items()]
    links.append("tokens: " + " ".join(one(page.stem.removeprefix("tokens-"), page) for page in tokens))
    return f'<nav class="site">{"".join(f"<span>{text}</span>" for text in links)}</nav>'


def build(folder):
    todo = [path.relative_to(ROOT) for kind in (*START, TOKENS) for path in sorted(ROOT.glob(kind))]
    tokens = [path for path in todo if path.suffix == ".html"]
    done = set()
    while todo:
        path = todo.pop()
        if (ROOT / path / "README.md").exists():
            path = path / "README.md"
        if path in done:
            continue
        done.add(path)
        file = folder / file_of(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = markdown_of(path)
        style = f'<link rel="stylesheet" href="{os.path.relpath(STYLE.name, file_of(path).parent)}">'
        nav = navigation(path, tokens)
        if text is not None:
            title, body, linked = render(path, text)
            file.write_text(PAGE.format(title=html.escape(title), style=style, nav=nav, body=body), encoding="utf-8")
            todo += linked
        elif path in tokens:  # it has a style of its own, which wins
            page = (ROOT / path).read_text(encoding="utf-8")
            page = page.replace("<style>", f"{style}\n<style>", 1).replace("<body>", f"<body>\n{nav}", 1)
            file.write_text(page, encoding="utf-8")
        else:
            shutil.copyfile(ROOT / path, file)
    shutil.copyfile(STYLE, folder / STYLE.name)
    print(f"{folder / 'index.html'} is the first of {len(done)} pages and pictures")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("error: name the folder that the site goes into: python .github/pages.py FOLDER")
    try:
        build(pathlib.Path(sys.argv[1]))
    except OSError as error:
        raise SystemExit(f"error: {error.filename}: {error.strerror}; name a new folder for the site") from None
