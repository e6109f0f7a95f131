"""Files as people have them, through data.prepare and data.public: broken, in every form, chats, markers, copies."""

import codecs
import gzip
import json
import os
import random
import shutil

import numpy as np
import pytest
from helpers import (
    error_line,
    finish_process,
    must,
    published_tokenizer,
    read,
    read_json,
    run,
    start_process,
    tokens_of,
)

from common.corpus import SPLITS, split_of
from common.tokenizer import load_tokenizer, token_bytes, tokenizer_hash
from data import files as data_files

WORDS = ["the", "rain", "river", "sea", "falls", "sings", "over", "under", "old", "grey", "slowly", "and", "again"]


def some_texts(count, seed=0, words=40):
    draw = random.Random(seed)
    return [f"{number}. " + " ".join(draw.choices(WORDS, k=words)) for number in range(count)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def public(folder, out, tokenizer, *flags):
    flags = f"--source={folder}", "--domain=web", f"--out_dir={out}", f"--tokenizer={tokenizer}", *flags
    return run("data/public.py", *flags)


def prepare(folder, out, tokenizer, *flags):
    return run("data/prepare.py", f"--domains=web={folder}", f"--out_dir={out}", f"--tokenizer={tokenizer}", *flags)


def documents(out):
    """{split: the decoded documents} of the domain `web`."""
    encoding = load_tokenizer(out)
    end = encoding.decode([encoding.eot_token])
    return {split: encoding.decode(tokens_of(out, "web", split).tolist()).split(end)[:-1] for split in SPLITS}


def everything(out):
    return sorted(text for texts in documents(out).values() for text in texts)


# ---- a source that breaks ----


def as_parquet(path, rows):
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=500)


def cut_line(path):
    path.write_text(path.read_text()[:-20])


def cut_gzip(path):
    path.write_bytes(path.read_bytes()[:-2000])


def cut_parquet(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_gzip(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def renamed(write):
    return lambda path: write(path, [{"body": "a row without text"}] * 900)


BROKEN = {
    "cut line": ("jsonl", write_lines, cut_line, "b.jsonl:900: expected a JSON object, found Unterminated string"),
    "cut gzip": ("jsonl.gz", as_gzip, cut_gzip, "b.jsonl.gz cannot be read after row "),
    "cut parquet": ("parquet", as_parquet, cut_parquet, "b.parquet cannot be read after row 0 ("),
    "renamed": ("jsonl", write_lines, renamed(write_lines), "b.jsonl:1: there is no \"text\" among 'body'; name the"),
    "renamed in parquet": (
        "parquet",
        as_parquet,
        renamed(as_parquet),
        'b.parquet:1: there is no "text" am',
    ),
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path):
    """(a folder of three files whose second is broken, a function that mends it, words of the error)."""
    suffix, write, damage, words = BROKEN[request.param]
    folder = tmp_path / "source"
    folder.mkdir()
    texts = some_texts(2700)
    for name, part in zip("abc", (texts[:900], texts[900:1800], texts[1800:]), strict=True):
        write(folder / f"{name}.{suffix}", [{"text": text} for text in part])
    whole = shutil.copytree(folder, tmp_path / "whole")
    damage(folder / f"b.{suffix}")
    return folder, lambda: shutil.copy(whole / f"b.{suffix}", folder), words


@pytest.mark.parametrize("remedy", ["mend", "remove"])
def test_the_same_command_continues(remedy, broken, data, tmp_path, monkeypatch):
    """One line; what was read stays and is not read again; the end is that of a source that was never broken, or all
    rows but those that nobody could read."""
    folder, mend, words = broken
    arguments = folder, tmp_path / "out", data, "--tokens=1e9"
    message = error_line(public(*arguments))
    assert words in message and "run the same command to continue" in message
    note = read_json(tmp_path / "out" / "web" / "progress.json")
    kept = sum(note["splits"][split]["documents"] for split in SPLITS)
    assert 900 <= kept < 1800
    assert words in error_line(public(*arguments))
    if remedy == "mend":
        mend()
    else:
        os.remove(next(folder.glob("b.*")))
    added, add = [], data_files.document_ids
    monkeypatch.setattr("data.files.document_ids", lambda *rest: added.append(rest) or add(*rest))
    must(public(*arguments))
    assert len(added) == (2700 if remedy == "mend" else 1800 + kept - 900) - kept
    must(public(tmp_path / "whole", tmp_path / "other", data, "--tokens=1e9"))
    expected = some_texts(2700)
    if remedy == "mend":
        for split in SPLITS:
            one, other = (read(tmp_path / out / "web" / f"{split}.bin") for out in ("out", "other"))
            assert one == other
        assert len({read_json(tmp_path / out / "web" / "meta.json")["content_hash"] for out in ("out", "other")}) == 1
    else:
        expected = expected[:kept] + expected[1800:]
    assert everything(tmp_path / "out") == sorted(expected)
    assert "already there, kept" in must(public(*arguments)).out


def test_own_files_that_break_are_one_line_and_mended_they_are_read(broken, data, tmp_path):
    folder, mend, words = broken
    assert words in error_line(prepare(folder, tmp_path / "out", data))
    mend()
    must(prepare(folder, tmp_path / "out", data))
    assert everything(tmp_path / "out") == sorted(some_texts(2700))


def test_files_that_were_read_must_stay_as_they_were(data, tmp_path):
    """A run stopped in its second file: its rows, or the first file, have another text, are gone, or are fewer."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = [{"text": text} for text in some_texts(300)]
    write_lines(folder / "a.jsonl", rows[:100])
    write_lines(folder / "b.jsonl", rows[100:])
    cut_line(folder / "b.jsonl")
    arguments = folder, tmp_path / "out", data, "--tokens=1e9"
    error_line(public(*arguments))
    write_lines(folder / "b.jsonl", [{"text": "another text"}, *rows[101:]])
    assert "b.jsonl: its first 199 rows have changed since they were read; put it" in error_line(public(*arguments))
    write_lines(folder / "b.jsonl", rows[100:150])
    assert "its first 199 rows have changed" in error_line(public(*arguments))
    write_lines(folder / "a.jsonl", rows[:99])
    assert "a.jsonl has changed since it was read; put it back" in error_line(public(*arguments))
    os.remove(folder / "a.jsonl")
    assert "a.jsonl has been read, and is now gone; put it back" in error_line(public(*arguments))
    write_lines(folder / "a.jsonl", rows[:100])
    write_lines(folder / "b.jsonl", rows[100:])
    must(public(*arguments))
    assert everything(tmp_path / "out") == sorted(row["text"] for row in rows)


# ---- JSON lines and text as others write them ----


def lines_of(texts, column="text", **options):
    return "".join(json.dumps({column: text}, **options) + "\n" for text in texts).encode()


FORMS = {
    "line separators": ("a.jsonl", lambda texts: lines_of(texts, ensure_ascii=False)),
    "byte order mark": ("a.jsonl", lambda texts: codecs.BOM_UTF8 + lines_of(texts)),
    "windows": ("a.jsonl", lambda texts: lines_of(texts).replace(b"\n", b"\r\n\r\n")),
    "utf-16": ("a.jsonl", lambda texts: lines_of(texts, ensure_ascii=False).decode().encode("utf-16")),
    "gzip": ("a.jsonl.gz", lambda texts: gzip.compress(lines_of(texts))),
    "capitals": ("A.JSONL.GZ", lambda texts: gzip.compress(lines_of(texts))),
    "json lines": ("a.json", lines_of),
    "json list": ("a.json", lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode()),
    "content": ("a.jsonl", lambda texts: lines_of(texts, "content")),
    "column": ("a.jsonl", lambda texts: lines_of(texts, "prose")),
    "nothing": ("a.jsonl", lambda texts: b'{"text": null}\n{"text": ""}\n\n{"text": " "}\n' + lines_of(texts)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("script", [prepare, public])
def test_json_lines_in_every_form_are_the_same_text(script, form, data, tmp_path):
    texts = [f"{text}\u2028\x85\x0cé" for text in some_texts(300, words=100)]
    name, write = FORMS[form]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(write(texts))
    flags = ["--column=prose"] if form == "column" else []
    for source in (tmp_path / "source", tmp_path / "source" / name):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        must(script(source, tmp_path / "out", data, *flags))
        assert everything(tmp_path / "out") == sorted(texts)


@pytest.mark.parametrize("script", [prepare, public])
def test_plain_text_in_every_form(script, data, tmp_path):
    texts = some_texts(400, words=150)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "A.TXT").write_bytes(codecs.BOM_UTF8 + "\r\n\r\n".join(texts[:100]).encode())
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n\n".join(texts[100:200]).encode()))
    (folder / "c.Md").write_bytes("\n\n".join(texts[200:300]).encode("utf-16"))
    (folder / "d.py").write_text("\n\n".join(texts[300:]))
    must(script(folder, tmp_path / "out", data))
    assert sorted("\n\n".join(everything(tmp_path / "out")).split("\n\n")) == sorted(texts)


# ---- chats and special tokens ----

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|done|>"


@pytest.fixture(scope="module")
def chatty(data, tmp_path_factory):
    """A published tokenizer with chat markers and a chat template."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    folder = str(tmp_path_factory.mktemp("chatty"))
    return folder, published_tokenizer(data, folder, TEMPLATE, "<|im_end|>", "<|im_start|>", "<|done|>")


def chats(count):
    texts = some_texts(2 * count, seed=3)
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]


def documents_of_ids(out, expected):
    """Whether the splits together hold these lists of ids and nothing else, each in one place."""
    found = np.concatenate([tokens_of(out, "web", split) for split in SPLITS]).tolist()
    text = " ".join(map(str, found)) + " "
    assert sum(map(len, expected)) == len(found)
    return all(" ".join(map(str, ids)) + " " in text for ids in expected)


@pytest.mark.parametrize("script", [prepare, public])
def test_chats_have_the_ids_that_transformers_gives_them(script, chatty, tmp_path):
    """Rendered by the tokenizer's own template, markers as tokens, no marker cut, closed by the end-of-text token."""
    folder, theirs = chatty
    write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats(200)])
    out = must(script(tmp_path / "chats.jsonl", tmp_path / "out", folder)).out
    assert "200 chats were written with the tokenizer's chat template" in out and "markers" not in out
    expected = [theirs.apply_chat_template(chat, return_dict=False) for chat in chats(200)]
    assert documents_of_ids(tmp_path / "out", [[*ids, theirs.eos_token_id] for ids in expected])
    meta = read_json(tmp_path / "out" / "web" / "meta.json")
    assert sum(meta[split]["documents"] for split in SPLITS) == 200


@pytest.mark.parametrize("script", [prepare, public])
def test_special_tokens_are_tokens_where_the_text_is_said_to_have_them(script, chatty, tmp_path):
    folder, theirs = chatty
    texts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>" for text in some_texts(200)]
    write_lines(tmp_path / "chats.jsonl", [{"text": text} for text in texts])
    out = must(script(tmp_path / "chats.jsonl", tmp_path / "as-tokens", folder, "--special_tokens=True")).out
    assert "markers" not in out
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert all(ids[0] == theirs.convert_tokens_to_ids("<|im_start|>") for ids in expected)
    assert documents_of_ids(tmp_path / "as-tokens", [[*ids, theirs.eos_token_id] for ids in expected])
    out = must(script(tmp_path / "chats.jsonl", tmp_path / "as-text", folder)).out
    assert "200 end-of-document markers in the text" in out  # <|im_end|> is this tokenizer's
    assert theirs.convert_tokens_to_ids("<|im_start|>") not in tokens_of(tmp_path / "as-text", "web", "train")
    assert "other settings (special_tokens)" in error_line(
        script(tmp_path / "chats.jsonl", tmp_path / "as-text", folder, "--special_tokens=True")
    )


def test_chats_without_a_template_or_without_transformers(data, chatty, tmp_path, monkeypatch):
    write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats(60)])
    out = must(prepare(tmp_path / "chats.jsonl", tmp_path / "out", data)).out
    assert '60 chats were written as "Question:" and "Answer:", because the tokenizer has no chat template' in out
    a, b = chats(1)[0]
    assert f"Question: {a['content']}\nAnswer: {b['content']}\n" in everything(tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    out = must(prepare(tmp_path / "chats.jsonl", tmp_path / "other", chatty[0])).out
    assert "in the ChatML form, because the tokenizer's chat template needs the package transformers" in out
    text = f"<|im_start|>user\n{a['content']}<|im_end|>\n<|im_start|>assistant\n{b['content']}<|im_end|>\n"
    tokens = np.concatenate([tokens_of(tmp_path / "other", "web", split) for split in SPLITS])
    assert text in load_tokenizer(tmp_path / "other").decode(tokens.tolist())


def test_a_chat_that_the_template_refuses(chatty, tmp_path):
    folder = shutil.copytree(chatty[0], tmp_path / "tokenizer")
    template = "{% if messages|length != 2 %}{{ raise_exception('two turns, please') }}{% endif %}x"
    (folder / "chat_template.jinja").write_text(template)
    write_lines(tmp_path / "c.jsonl", [{"messages": chat} for chat in [*chats(5), chats(1)[0][:1]]])
    message = error_line(prepare(tmp_path / "c.jsonl", tmp_path / "out", folder))
    assert "c.jsonl:6: the chat template refuses this chat (two turns, please); fix or remove the file" in message


# ---- markers, copies ----


@pytest.mark.parametrize("script", [prepare, public])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_markers_end_documents(script, suffix, data, tmp_path):
    stories = [text.replace(". ", ".\n\n") for text in some_texts(300)]
    text = "\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n"
    path = tmp_path / f"stories.{suffix}"
    path.write_text(text if suffix == "txt" else json.dumps({"text": text}) + "\n")
    out = must(script(path, tmp_path / "out", data)).out
    assert "300 end-of-document markers in the text were taken as ends of documents" in out
    assert everything(tmp_path / "out") == sorted(stories)
    train = tokens_of(tmp_path / "out", "web", "train").tolist()
    assert train.count(load_tokenizer(data).eot_token) == len(documents(tmp_path / "out")["train"])


def test_a_program_may_spell_the_marker(data, tmp_path):
    (tmp_path / "source").mkdir()
    texts = [f"END = '<|endoftext|>'  # {text}\n" for text in some_texts(100, words=200)]
    for number, text in enumerate(texts):
        (tmp_path / "source" / f"{number}.py").write_text(text)
    out = must(prepare(tmp_path / "source", tmp_path / "out", data)).out
    assert "markers" not in out
    assert sum(map(len, documents(tmp_path / "out").values())) == 100 * 2  # a document is split where it is spelled


def test_the_same_text_is_on_one_side_and_counts_once(data, tmp_path):
    """20 texts ten times each; then near copies, which only differ in their first word."""
    texts = [text * 8 for text in some_texts(20)]
    (tmp_path / "source").mkdir()
    for number in range(200):
        (tmp_path / "source" / f"{number}.txt").write_text(texts[number % 20] + "\n" * (number // 100))
    out = must(prepare(tmp_path / "source", tmp_path / "out", data)).out
    assert "180 of 200 documents repeat another and were left out" in out
    assert [text.strip() for text in everything(tmp_path / "out")] == sorted(texts)

    near = [f"{word} {text}" for text in some_texts(200, words=60) for word in ("Once", "Twice")]
    write_lines(tmp_path / "near.jsonl", [{"text": text} for text in near])
    out = must(prepare(tmp_path / "near.jsonl", tmp_path / "other", data)).out
    meta, found = read_json(tmp_path / "other" / "web" / "meta.json"), documents(tmp_path / "other")
    copies = meta["val"]["copies"] + meta["test"]["copies"]
    assert f"{copies} held-out documents are largely contained in the training text" in out and copies > 10
    train = {text.split(" ", 1)[1] for text in found["train"]}
    assert not train & {text.split(" ", 1)[1] for split in ("val", "test") for text in found[split]}

    write_lines(tmp_path / "all.jsonl", [{"text": f"{n} {some_texts(1)[0]}"} for n in range(100)])
    out = must(prepare(tmp_path / "all.jsonl", tmp_path / "all", data)).out
    assert "all of val repeats text from train, and was kept" in out


# ---- names, vocabularies, and what else a folder may hold ----


@pytest.mark.parametrize("name", ["avg", "all", "a,b", "..", "a b", "my.text"])
def test_names_that_no_domain_can_have(name, data, tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in some_texts(60)])
    flags = f"--out_dir={tmp_path}/out", f"--tokenizer={data}"
    words = "has a special meaning" if name in ("avg", "all") else "cannot name a folder"
    assert words in error_line(run("data/public.py", f"--source={tmp_path}/a.jsonl", f"--domain={name}", *flags))
    if "," not in name:
        assert words in error_line(run("data/prepare.py", f"--domains={name}={tmp_path}/a.jsonl", *flags))


@pytest.mark.parametrize("unknown", ["<unk>", None])
@pytest.mark.parametrize("script", [prepare, public])
def test_a_tokenizer_that_lacks_characters_says_how_much_is_lost(script, unknown, tmp_path):
    """Letters of ASCII and a space, no bytes: two characters in a text have no piece, four bytes of it."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "</s>", "▁", *map(chr, range(33, 127))]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token=unknown))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["</s>"])
    (tmp_path / "t").mkdir()
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    draw = random.Random(2)
    texts = ["".join(draw.choices("abcdefghijklmnop qrstuvwxyz", k=100)).strip() + " éß" for _ in range(200)]
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    out = must(script(tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "t")).out
    assert "800 bytes of text (3.8" in out and "have no token: the tokenizer lacks their characters or changes" in out
    sizes = [len(text.encode()) - 4 for text in texts]
    lengths = token_bytes(load_tokenizer(tmp_path / "out"))
    assert sum(lengths[tokens_of(tmp_path / "out", "web", split)].sum() for split in SPLITS) == sum(sizes)


def test_a_tokenizer_that_lacks_nothing_says_nothing(chatty, data, tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": f"{text} éß 漢 \x00"} for text in some_texts(100)])
    for name, tokenizer in (("ours", data), ("theirs", chatty[0])):
        assert "no token" not in must(prepare(tmp_path / "a.jsonl", tmp_path / name, tokenizer)).out


def unreadable(path):
    path.write_text("hidden")
    real = open

    def refuse(name, *rest, **options):
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(name, *rest, **options)

    return refuse


HOSTILE = {
    "latin": ("b.txt", lambda path: path.write_bytes(b"caf\xe9"), "b.txt is not UTF-8 text"),
    "latin lines": ("b.jsonl", lambda path: path.write_bytes(b'{"text": "caf\xe9"}\n'), "b.jsonl is not UTF-8 text"),
    "NUL": ("b.txt", lambda path: path.write_bytes(b"a\nb\0c"), "b.txt:2: contains a NUL byte"),
    "UTF-16 unmarked": ("b.txt", lambda path: path.write_bytes("abc".encode("utf-16-le")), "b.txt:1: contains a NUL"),
    "NULs at the end": ("b.jsonl", lambda path: path.write_bytes(b'{"text": "a"}\n\0\0\0\0'), "b.jsonl:2: expected a"),
    "dangling": ("b.txt", lambda path: path.symlink_to("nowhere"), "b.txt is not a file, or a broken link"),
    "circle": ("b.txt", lambda path: path.symlink_to("b.txt"), "b.txt is not a file, or a broken link"),
    "pipe": ("b.txt", os.mkfifo, "b.txt is not a file, or a broken link"),
    "surrogate": ("b.jsonl", lambda path: path.write_text('{"text": "\\ud800"}\n'), "b.jsonl:1: expected a string or"),
    "number": ("b.jsonl", lambda path: path.write_text('{"text": 3}\n'), 'expected a string or a chat under "text", f'),
    "list": ("b.jsonl", lambda path: path.write_text("[1, 2]\n"), "b.jsonl:1: expected a JSON object with a string"),
    "deep": ("b.jsonl", lambda path: path.write_text("[" * 100_000 + "\n"), "b.jsonl:1: expected a JSON object"),
    "no gzip": ("b.txt.gz", lambda path: path.write_text("plain"), "b.txt.gz cannot be read after row 0 (Not a gz"),
    "locked": ("b.txt", unreadable, "b.txt cannot be read after row 0 (Permission denied)"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_read_is_one_line(kind, data, tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    name, write, words = HOSTILE[kind]
    write_lines(folder / "a.jsonl", [{"text": text} for text in some_texts(50)])
    refuse = write(folder / name)
    if callable(refuse):
        monkeypatch.setattr("data.files.open", refuse, raising=False)
    message = error_line(prepare(folder, tmp_path / "out", data))
    assert f"{folder}/{words}" in message or words in message
    assert ";" in message


def test_what_does_not_matter_is_read_past(data, tmp_path):
    """Empty files, hidden ones, an interrupted copy, a link to another folder, one round in a circle, a long line."""
    folder, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    texts = [*some_texts(100), "x" * 100_000 + " " * 100_000 + "end"]
    write_lines(folder / "a.jsonl", [{"text": text} for text in texts[:50]])
    write_lines(elsewhere / "b.jsonl", [{"text": text} for text in texts[50:]])
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    for name in ("empty.txt", "empty.jsonl", "c.jsonl.part"):
        (folder / name).write_text("")
    (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07")
    out = must(prepare(folder, tmp_path / "out", data)).out
    assert "files of other kinds, not read: c.jsonl.part (1)" in out
    assert everything(tmp_path / "out") == sorted(texts)


def test_a_folder_of_parquet_has_other_files_beside_it(data, tmp_path):
    """A clone of a data set: its README is no text of it, and data.public says so."""
    (tmp_path / "source" / "data").mkdir(parents=True)
    texts = some_texts(200)
    as_parquet(tmp_path / "source" / "data" / "a.parquet", [{"text": text, "n": 1} for text in texts])
    (tmp_path / "source" / "README.md").write_text("A data set.")
    out = must(public(tmp_path / "source", tmp_path / "out", data)).out
    assert "files of other kinds, not read: README.md (1)" in out and everything(tmp_path / "out") == sorted(texts)
    assert {split_of(text) for text in texts} == set(SPLITS)


def test_text_without_blank_lines_is_cut_at_its_lines(data, tmp_path):
    lines = some_texts(1200)
    (tmp_path / "log.txt").write_text("\n".join(lines))
    must(prepare(tmp_path / "log.txt", tmp_path / "out", data))
    found = documents(tmp_path / "out")
    assert all(found.values())
    assert sorted(line for text in everything(tmp_path / "out") for line in text.split("\n")) == sorted(lines)
    sizes = sorted(len(text.encode()) for text in everything(tmp_path / "out"))
    assert sizes[1] >= 4000 and sizes[-1] < 4500  # but for the last one


def test_two_preparations_of_one_folder_at_once_make_one_tokenizer(tmp_path):
    flags = f"--out_dir={tmp_path}/out", "--max_bytes=100_000", "--vocab_size=300"
    hook = "import sys; sys.path.insert(0, '.')"
    both = [start_process("data/prepare.py", *flags, f"--domains={name}", hook=hook) for name in ("math", "wiki")]
    for one in both:
        must(finish_process(*one))
    metas = [read_json(tmp_path / "out" / name / "meta.json") for name in ("math", "wiki")]
    assert {meta["tokenizer_hash"] for meta in metas} == {tokenizer_hash(str(tmp_path / "out"))}
