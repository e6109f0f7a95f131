"""tokenizer.json both ways: AutoTokenizer on our folders, and published tokenizers through our scripts."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import SHAPE, SHORT, error_line, must, read, read_json, run, tokens_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from common.hf import copy_tokenizer, same_tokenizer
from common.tokenizer import (
    END_OF_TEXT,
    JsonEncoding,
    encode,
    encode_continuation,
    has_tokenizer,
    load_tokenizer,
    token_bytes,
    tokenizer_hash,
)
from data.bpe import from_ranks, last_merge, train_bpe

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

TEXTS = {
    "code": "def f(x):\n\treturn [i ** 2 for i in range(x)]  # über\n\n\n    if name == '__main__':\r\n        f(10)\n",
    "prose": "It was the best of times; it wasn't the worst -- 'twas (mostly) “fine”…  \n\n Twice.   ",
    "maths": "12 + 345 = 357, 3.14159e-10 < 2^{64}; ∫_0^∞ e^{-x²} dx = √π/2 ≈ 0,886\n#### 42",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪🏳️‍🌈 naïve café ﬁ 漢字かな한글 עברית العربية ไทย",
    "control": "\x00\x01\t\x0b\x0c\x1b[0m\x1c\x1f\x7f\x85\xa0\u2028\u2029\u200b\ufeff\ufffd end",
    "empty": "",
    "spaces": " ",
    "newlines": " \n \n\n\r\n \t\n  x",
    "marks": "<s></s><0x41>▁<unk>",
}


@pytest.fixture(scope="module")
def ours(data):
    return load_tokenizer(data)


@pytest.mark.parametrize("text", TEXTS)
def test_autotokenizer_gives_the_same_ids_on_every_kind_of_folder(text, ours, seed, mixed, btx, data):
    expected = ours.encode_ordinary(TEXTS[text])
    for folder in (seed, mixed, btx, data):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs(TEXTS[text])["input_ids"] == expected
        assert theirs.decode(expected) == TEXTS[text]
    assert theirs.eos_token_id == ours.eot_token and len(theirs) == ours.n_vocab


def test_autotokenizer_gives_the_same_ids_on_random_bytes_and_characters(ours, seed, data):
    theirs = AutoTokenizer.from_pretrained(seed)
    noise = np.random.default_rng(1).bytes(1_000_000).decode(errors="replace")
    draw = random.Random(1)
    letters = "".join(map(chr, draw.choices([*range(0xD800), *range(0xE000, 0x20000)], k=200_000)))
    for text in (noise, letters, "".join(draw.choices("ab .\n_19é", k=200_000))):
        assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
    words = read(os.path.join(os.path.dirname(data), "rain.jsonl")).decode()
    assert theirs(words)["input_ids"] == ours.encode_ordinary(words)


def test_our_tokenizer_json_read_as_a_published_one(ours, seed, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(read(os.path.join(seed, name)))
    again = load_tokenizer(str(tmp_path))
    assert isinstance(again, JsonEncoding) and not isinstance(ours, JsonEncoding)
    assert (again.n_vocab, again.eot_token) == (ours.n_vocab, ours.eot_token)
    assert (token_bytes(again) == token_bytes(ours)).all()
    pieces = [[encoding.decode_single_token_bytes(token) for token in range(320)] for encoding in (again, ours)]
    assert pieces[0] == pieces[1]
    text = END_OF_TEXT.join(TEXTS.values())
    assert again.encode_ordinary(text) == ours.encode_ordinary(text)  # the special token is text here, as it is there
    assert again.decode(ours.encode_ordinary(text)) == text


RUNS = {
    "letters": "".join(random.Random(1).choices("abcdefgABCDEFG", k=200_000)),
    "one letter": "a" * 200_000,
    "spaces": "a" + " " * 1_200_000 + "b",
    "blank lines": " \n" * 100_000,
    "dashes": "-" * 200_000,
    "characters": "".join(map(chr, random.Random(1).choices(range(0x4E00, 0x5E00), k=50_000))),
}


@pytest.mark.parametrize("run", RUNS)
def test_text_without_spaces_is_encoded_as_tokenizers_does(run, ours, data):
    """And a million spaces, which are too many for tiktoken's regular expressions."""
    text, theirs = RUNS[run], tokenizers.Tokenizer.from_file(os.path.join(data, "tokenizer.json"))
    assert encode(ours, text).tolist() == theirs.encode(text).ids
    marked = f"{END_OF_TEXT}x{END_OF_TEXT}{text}"
    assert encode(ours, marked, special=True).tolist() == theirs.encode(marked).ids


def test_padding_and_batches(seed):
    """What padding=True and pipeline(batch_size=2) want of our folders: a batch's texts go on as each does alone."""
    tokenizer, texts = AutoTokenizer.from_pretrained(seed), ["The rain", "Question: Tom has 3 apples and", "The"]
    batch = tokenizer(texts, padding=True)
    width = max(map(len, batch["input_ids"]))
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        own = tokenizer(text)["input_ids"]
        assert ids == [tokenizer.eos_token_id] * (width - len(own)) + own
        assert mask == [0] * (width - len(own)) + [1] * len(own)
    generate = pipeline("text-generation", seed, dtype=torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False}
    together = generate(texts, batch_size=2, **options)
    assert together == [generate(text, **options) for text in texts]
    assert [len(generate.tokenizer(text)["input_ids"]) for text in texts] != [width] * 3


def test_merges_are_what_byte_pair_encoding_does():
    ranks = train_bpe(["aaaa aaa aa abab ababab a b aab abb banana bandana " * 20], 275)
    assert last_merge(b"ab", ranks) == [b"a", b"b"]
    for token in (token for token in ranks if len(token) > 1):
        left, right = last_merge(token, ranks)
        assert left + right == token and max(ranks[left], ranks[right]) < ranks[token]
    assert last_merge(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"abc": 3}) is None  # nothing leads there
    tokenizer, _ = from_ranks(ranks)
    assert len(tokenizer["model"]["merges"]) == len(ranks) - 256


# ---- published tokenizers ----


CORPUS = [*TEXTS.values(), "the rain falls over the grey river and the sea sings again. " * 20]


def byte_level(folder):
    """As Llama 3, Qwen and SmolLM have it: bytes spelled as characters, several special tokens, gaps at the end."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return special[1]


def sentencepiece(folder):
    """As Llama 2, TinyLlama and Mistral have it: ▁ for spaces, one before the text, bytes where nothing else fits."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"therainflsovgyuivdx()[]"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(names))}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("r", "a"), ("i", "n"), ("ra", "in"), ("▁", "rain")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return "</s>"


def metaspace(folder):
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3] + special[3:]))
    found = json.loads(tokenizer.to_str())
    found["added_tokens"] = found["added_tokens"][:3]  # the bytes are pieces of the vocabulary, not special
    (folder / "tokenizer.json").write_text(json.dumps(found))
    return "</s>"


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


@pytest.fixture(params=KINDS)
def published(request, tmp_path):
    """A checkpoint folder of transformers with a tokenizer of its own."""
    folder = tmp_path / "published"
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape)).save_pretrained(folder)
    end = KINDS[request.param](folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": end, "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_published_ids_and_bytes(published):
    encoding, theirs = load_tokenizer(published), AutoTokenizer.from_pretrained(published)
    assert encoding.eot_token == theirs.eos_token_id
    exact = read_json(os.path.join(published, "tokenizer.json"))["decoder"]["type"] == "ByteLevel"
    lengths = token_bytes(encoding)
    for name, text in TEXTS.items():
        ids = encoding.encode_ordinary(text)
        assert encoding.eot_token not in ids  # what looks special in a text is text
        if name == "marks":
            continue
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        back = encoding.decode(ids)
        assert back == text or (not exact and back == f" {text}")
        assert lengths[ids].sum() == len(back.encode())
    assert lengths[encoding.eot_token] == 0 and len(lengths) == encoding.n_vocab


def test_a_continuation_gets_no_space_of_its_own(published):
    """What a question is followed by is scored as the text that was asked about, whatever the tokenizer."""
    encoding = load_tokenizer(published)
    spell = encoding.decode_single_token_bytes
    for prompt, text in (("He was born in", " Haden\n"), ('x = "', 'Haden"'), ("a", "\n\nb"), ("a", "  b")):
        together = encoding.encode_ordinary(prompt) + encode_continuation(encoding, text)
        assert b"".join(map(spell, together)).removeprefix(b" ") == (prompt + text).encode()


def test_data_training_mixing_sampling_and_scoring_with_a_published_tokenizer(published, data, tmp_path):
    text = os.path.join(os.path.dirname(data), "rain.jsonl")
    out = f"{tmp_path}/data"
    prepare = "data/prepare.py", f"--out_dir={out}", f"--domains=rain={text}", f"--tokenizer={published}"
    must(run(*prepare))
    assert has_tokenizer(out) and not os.path.exists(f"{out}/tiktoken.json")
    assert tokenizer_hash(out) == tokenizer_hash(published)
    encoding, tokens = load_tokenizer(published), tokens_of(out, "rain", "val")
    meta = read_json(f"{out}/rain/meta.json")
    texts = encoding.decode(tokens).split(encoding.decode([encoding.eot_token]))[:-1]
    assert len(texts) == meta["val"]["documents"] and texts[0].strip() in read(text).decode()
    spaces = len(texts) if texts[0].startswith(" ") else 0
    assert token_bytes(encoding)[tokens].sum() == meta["val"]["bytes"] + spaces
    assert "already there, kept" in must(run(*prepare)).out
    assert "another tokenizer" in error_line(run(*prepare[:3]))
    assert "another tokenizer" in error_line(run(*prepare[:2], f"--domains=sea={text}", f"--tokenizer={data}"))

    expert = f"{tmp_path}/expert"
    flags = *SHORT, f"--data_dir={out}", "--max_steps=2"
    must(run("train.py", *flags, f"--init_from={published}", f"--out_dir={expert}"))
    must(run("mix.py", f"--experts={expert},{published}", f"--out_dir={tmp_path}/mixed"))
    for folder in (expert, f"{tmp_path}/mixed"):
        assert read(f"{folder}/tokenizer.json") == read(f"{published}/tokenizer.json")
        assert "the rain" in must(run("sample.py", f"--model={folder}", "--prompt=the rain", "--max_new_tokens=5")).out
    flags = f"--data_dir={out}", "--sequence_length=32", "--eval_windows=4", f"--out_dir={tmp_path}/report"
    must(run("eval.py", f"--model={expert},{tmp_path}/mixed", *flags))
    rows = read_json(f"{tmp_path}/report/results.json")["rows"]
    assert all(0.5 < row["bpb"]["rain"] < 20 for row in rows)
    message = error_line(run("train.py", *SHORT, f"--data_dir={data}", f"--init_from={published}", f"--out_dir={out}2"))
    assert "another tokenizer" in message


def test_our_own_tokenizer_serves_other_data(data, seed, tmp_path):
    """--tokenizer=FOLDER with one of our folders: new text in the ids of an old model."""
    text = os.path.join(os.path.dirname(data), "rain.jsonl")
    must(run("data/prepare.py", f"--out_dir={tmp_path}/data", f"--domains=rain={text}", f"--tokenizer={seed}"))
    assert tokenizer_hash(f"{tmp_path}/data") == tokenizer_hash(data)
    assert read(tmp_path / "data" / "rain" / "test.bin")[:200] == read(os.path.join(data, "rain", "test.bin"))[:200]


def test_another_layout_of_the_same_tokenizer_is_the_same_tokenizer(published, tmp_path):
    found = read_json(os.path.join(published, "tokenizer.json"))
    found["model"]["merges"] = [" ".join(merge) for merge in found["model"]["merges"]]  # as older files have it
    found["post_processor"] = None
    os.makedirs(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(found, indent=4))
    same_tokenizer([published, str(tmp_path / "other")])
    found["model"]["merges"] = found["model"]["merges"][:-1]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(found))
    assert tokenizer_hash(published) != tokenizer_hash(str(tmp_path / "other"))


def test_copying_leaves_nothing_of_the_tokenizer_before(data, published, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    copy_tokenizer(data, str(folder))
    assert sorted(os.listdir(folder)) == [
        "tiktoken.json",
        "tokenizer.json",
        "tokenizer.tiktoken",
        "tokenizer_config.json",
    ]
    copy_tokenizer(published, str(folder))
    # the model that the tokenizer came with brought the first
    assert sorted(os.listdir(folder)) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    copy_tokenizer(data, str(folder))
    assert "generation_config.json" not in os.listdir(folder)
    copy_tokenizer(published, str(folder))
    assert tokenizer_hash(str(folder)) == tokenizer_hash(published)


# ---- what is wrong is said in one line ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: "{", "tokenizer.json cannot be read"),
        (
            lambda found: json.dumps({**found, "decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}}),
            "WordPiece",
        ),
        (lambda found: json.dumps({**found, "decoder": None}), "has the decoder None"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(change, words, published, tmp_path):
    path = os.path.join(published, "tokenizer.json")
    content = change(read_json(path))
    with open(path, "w") as file:
        file.write(content)
    assert words in error_line(run("sample.py", f"--model={published}"))


def test_no_end_of_text(published):
    with open(os.path.join(published, "tokenizer_config.json"), "w") as file:
        file.write("{}")
    assert "give its tokenizer_config.json an eos_token" in error_line(run("sample.py", f"--model={published}"))


def test_without_the_package(published, data, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    message = error_line(run("sample.py", f"--model={published}"))
    assert "needs the package tokenizers; pip install -r requirements-extra.txt" in message
    must(run("train.py", *SHAPE, *SHORT, "--max_steps=1", f"--data_dir={data}", f"--out_dir={tmp_path}/seed"))


def test_no_tokenizer_where_one_is_asked_for(tmp_path):
    message = error_line(run("data/prepare.py", f"--out_dir={tmp_path}/data", f"--tokenizer={tmp_path}"))
    assert f"--tokenizer={tmp_path}: there is no tokenizer; give bpe, a folder that has one" in message


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_tiktoken_json_of_another_form_is_named(content, seed, data, tmp_path):
    copy = shutil.copytree(seed, tmp_path / "copy")
    (copy / "tiktoken.json").write_text(content)
    assert "is not a tiktoken.json of this project" in error_line(run("sample.py", f"--model={copy}", "--prompt=Tom"))
    flags = f"--init_from={copy}", f"--data_dir={data}", f"--out_dir={tmp_path}/run"
    assert "is not a tiktoken.json of this project" in error_line(run("train.py", *SHORT, *flags))
