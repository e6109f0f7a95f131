"""Data preparation: the tokenizer against a recount from scratch, the splits, the math, and every error line."""

import ast
import itertools
import json
import os
import random
import re
import string
import subprocess
import sys
import time
import types
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
from helpers import ROOT

from common.corpus import HELD_OUT, SPLITS, split_of
from common.errors import UserError
from common.tokenizer import END_OF_TEXT, load_tokenizer, token_bytes, tokenizer_hash
from data import python_text
from data.bpe import PATTERN, count_words, train_bpe
from data.math_problems import TEMPLATES, make_problem, math_documents, math_task
from data.own_text import own_documents
from data.prepare import DataConfig, Domain, main, token_dtype, write_domain

with open(os.path.join(ROOT, "common", "config.py")) as source_file:
    SOURCE = source_file.read()  # some text to train tokenizers on
DOMAINS = ("code", "math", "wiki")


def prepare(*arguments, hash_seed="0", environment=None):
    """Run data.prepare as a user would; returns the finished process."""
    command = [sys.executable, "-m", "data.prepare", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, **(environment or {})}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder with the built-in domains at smoke size."""
    folder = str(tmp_path_factory.mktemp("data") / "smoke")
    done = prepare("config/smoke/data.py", f"--out_dir={folder}", f"--domains={','.join(DOMAINS)}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def poems(tmp_path):
    """A small domain of one's own."""
    folder = tmp_path / "poems"
    folder.mkdir()
    (folder / "long.txt").write_text("\n\n".join(f"Verse {n}: the rain, the river and the sea." for n in range(400)))
    lines = [json.dumps({"text": f"Line {n} sings of the sea."}) for n in range(30)]
    (folder / "more.jsonl").write_text("\n".join(lines))
    return str(folder)


def read_split(folder, domain, split):
    """The documents of one split, decoded, and its meta.json."""
    with open(os.path.join(folder, domain, "meta.json")) as file:
        meta = json.load(file)
    tokens = np.fromfile(os.path.join(folder, domain, f"{split}.bin"), dtype=meta["dtype"])
    documents = load_tokenizer(folder).decode(tokens.tolist()).split(END_OF_TEXT)
    assert documents.pop() == ""  # every document ends with the special token
    return documents, tokens, meta


def recounted_bpe(text, vocab_size):
    """BPE by counting all pairs again for each merge: slow and plain. Returns the tokens in order."""
    words = Counter(tuple(bytes([b]) for b in word.encode()) for word in regex.findall(PATTERN, text))
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for word, count in words.items():
            for i in range(len(word) - 1):
                pairs[word[i] + word[i + 1]] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(best)
        merged = Counter()
        for word, count in words.items():
            new = []
            for symbol in word:
                if new and new[-1] is not None and new[-1] + symbol == best:
                    new[-1:] = [best, None]  # None: a merged token takes no part in a second merge
                else:
                    new = [s for s in new if s is not None] + [symbol]
            merged[tuple(s for s in new if s is not None)] += count
        words = merged
    return tokens


def test_bpe_equals_a_recount():
    text = SOURCE[:5000] + "aaaa aaaaa äöü 12 345 banana bananas\n" * 20
    ranks = train_bpe([text[:2000], text[2000:]], 400)
    assert sorted(ranks.values()) == list(range(399))
    whole = train_bpe([text], 400)
    assert list(whole) == recounted_bpe(text, 400)


def test_text_without_spaces_takes_no_longer():
    """Lines of 50,000 letters, characters, marks and spaces among ordinary text, and alone; processor time."""

    def seconds(texts):
        start = time.process_time()
        assert len(train_bpe(texts, 400)) == 399
        return time.process_time() - start

    draw = random.Random(1)
    han = "".join(map(chr, range(0x4E00, 0x5E00)))
    kinds = string.ascii_letters, han, "+-<>[].,", " \t\n"
    lines = ["".join(draw.choices(kind, k=50_000)) for kind in kinds]
    ordinary = [read() for _, read in itertools.islice(python_text.code_documents(0), 60)]
    ordinary = [text for text in ordinary if text]
    assert seconds(ordinary + lines) < 2 * seconds(ordinary) + 2
    assert seconds(lines) < 5


def test_what_is_cut_for_counting_is_what_is_not_ordinary():
    """Words of up to 64 letters and runs of up to 256 marks or spaces count whole; longer ones in these pieces."""
    for run, longest in (("x", 64), ("-", 256), (" ", 256)):
        for count in (1, longest - 1, longest):
            text = run * count + "\n"
            assert list(count_words([text])) == regex.findall(PATTERN, text)
        assert set(count_words([run * 5 * longest])) == {run * longest}
    words = ["".join(random.Random(n).choices(string.ascii_letters, k=64)) for n in range(2000)]
    assert list(count_words(["0".join(words)])) == [words[0], "0", *words[1:1024]]  # of 64 KiB


def test_bpe_pieces_are_what_tiktoken_makes():
    """Merging in the order learned, word by word, gives what tiktoken's encoder gives."""
    text = SOURCE
    ranks = train_bpe([text], 500)
    encoding = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 499})
    merges = list(ranks)[256:]
    for word in set(regex.findall(PATTERN, text)):
        symbols = [bytes([b]) for b in word.encode()]
        for merge in merges:
            position = 0
            while position < len(symbols) - 1:
                if symbols[position] + symbols[position + 1] == merge:
                    symbols[position : position + 2] = [merge]
                position += 1
        assert [encoding.decode_single_token_bytes(t) for t in encoding.encode(word)] == symbols


def test_round_trip_and_digits(smoke):
    encoding = load_tokenizer(smoke)
    text = "def f(x):\n\n        return x_1 + 2048\r\n\t  naïve ½ ٣ 漢字 🙂 \x1c\x85  <|endoftext|> \n"
    tokens = encoding.encode_ordinary(text)
    assert encoding.decode(tokens) == text
    assert encoding.eot_token == encoding.n_vocab - 1 == 511 and 511 not in tokens
    assert [encoding.decode([t]) for t in encoding.encode_ordinary(" 2048")] == [" ", "2", "0", "4", "8"]
    assert token_bytes(encoding)[tokens].sum() == len(text.encode())
    assert token_bytes(encoding)[encoding.eot_token] == 0


def test_files_agree_with_meta(smoke):
    for domain in DOMAINS:
        for split in SPLITS:
            documents, tokens, meta = read_split(smoke, domain, split)
            assert meta[split]["documents"] == len(documents)
            assert meta[split]["tokens"] == len(tokens)
            assert meta[split]["bytes"] == sum(len(text.encode()) for text in documents)
            assert meta[split]["bytes"] == token_bytes(load_tokenizer(smoke))[tokens].sum()
            assert meta["tokenizer_hash"] == tokenizer_hash(smoke)
        assert 0.9 < meta["train"]["bytes"] / 270_000 < 1.2
        assert all(15_000 <= meta[split]["bytes"] < 100_000 for split in HELD_OUT)


def test_splits_share_no_document(smoke):
    for domain in DOMAINS:
        documents = [text for split in SPLITS for text in read_split(smoke, domain, split)[0]]
        assert len(set(documents)) == len(documents)


def test_splits_are_of_the_size_they_should_be():
    counts = Counter(split_of(str(number)) for number in range(20_000))
    assert set(counts) == set(SPLITS)
    assert all(abs(counts[split] / 20_000 - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5 for split in HELD_OUT)


def test_code_parses_and_has_no_docstrings(smoke):
    for text in (text for split in SPLITS for text in read_split(smoke, "code", split)[0]):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                first = node.body[0]  # what remains shares its line with other code
                assert text.split("\n")[first.lineno - 1].strip().startswith(("def", "class"))


def test_docstrings_are_cut_exactly():
    source = (
        '"""Module."""\nclass A:\n    "One."\n\ndef f(x):\n    """Two\n    lines."""  # noqa\n    return """kept"""\n'
    )
    source += 'def g(): "same line"; return 1\n'
    cut = python_text.without_docstrings(source)
    assert cut == 'class A:\n    pass\n\ndef f(x):\n    return """kept"""\ndef g(): "same line"; return 1\n'


PROSE = "The {} of this file says in plain words what it is for and when to call it."
SHARED = PROSE.format("group that all docstrings have in common")
MADE_FILE = '''"""Too short.

{module}

>>> This paragraph of the {name} file is code and no sentence that anybody would read.

{shared}
"""

NOTE = """The value of a variable in the {name} file is a sentence like those of a docstring."""


class Thing:
    """The first line
    of this {name} paragraph goes on in the second, and so it is one paragraph.

    Args: The part of the {name} docstring that says what its arguments are is no prose.

    this paragraph of the {name} file has no capital where it starts and is left out.
    """

    async def {name}(self):
        # The comment of a function in the {name} file is a sentence like those of a docstring.
        """{function}

        The table of the {name} file holds 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 numbers.

        The last paragraph of the {name} docstring is cut off before its end and has no full stop
        """

        def inner():
            """{inner}

            {module}
            """
            return "The string that a function of the {name} file returns is a sentence, too."

        return inner() + Thing.{name}
'''


@pytest.fixture
def made_files(tmp_path, monkeypatch):
    """100 Python files instead of the installed ones: {word that only this file has: the prose of its docstrings}."""
    prose = {}
    files = {"made/old.py": f'"""{SHARED * 4}"""\nprint "no current Python"\n'.encode()}
    files["made/latin.py"] = f'"""{SHARED * 4} café"""\n'.encode("latin-1")
    files["made/little.py"] = b'"""The prose of this file is plain English, but it is too little for a document."""\n'
    for first, last in itertools.product("abcdefghij", "klmnopqrst"):
        name = f"q{first}{last}"
        own = {part: PROSE.format(f"{name} {part}") for part in ("module", "function", "inner")}
        files[f"made/{name}.py"] = MADE_FILE.format(name=name, shared=SHARED, **own).encode()
        whole = f"The first line of this {name} paragraph goes on in the second, and so it is one paragraph."
        prose[name] = {*own.values(), whole, SHARED}
    for key, content in files.items():
        (tmp_path / os.path.basename(key)).write_bytes(content)
    paths = {key: str(tmp_path / os.path.basename(key)) for key in files}
    monkeypatch.setattr(python_text, "list_python_files", lambda: paths)
    return prose


def test_english_is_the_prose_of_docstrings_and_nothing_else(made_files):
    """Each paragraph once, even one that all files have; no code, comment or other string, no list of arguments."""
    texts = [text for _, read in python_text.english_documents(0) if (text := read())]
    assert len(texts) == len(made_files) == 100
    for number, text in enumerate(texts):
        paragraphs = text.removesuffix("\n").split("\n\n")
        (name,) = [name for name in made_files if name in text]
        assert Counter(paragraphs) == Counter(made_files.pop(name) - ({SHARED} if number else set()))


def test_prose_is_in_the_split_of_its_code(made_files):
    """Held-out prose must not tell of code that was trained on, nor the other way round; whatever the seeds."""
    splits = {name: [] for name in made_files}
    for make, seed in ((python_text.english_documents, 0), (python_text.code_documents, 5)):
        for split, read in make(seed):
            for name in re.findall(r"\bq[a-j][k-t]\b", read() or "")[:1]:
                splits[name].append(split)
    assert all(len(found) == 2 and len(set(found)) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == set(SPLITS)


def test_installed_prose_is_in_its_source_and_not_in_its_code(monkeypatch):
    """Word for word, of a few files that every Python has."""
    files = python_text.list_python_files()
    count = 0
    for name in ("argparse", "calendar", "fractions", "statistics", "textwrap"):
        path = files[f"python/{name}.py"]
        monkeypatch.setattr(python_text, "list_python_files", lambda path=path: {"one": path})
        ((_, english),) = python_text.english_documents(0)
        ((_, code),) = python_text.code_documents(0)
        with open(path) as file:
            source, code, prose = (text.replace("\\", "") for text in (file.read(), code(), english()))  # no escapes
        for paragraph in prose.strip().split("\n\n"):
            assert paragraph in " ".join(source.split()) and paragraph not in " ".join(code.split())
            count += 1
    assert count > 30


def test_cpp_is_taken_below_the_licence_as_it_is(tmp_path, monkeypatch):
    """The comment at the top is cut, and files that a program wrote or that are there already are left out."""
    line = "  // Twice {0}.\n\n\n\ttotal_{0} += 2 * term_{0};  /* more */\n"
    bodies = [f"#pragma once\n\n// Adds.\n{line.format(letter) * 5}/* end */" for letter in "abcdef"]
    files = {
        "ATen/a.h": "/* Copyright.\n * All rights reserved. */\n" + bodies[0],
        "c10/core/b.h": "// Copyright.\n//\n// All rights reserved.\n\n/* See LICENSE. */\n\n" + bodies[1],
        "c10/c.h": bodies[2],
        "d.h": bodies[3] + "\n" * 1500 + "// What was generated by this is late in the file.\n",
    }
    expected = Counter([*bodies[:3], files["d.h"]])
    files |= {
        "ATen/ops/add.h": bodies[4],
        "ATen/ops/deep/add.h": bodies[5],
        "ATen/Functions.h": "// @generated from Functions.h\n" + bodies[4],
        "c10/again.h": "// Another licence.\n" + bodies[2],
        "c10/little.h": "// A licence alone. " + 300 * "x" + "\n#pragma once\n",
        "c10/table.h": "int table[] = {\n" + 40 * "  17, 4,\n" + "};\n",
        "c10/test_e.h": bodies[4],
        "c10/test/e.h": bodies[4],
        "c10/e.cpp": bodies[4],
    }
    for name, text in files.items():
        path = tmp_path / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "outside.h").write_text(bodies[4])
    monkeypatch.setattr(python_text, "folder_of", lambda package: str(tmp_path))
    found = [text for _, read in python_text.cpp_documents(0) if (text := read())]
    assert Counter(found) == expected


def check_arithmetic(text):
    """Evaluate each equation of a solution; the last result must be the final answer."""
    question, rest = text.split("\nAnswer: ")
    solution, answer = rest.split("\n#### ")
    assert question.startswith("Question: ") and answer.endswith("\n") and "{" not in text and "[" not in text
    equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", solution)
    assert len(equations) == solution.count("=") > 0
    told = set(re.findall(r"\d+", question)) | {"2", "4"}  # twice, half, legs
    for left, operator, right, result in equations:
        assert eval(f"{left} {operator} {right}") == int(result)
        assert left in told and right in told, text  # nothing is used that is not told or computed
        told.add(result)
    assert result == answer.strip()


def test_math_is_right():
    rng = random.Random(7)
    assert len(TEMPLATES) >= 30
    assert {len(template.steps) for template in TEMPLATES} == {1, 2, 3, 4, 5}
    for template in TEMPLATES:
        assert len(template.questions) >= 2
        for _ in range(60):
            problem = make_problem(template, rng)
            check_arithmetic(problem.text)
            numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
            assert max(numbers) <= 200 and 2 <= problem.answer <= 999


def test_math_splits_and_task(smoke):
    texts = {split: read_split(smoke, "math", split)[0] for split in SPLITS}
    questions = {split: {text.split("\nAnswer:")[0] for text in texts[split]} for split in SPLITS}
    assert len(set.union(*questions.values())) == sum(map(len, questions.values()))
    for split, other in (("val", "test"), ("test", "val")):
        assert 0.03 < len(texts[split]) / sum(map(len, texts.values())) < 0.07
        with open(os.path.join(smoke, "math", f"task-{split}.jsonl")) as file:
            task = [json.loads(line) for line in file]
        assert len(task) == len({row["prompt"] for row in task}) == 500
        asked = {row["prompt"].split("\nAnswer:")[0] for row in task}
        assert not asked & (questions["train"] | questions[other])
        counts = Counter(row["template"] for row in task)
        assert set(counts) == {template.name for template in TEMPLATES}
        assert max(counts.values()) - min(counts.values()) <= 1
        # A solution is not needed to check an answer, but a prompt must end where a training text goes on.
        assert all(row["prompt"].endswith("\nAnswer:") and row["answer"].isdigit() for row in task)


class Problems:
    """math_templates.txt read anew, its questions as patterns: of which template a problem is, with which numbers."""

    def __init__(self):
        with open(os.path.join(ROOT, "data", "math_templates.txt")) as file:
            blocks = re.split(r"\n\[(\w+)\]\n", file.read())[1:]
        self.patterns = []
        for template, body in zip(blocks[::2], blocks[1::2], strict=True):
            self.patterns += [(template, self.pattern(line)) for line in re.findall("^Q (.*)", body, re.MULTILINE)]

    def pattern(self, question):
        """Its numbers, whose names are letters, in groups of these names; its words may be any."""
        words = re.sub(r"\\{\w\w+\\}", r"\\w+", re.escape(question))
        return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", words))

    def read(self, text):
        """(its template, its numbers by their names, its equations, whichever way round sums and products are) of a
        document."""
        question, solution = text.removeprefix("Question: ").split("\nAnswer: ")
        found = [(template, pattern.fullmatch(question)) for template, pattern in self.patterns]
        ((template, match),) = [(template, match) for template, match in found if match]
        equations = re.findall(r"(\d+) ([^\s\w]) (\d+) = (\d+)", solution)
        assert len(equations) == solution.count("=") > 0
        turned = [(frozenset((a, b)) if sign in "+*" else (a, b), sign, c) for a, sign, b, c in equations]
        return template, tuple(sorted(match.groupdict().items())), tuple(turned)


@pytest.fixture(scope="module", params=["two seeds", "prepared"])
def problems(request, smoke):
    """Documents and rows by split, from the generator (a split has to hold across seeds) or from prepared files."""
    documents = {split: [] for split in SPLITS}
    rows = {split: [] for split in HELD_OUT}
    if request.param == "two seeds":
        for seed in (0, 7):
            for split, read in itertools.islice(math_documents(seed), 3000):
                documents[split].append(read())
            for split in HELD_OUT:
                rows[split] += math_task({"train": ["#### 1"]}, split, seed, count=200).rows
    else:
        documents = {split: read_split(smoke, "math", split)[0] for split in SPLITS}
        for split in HELD_OUT:
            with open(os.path.join(smoke, "math", f"task-{split}.jsonl")) as file:
                rows[split] = [json.loads(line) for line in file]
    return documents, {split: [row["prompt"] + row["choices"][0] for row in rows[split]] for split in HELD_OUT}


def test_no_calculation_is_in_two_splits(problems):
    """Neither a problem's whole list of equations nor a template with the same numbers, in whatever words."""
    documents, rows = problems
    reader = Problems()
    found = {split: [reader.read(text) for text in [*documents[split], *rows.get(split, [])]] for split in SPLITS}
    for split, other in itertools.combinations(SPLITS, 2):
        for kept in (slice(2), slice(2, 3)):  # the template with its numbers, the equations
            assert not {one[kept] for one in found[split]} & {one[kept] for one in found[other]}
    assert all(len({equations for _, _, equations in found[split]}) > 300 for split in SPLITS)


def test_all_templates_are_in_all_splits(problems):
    """Of the documents as well as of the task."""
    documents, rows = problems
    reader = Problems()
    templates = {template for template, _ in reader.patterns}
    assert len(templates) == 42
    for split in SPLITS:
        for texts in (documents[split], rows.get(split, documents[split])):
            few = texts is documents[split] and split in HELD_OUT  # a few hundred may lack one of 42 by chance
            assert few or {reader.read(text)[0] for text in texts} == templates, split


@pytest.mark.parametrize("asked", HELD_OUT)
def test_task_is_never_in_training_text_of_another_seed(asked):
    held_out = {row["prompt"] for row in math_task({"train": ["#### 1"]}, asked, 0, count=100).rows}
    stream = math_documents(seed=1)
    for _ in range(5000):
        split, read = next(stream)
        assert split == asked or read().split("Answer:")[0] + "Answer:" not in held_out


def test_same_bytes_on_every_run(smoke, tmp_path):
    flags = f"--out_dir={tmp_path}", f"--domains={','.join(DOMAINS)}"
    done = prepare("config/smoke/data.py", *flags, hash_seed="12345")
    assert done.returncode == 0, done.stderr
    for folder, _, names in os.walk(smoke):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as first, open(os.path.join(tmp_path, os.path.relpath(path, smoke)), "rb") as second:
                assert first.read() == second.read(), path


def run_main(monkeypatch, capsys, *arguments):
    """main() in this process; returns (what it printed, None) or (None, the UserError's text)."""
    monkeypatch.setattr(sys, "argv", ["data.prepare", *arguments])
    try:
        main()
    except UserError as error:
        assert "\n" not in str(error)
        return None, str(error)
    return capsys.readouterr().out, None


def test_a_domain_of_ones_own_is_added_and_kept(smoke, poems, monkeypatch, capsys):
    arguments = ["config/smoke/data.py", f"--out_dir={smoke}", f"--domains=poems={poems}"]
    before = tokenizer_hash(smoke)
    out, _ = run_main(monkeypatch, capsys, *arguments)
    assert "poems" in out and tokenizer_hash(smoke) == before
    train, val, test = (read_split(smoke, "poems", split)[0] for split in SPLITS)
    everything = [*train, *val, *test]
    assert len(set(everything)) == len(everything) and len(train) > len(val) >= 1 and len(test) >= 1
    assert {f"Line {n} sings of the sea." for n in range(30)} <= set(everything)

    out, _ = run_main(monkeypatch, capsys, *arguments)
    assert "already there" in out
    _, error = run_main(monkeypatch, capsys, *arguments, "--seed=9")
    assert "poems" in error and "seed" in error and "--overwrite=True" in error
    with open(os.path.join(poems, "new.md"), "w") as file:
        file.write("A new file changes the domain.")
    _, error = run_main(monkeypatch, capsys, *arguments)
    assert "files" in error
    out, _ = run_main(monkeypatch, capsys, *arguments, "--overwrite=True")
    assert tokenizer_hash(smoke) == before  # code, math and wiki still depend on it
    _, error = run_main(monkeypatch, capsys, *arguments, "--vocab_size=600")
    assert "already has another tokenizer" in error


def test_overwrite_makes_a_new_tokenizer_when_nothing_else_depends_on_it(poems, tmp_path, monkeypatch, capsys):
    arguments = [f"--out_dir={tmp_path / 'out'}", f"--domains=poems={poems}"]
    run_main(monkeypatch, capsys, *arguments, "--vocab_size=270")
    _, error = run_main(monkeypatch, capsys, *arguments, "--vocab_size=280")
    assert "270 entries" in error
    run_main(monkeypatch, capsys, *arguments, "--vocab_size=280", "--overwrite=True")
    assert load_tokenizer(tmp_path / "out").n_vocab == 280


def test_damaged_tokenizer(poems, tmp_path, monkeypatch, capsys):
    arguments = [f"--out_dir={tmp_path / 'out'}", f"--domains=poems={poems}", "--vocab_size=270"]
    run_main(monkeypatch, capsys, *arguments)
    path = tmp_path / "out" / "tokenizer.tiktoken"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UserError, match="does not belong"):
        load_tokenizer(tmp_path / "out")
    os.remove(tmp_path / "out" / "tiktoken.json")
    _, error = run_main(monkeypatch, capsys, *arguments)
    assert "lost the tokenizer of poems" in error


def test_held_out_of_few_own_texts_is_enough_for_some_windows():
    """30 pieces of 1,000 bytes: 5 % would be 1,500 bytes; 4,000 are taken, of 8 pieces 2, and of three just one."""
    documents = {str(number): "x" * 1000 for number in range(1000)}
    for number, held_out in ((1000, 50), (30, 4), (8, 2), (3, 1)):
        some = dict(list(documents.items())[:number])
        splits = Counter(split for split, _ in own_documents(some, seed=0))
        assert splits == {"train": number - 2 * held_out, "val": held_out, "test": held_out}


def test_one_short_file_of_ones_own_is_cut_for_all_splits(tmp_path, monkeypatch, capsys):
    lines = [f"Verse {n}: the rain, the river and the sea." for n in range(20)]
    (tmp_path / "song.txt").write_text("\n\n".join(lines))
    out, _ = run_main(
        monkeypatch, capsys, f"--out_dir={tmp_path}/out", f"--domains=x={tmp_path}/song.txt", "--vocab_size=260"
    )
    texts = {split: "\n\n".join(read_split(tmp_path / "out", "x", split)[0]) for split in SPLITS}
    assert all(split in out for split in SPLITS) and len(texts["train"]) > len(texts["test"]) > 0
    assert sorted("\n\n".join(texts.values()).split("\n\n")) == sorted(lines)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--domains=poems=nowhere"], ["nowhere does not exist"]),
        (["--domains=cod"], ["'cod'", "code, math, wiki, cpp, english (for your own text: cod=FOLDER)"]),
        (["--domains=../x=config"], ["cannot name a folder"]),
        (["--domains=code,code"], ["twice"]),
        (["--domains=math", "--max_bytes=0"], ["(math) never ends"]),
        (["--max_bytes=-1"], ["max_bytes"]),
        (["--vocab_size=256"], ["vocab_size=256", "257"]),
        (["--tokenizer=bert"], ["--tokenizer=bert: there is no tokenizer; give bpe, a folder that has one"]),
        (["--domains=x=empty"], ["empty has no readable text", ".jsonl"]),
        (["--domains=x=blank"], ["blank has no readable text", "empty"]),
        (["--domains=x=bad.jsonl"], ["bad.jsonl:2", '"text"']),
        (["--domains=x=latin.txt"], ["latin.txt is not UTF-8"]),
        (["--domains=x=short.txt"], ["'x' is too small", "nothing is left for val and test"]),
        (["--domains=x=two.jsonl"], ["'x' is too small", "nothing is left for val;"]),
        (["--domains=x=good.jsonl", "--vocab_size=5000"], ["vocab_size=5000 is too large"]),
    ],
)
def test_errors_name_the_thing_and_the_remedy(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    (tmp_path / "good.jsonl").write_text('{"text": "fine"}\n{"text": "fine too"}\n{"text": "finest"}\n')
    (tmp_path / "two.jsonl").write_text('{"text": "fine"}\n{"text": "fine too"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("one line")
    _, error = run_main(monkeypatch, capsys, "--out_dir=out", "--max_bytes=1000", *arguments)
    assert all(part in error for part in expected), error


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, domain, words in (
        (tmp_path, "poems=/nowhere/at/all", "/nowhere/at/all does not exist"),
        (tmp_path / "file", "math", f"{tmp_path}/file: "),
    ):
        done = prepare(f"--out_dir={folder}", f"--domains={domain}")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


def test_ids_take_as_many_bytes_as_they_need():
    for size, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        assert token_dtype(types.SimpleNamespace(n_vocab=size)) == dtype


def test_held_out_files_that_are_copies_are_left_out(smoke, tmp_path):
    """One of two held-out files repeats a training file: it goes, and the counts say so. Where all do, one line."""
    words = [f"word{number} " for number in range(80)]
    first, second, third = ("".join(words[start:] + words[:start]) + "\n" for start in (0, 7, 31))
    reverse = "".join(reversed(words)) + "\n"
    config = DataConfig(out_dir=smoke)
    for held_out, stays in (([second, reverse], True), ([second, third], False)):
        texts = {"train": [first], "val": list(held_out), "test": [reverse]}
        domain = Domain("english", str(tmp_path / f"english-{stays}"), {}, {}, iter(()), [], texts)
        if not stays:
            with pytest.raises(UserError, match="all of val is copied from train"):
                write_domain(domain, load_tokenizer(smoke), config)
            continue
        write_domain(domain, load_tokenizer(smoke), config)
        with open(f"{domain.folder}/meta.json") as file:
            meta = json.load(file)
        assert (meta["val"]["copies"], meta["val"]["documents"], meta["test"]["copies"]) == (1, 1, 0)
        tokens = np.fromfile(f"{domain.folder}/val.bin", dtype=meta["dtype"])
        assert load_tokenizer(smoke).decode(tokens[:-1].tolist()) == reverse
