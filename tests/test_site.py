"""The web site that .github/pages.py makes: every page is there, and whatever a page names is there, too."""

import glob
import html.parser
import os
import pathlib
import re
import runpy
import subprocess
import sys
import urllib.parse

import pytest
from helpers import ROOT, prose, read

SCRIPT = os.path.join(ROOT, ".github", "pages.py")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(html.parser.HTMLParser):
    """What a browser would ask for: ids, links, what is loaded, and the words; and which tags a table stands in."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.words, self.open, self.tables = [], [], [], [], [], []
        with open(path, encoding="utf-8") as file:
            self.feed(file.read())
        assert not [tag for tag in self.open if tag in ("main", "a", "div", "table", "pre", "nav")], path  # all closed

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "a":
            assert "a" not in self.open
            self.links.append((attributes["href"], "nav" in self.open))
        elif "src" in attributes or tag == "link":
            self.loaded.append(attributes.get("src") or attributes["href"])
        if tag == "table":
            self.tables.append(self.open[-1])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, SCRIPT, folder], check=True)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """{path in the site: Page}"""
    return {path: Page(site / path) for path in glob.glob("**/*.html", root_dir=site, recursive=True)}


def split(address, page):
    """(the file in the site, the id in it) that an address on a page means."""
    name, _, anchor = address.partition("#")
    name = os.path.normpath(os.path.join(os.path.dirname(page), urllib.parse.unquote(name))) if name else page
    return name, anchor


def test_all_that_pages_name_is_there(site, pages):
    assert len(pages) > 50
    for path, page in pages.items():
        assert len(set(page.ids)) == len(page.ids), path
        for address in [*page.loaded, *(link for link, _ in page.links)]:
            if re.match(r"https?:", address):
                assert address not in page.loaded, f"{path} loads {address}"
                continue
            name, anchor = split(address, path)
            assert os.path.isfile(site / name), f"{path} names {address}"
            assert not name.startswith("..") and not name.endswith((".md", ".py", ".sh")), f"{path} names {address}"
            assert not anchor or anchor in pages[name].ids, f"{path} names {address}"


SOURCES = sorted(["README.md", "LOG.md", "CONTRIBUTING.md", *glob.glob("docs/*.md", root_dir=ROOT)])
SOURCES += ["exercises/README.md", "exercises/predictions.md", "exercises/AGENTS.md", "results/run/report.md"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_page_has_the_links_headings_and_tables_of_its_markdown(pages, source):
    path = source.replace("README.md", "index.html").replace(".md", ".html")
    page, prose_of_it = pages[path], prose(read(os.path.join(ROOT, source)).decode())
    text = re.sub(r"`[^`]*`", "", prose_of_it)  # where brackets are code, too
    ours = [link for link, in_nav in page.links if not in_nav]
    assert len(ours) == text.count("](")
    for said, made in zip(re.findall(r"\]\(([^)\s]+)", text), ours, strict=True):
        if said.startswith("https://"):
            assert made == said
            continue
        (name, anchor), (wanted, same) = split(made, path), split(said, source)
        assert anchor == same and os.path.dirname(name) in (os.path.dirname(wanted), wanted)
        stem = os.path.basename(wanted).split(".")[0]
        assert os.path.basename(name).split(".")[0] in (stem, "index")
    shown = "".join(page.words)
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        assert all(word in shown for word in re.findall(r"\w+", heading))
    rules = re.findall(r"^ *\|[ :|-]*--[ :|-]*\|$", prose_of_it, re.M)
    assert page.tables == ["div"] * len(rules)  # a box of its own, in which it scrolls


def test_every_page_leads_to_the_first_and_to_the_tokens(site, pages):
    tokens = {path for path in pages if path.startswith("results/run/tokens-")}
    assert len(tokens) == 3
    for path, page in pages.items():
        leads = {split(link, path)[0] for link, in_nav in page.links if in_nav}
        assert {"index.html", "docs/lecture.html", "docs/results.html", "exercises/index.html", *tokens} <= leads
        assert "pages.css" in {split(address, path)[0] for address in page.loaded}


def test_a_source_page_is_its_source(pages):
    with open(os.path.join(ROOT, "model.py"), encoding="utf-8") as file:
        assert file.read().rstrip() in "".join(pages["model.py.html"].words)


def test_headings_have_githubs_anchors():
    render = runpy.run_path(SCRIPT)["render"]
    page = "# A `b_c`: d, e?\n## [Same](model.py)\n```sh\n# no heading\n```\n## Same\n### One - two\n## Same\n"
    title, body, linked = render(pathlib.Path("README.md"), page)
    assert title == "A b_c: d, e?" and linked == [pathlib.Path("model.py")]
    assert re.findall(r'<h. id="(.*?)"', body) == ["a-b_c-d-e", "same", "same-1", "one---two", "same-2"]


def test_a_link_that_leads_nowhere_is_an_error():
    render = runpy.run_path(SCRIPT)["render"]
    with pytest.raises(SystemExit, match=r"docs/a.md links to gone.md"):
        render(pathlib.Path("docs/a.md"), "[gone](gone.md)")


def test_a_file_in_the_folders_place_is_an_error_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "file"], capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"error: .*file.*; name a new folder for the site\n", done.stderr)
