"""data/public.py on local parquet and JSON lines, through the same stream that reads public data sets."""

import json
import os
import random
import sys

import pytest
from helpers import SHAPE, SHORT, error_line, must, read, read_json, run, tokens_of

from common.corpus import SPLITS, split_of
from common.errors import UserError, write_json
from common.run import locked
from common.tokenizer import load_tokenizer

datasets = pytest.importorskip("datasets")
from data import public  # noqa: E402


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(3)
    words = ["the", "rain", "river", "sea", "falls", "sings", "over", "under", "old", "grey", "slowly", "and"]
    return [f"{number}. " + " ".join(draw.choices(words, k=draw.randint(5, 60))) for number in range(6000)]


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    """Two parquet files with a column that nobody asked for."""
    folder = tmp_path_factory.mktemp("source")
    for number, part in enumerate((texts[:3500], texts[3500:])):
        table = {"text": part, "url": [f"https://{i}" for i in range(len(part))]}
        datasets.Dataset.from_dict(table).to_parquet(str(folder / f"{number}.parquet"))
    return str(folder)


@pytest.fixture
def prepare(source, data, tmp_path):
    def prepare(*flags, source=source, out="out"):
        return run("data/public.py", f"--source={source}", f"--out_dir={tmp_path}/{out}", f"--tokenizer={data}", *flags)

    return prepare


def test_every_document_is_in_its_split_once(prepare, texts, data, tmp_path):
    out = must(prepare("--domain=web", "--tokens=1e9")).out
    assert "web" in out and "train" in out
    encoding, meta = load_tokenizer(data), read_json(tmp_path / "out" / "web" / "meta.json")
    for split in SPLITS:
        wanted = [text for text in texts if split_of(text) == split]
        tokens = tokens_of(tmp_path / "out", "web", split)
        assert encoding.decode(tokens.tolist()) == "".join(text + "<|endoftext|>" for text in wanted)
        size = sum(len(text.encode()) for text in wanted)
        copies = {"copies": 0} if split != "train" else {}
        assert meta[split] == {"documents": len(wanted), "tokens": len(tokens), "bytes": size, **copies}
    assert meta["recipe"]["source"]["column"] == "text" and len(meta["recipe"]["source"]["files"]) == 2
    assert sorted(os.listdir(tmp_path / "out" / "web")) == ["meta.json", "test.bin", "train.bin", "val.bin"]
    assert "already there, kept" in must(prepare("--domain=web", "--tokens=1e9")).out
    assert "prepared with other settings" in error_line(prepare("--domain=web", "--tokens=2e9"))
    must(run("train.py", *SHAPE, *SHORT, "--max_steps=1", f"--data_dir={tmp_path}/out", f"--out_dir={tmp_path}/seed"))


@pytest.fixture
def small_batches(source, data, tmp_path, monkeypatch):
    """main() with notes every 200 documents, in this module, where it can be changed and stopped."""
    monkeypatch.setattr(public, "LOOK_EVERY", 50)
    monkeypatch.setattr(public, "NOTE_EVERY", 200)
    monkeypatch.setattr(public, "MIN_HELD_OUT_TOKENS", 1)

    def main(out, *flags):
        arguments = f"--source={source}", "--domain=web", f"--out_dir={tmp_path}/{out}", f"--tokenizer={data}"
        monkeypatch.setattr(sys, "argv", ["data/public.py", *arguments, *flags])
        public.main()

    return main


def test_the_budget_and_the_limit_of_held_out_text(small_batches, tmp_path, monkeypatch):
    monkeypatch.setattr(public, "MAX_HELD_OUT_BYTES", 2000)
    small_batches("out", "--tokens=5e4")
    meta = read_json(tmp_path / "out" / "web" / "meta.json")
    assert 50_000 <= meta["train"]["tokens"] < 60_000
    assert all(2000 <= meta[split]["bytes"] < 2400 for split in ("val", "test"))


class Killed(BaseException):
    pass


def stop(*arguments):
    raise Killed


def dying_before_the_end(path, *arguments, **options):
    if path.endswith("meta.json"):
        raise Killed
    write_json(path, *arguments, **options)


@pytest.mark.parametrize("documents", [30, 333, 2000, 4500])
def test_a_stopped_run_goes_on_and_ends_the_same(documents, small_batches, tmp_path, monkeypatch):
    """Stopped in the first shard before the first note, after it, and in the second shard; then twice more at the end,
    before and after meta.json."""
    small_batches("whole")
    add, calls = public.TokenFiles.add, []

    def dying(self, *arguments):
        calls.append(add(self, *arguments))
        if len(calls) == documents:
            for file in self.files.values():
                file.flush()
            raise Killed

    monkeypatch.setattr(public.TokenFiles, "add", dying)
    with pytest.raises(Killed):
        small_batches("out")
    folder = tmp_path / "out" / "web"
    assert not os.path.exists(folder / "meta.json")
    assert os.path.exists(folder / "progress.json") == (documents > 200)
    for written in (False, True):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(public, "write_json", dying_before_the_end if not written else public.write_json)
            patch.setattr(os, "remove", stop)
            small_batches("out")
        assert os.path.exists(folder / "meta.json") == written and os.path.exists(folder / "progress.json")
    small_batches("out")
    assert sorted(os.listdir(folder)) == ["meta.json", "test.bin", "train.bin", "val.bin"]
    for split in SPLITS:
        assert read(folder / f"{split}.bin") == read(tmp_path / "whole" / "web" / f"{split}.bin")
    assert read_json(folder / "meta.json") == read_json(tmp_path / "whole" / "web" / "meta.json")
    assert len(calls) < 2 * 6000  # it did not read everything again


def test_a_data_set_by_name_is_the_same_text_as_its_files(source, small_batches, tmp_path, monkeypatch):
    """Through the package datasets, and through a network that fails on the way: one line, then the command goes on."""
    monkeypatch.setitem(public.SOURCES, "named", public.Source(source, None, "none", "text"))
    small_batches("whole")
    rows = datasets.IterableDataset.__iter__

    def failing(self):
        for number, row in enumerate(rows(self)):
            if number == 2000:
                raise ConnectionError("the line is dead\nand more")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "__iter__", failing)
        with pytest.raises(UserError, match=r"named cannot be read \(ConnectionError: the line is dead\); check"):
            small_batches("out", "--source=named")
    assert os.path.exists(tmp_path / "out" / "web" / "progress.json")
    small_batches("out", "--source=named")
    for split in SPLITS:
        assert read(tmp_path / "out" / "web" / f"{split}.bin") == read(tmp_path / "whole" / "web" / f"{split}.bin")


def test_progress_of_other_settings_or_lost_tokens_is_refused(small_batches, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(public, "write_json", dying_before_the_end)
        small_batches("out")
    for flag in ("--tokens=3", "--column=url"):
        with pytest.raises(UserError, match="of a run with other settings"):
            small_batches("out", flag)
    os.truncate(tmp_path / "out" / "web" / "train.bin", 10)
    with pytest.raises(UserError, match="has lost tokens"):
        small_batches("out")


def test_one_process_writes_at_a_time_and_overwrite_makes_it_anew(small_batches, tmp_path):
    folder = tmp_path / "out" / "web"
    with locked(folder), pytest.raises(UserError, match="another process is writing into"):
        small_batches("out")
    small_batches("out")
    before = read(folder / "train.bin")
    small_batches("out", "--tokens=5e4", "--overwrite=True")
    after = read(folder / "train.bin")
    assert 0 < len(after) < len(before) and before.startswith(after)


def test_json_lines_give_the_same(prepare, texts, tmp_path):
    folder = tmp_path / "lines"
    folder.mkdir()
    rows = [{"body": text, "n": number} for number, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    must(prepare("--domain=web", "--tokens=1e9"))
    must(prepare("--domain=web", "--tokens=1e9", "--column=body", source=folder, out="other"))
    for split in SPLITS:
        assert read(tmp_path / "out" / "web" / f"{split}.bin") == read(tmp_path / "other" / "web" / f"{split}.bin")
    contents = [read_json(tmp_path / out / "web" / "meta.json")["content_hash"] for out in ("out", "other")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--source=nowhere"], "--source=nowhere is neither a known data set (fineweb-edu, "),
        (
            ["--column=body"],
            "0.parquet:1: there is no \"body\" among 'text', 'url'; name the column with",
        ),
        (["--source=wikipedia"], "--source=wikipedia cannot be read"),
        (["--tokenizer=nowhere"], "nowhere has no tokenizer; give --tokenizer=FOLDER"),
        (["--tokens=0"], "tokens must lie in [1, inf)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags, words, prepare):
    assert words in error_line(prepare(*flags))


def test_no_tokenizer_or_another_one(prepare, data, tmp_path):
    assert "out has no tokenizer; give --tokenizer=FOLDER" in error_line(prepare("--tokenizer="))
    must(prepare("--domain=web"))
    (tmp_path / "other").mkdir()
    found = read_json(os.path.join(data, "tokenizer.json"))
    found["model"]["merges"].pop()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(found))
    assert "already has another tokenizer" in error_line(prepare("--domain=web", f"--tokenizer={tmp_path}/other"))


@pytest.mark.parametrize(("package", "flags"), [("datasets", ["--source=wikipedia"]), ("pyarrow.parquet", [])])
def test_without_the_package(package, flags, prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install -r requirements-extra.txt" in error_line(prepare(*flags))
