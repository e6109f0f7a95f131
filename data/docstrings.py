"""From a docstring to English: drop code, tables and markup, keep paragraphs of sentences."""

import inspect
import re

SKIPPED_SECTIONS = {"see also", "references", "example", "examples", "methods", "usage", "doctest", "signature", "code"}
KEPT_DIRECTIVE = re.compile(r"\.\. (note|warning|tip|important|seealso|caution|attention)::")
UNDERLINE = re.compile(r"""([-=~^*#"'`+])\1{2,}\s*$""")
# "name:" or ":param name:" or "name (type):", which a description of that name follows
TERM = re.compile(r"(:[a-z]+( [^:`]*)?:|[*`]*[\w.]+[*`]*( ?\([^()]*\))?:)\s+")
NAME_AND_TYPE = re.compile(r"[*`\w., ]+ : ")  # numpy's way; the description is on the lines below
LIST_ITEM = re.compile(r"([-*•]|\(?[0-9a-z][.)])\s+")
ODD_CHARACTER = re.compile(r"[^A-Za-z ,.']")
WORD = re.compile(r"[A-Za-z][a-z]*(?:'[a-z]+)?")
BLOCK_STARTS = (LIST_ITEM, TERM, NAME_AND_TYPE)
COMMON = """the a an of to in is are be it if for and or that this with as by on not from which can when will was has
have at you all any its one used no but may each must should than only other into does do these then also so there"""
COMMON = set(COMMON.split())
MARKUP = [
    (re.compile(r":[a-zA-Z:+-]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :func:`name`, :ref:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+"), r"\1"),  # `text <address>`_
    (re.compile(r"\s?\[[^\]\s]+\]_"), ""),  # [1]_
    (re.compile(r"``([^`]*)``|`([^`]*)`_{0,2}"), lambda match: match[1] or match[2] or ""),
    (re.compile(r"(?<!\w)\*{1,2}([^\s*][^*]*)\*{1,2}(?!\w)"), r"\1"),
    (re.compile(r"\s+"), " "),
]


def _blocks(text):
    """Runs of lines without a blank one: [(indent, lines)]. A list item, a term and, below "name : type",
    the deeper indented description are blocks of their own."""
    block = []
    indent = 0
    last_indent = 0
    for line in [*inspect.cleandoc(text).split("\n"), ""]:
        stripped = line.strip()
        line_indent = len(line) - len(line.lstrip())
        described = line_indent > last_indent and len(block) == 1 and NAME_AND_TYPE.match(block[0])
        if block and (not stripped or described or any(start.match(stripped) for start in BLOCK_STARTS)):
            yield indent, block
            block = []
        if stripped:
            if not block:
                indent = line_indent
            block.append(stripped)
            last_indent = line_indent


def _is_english(paragraph):
    """True for a sentence or more: plain words, a fair share of them common, and an end."""
    words = WORD.findall(paragraph)
    common = sum(word.lower() in COMMON for word in words)
    return (
        len(words) >= 6
        and common >= 0.2 * len(words)
        and len(ODD_CHARACTER.findall(paragraph)) <= 0.1 * len(paragraph)
        and paragraph[-1] in ".!?)"
        and not re.search(r"\\|https?:|[{}<>$^|@=~]|__|\w\(|\.\.\.| : ", paragraph)
    )


def english_paragraphs(text):
    """Yield the English paragraphs of a docstring, each on one line and without markup."""
    skip_deeper_than = None  # inside a code block or a skipped section: what is indented more is dropped
    in_skipped_section = False  # under an underlined heading: everything is dropped up to the next one
    for indent, lines in _blocks(text):
        if skip_deeper_than is not None and indent > skip_deeper_than:
            continue
        skip_deeper_than = None
        if len(lines) > 1 and UNDERLINE.match(lines[1]):
            in_skipped_section = lines[0].lower().rstrip(":") in SKIPPED_SECTIONS
            lines = lines[2:]
        elif UNDERLINE.match(lines[0]):
            lines = lines[1:]
        if KEPT_DIRECTIVE.match(lines[0] if lines else ""):
            lines = [re.sub(KEPT_DIRECTIVE, "", lines[0]).strip(), *lines[1:]]
        if in_skipped_section or not lines:
            continue
        heading = lines[0].rstrip(":").lower()
        if lines[0].startswith("..") or (lines[0].endswith(":") and heading in SKIPPED_SECTIONS):
            skip_deeper_than = indent
            continue
        if lines[-1].endswith("::"):
            skip_deeper_than = indent
        if any(line.startswith((">>>", "@", "|", "+-", "In [", "$ ")) for line in lines):
            continue
        paragraph = TERM.sub("", " ".join(lines), count=1) if TERM.match(lines[0]) else " ".join(lines)
        for pattern, replacement in MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        paragraph = paragraph.strip()
        if paragraph and _is_english(paragraph):
            yield paragraph
