"""The tokenizer of a folder, used through tiktoken or, if a published model brings its own, through `tokenizers`.

A folder with `tiktoken.json` and `tokenizer.tiktoken` (tiktoken's own rank format) has a tokenizer: data folders hold
one (data/bpe.py trains it), and every checkpoint carries a copy. So does a folder with `tokenizer.json`, in Hugging
Face's format. Our folders have both, which give the same ids.
"""

import base64
import functools
import hashlib
import itertools
import json
import os
import re

import numpy as np
import tiktoken

from common.errors import UserError, read_json

TOKENIZER_FILES = ("tiktoken.json", "tokenizer.tiktoken")
REMEDY = "prepare the data first (python -m data.prepare), or copy both tokenizer files from the folder it is in"


def is_published(folder):
    """Whether a folder has only a tokenizer.json, as published models do."""
    ours = any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZER_FILES)
    return not ours and os.path.exists(os.path.join(folder, FILE))


def has_tokenizer(folder):
    return os.path.exists(os.path.join(folder, TOKENIZER_FILES[0])) or is_published(folder)


def content_hash(description, rank_lines):
    """The hash of a tokenizer, from its tiktoken.json and the text of its tokenizer.tiktoken."""
    content = [description["pattern"], description["special_tokens"], rank_lines]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_tokenizer(folder):
    """The tiktoken.Encoding of a data or checkpoint folder, or a JsonEncoding, which has the same methods. UserError if
    a file is missing or damaged."""
    if is_published(folder):
        return JsonEncoding(folder)
    description = read_description(folder)
    path = os.path.join(folder, "tokenizer.tiktoken")
    try:
        with open(path) as file:
            text = file.read()
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or cannot be read; {REMEDY}") from None
    if content_hash(description, text) != description["hash"]:
        raise UserError(f"{path} does not belong to the tiktoken.json next to it; {REMEDY}")
    lines = [line.split() for line in text.splitlines()]
    return tiktoken.Encoding(
        name=description["name"],
        pat_str=description["pattern"],
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens=description["special_tokens"],
        explicit_n_vocab=description["vocab_size"],
    )


def read_description(folder):
    """The tiktoken.json of a folder."""
    path = os.path.join(folder, "tiktoken.json")
    found = read_json(path, REMEDY)
    if not isinstance(found, dict) or not found.keys() >= {"name", "pattern", "special_tokens", "vocab_size", "hash"}:
        raise UserError(f"{path} is not a tiktoken.json of this project; {REMEDY}")
    return found


def tokenizer_hash(folder, added=True):
    """The hash (hex) of a folder's tokenizer: equal hashes mean equal ids. Without `added`, tokens that were added to
    the vocabulary, such as a chat's, do not count."""
    if is_published(folder):
        return json_hash(folder, added)
    return read_description(folder)["hash"]


def token_bytes(encoding):
    """How many bytes of text each id spells: int64 array [n_vocab], 0 for special tokens."""
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)]
    special = [encoding.is_special_token(token) for token in range(encoding.n_vocab)]
    return np.where(special, 0, lengths)


def encode_continuation(encoding, text, special=False):
    """The list of ids of a text that continues another: without the space that SentencePiece puts before a text."""
    first = encode(encoding, "a")
    before = "\n" if len(first) and encoding.decode_single_token_bytes(first[0]).startswith(b" ") else ""
    return encode(encoding, before + text, special)[len(encode(encoding, before)) :].tolist()


def encode(encoding, text, special=False):
    """The ids of a text, an array. special: whether to read special tokens as such where the text spells them."""
    try:
        return encoding.encode_to_numpy(text, allowed_special="all" if special else set(), disallowed_special=())
    except ValueError:  # a million spaces in a row are too much for tiktoken's regular expressions, not for Python's
        parts = text.split(END_OF_TEXT) if special else [text]
        ids = [[*encoding._encode_only_native_bpe(part), encoding.eot_token] for part in parts]
        return np.array(list(itertools.chain(*ids))[:-1], np.uint32)


def spelled_bytes(encoding):
    """(V,): how many bytes each id spells; a special token spells its name, <unk> nothing."""
    unknown = getattr(encoding, "unknown", None)
    return np.array(
        [len(encoding.decode_single_token_bytes(id)) * (id != unknown) for id in range(encoding.n_vocab)], np.int64
    )


# ---- tokenizer.json, the format of Hugging Face's `tokenizers` ----

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"


@functools.cache
def byte_characters():
    """{byte: character}: byte-level tokenizers spell each byte as a printable character (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class JsonEncoding:
    """The tokenizer.json of a folder, with the interface of a tiktoken.Encoding.

    Special tokens in a text are read as plain text. A SentencePiece tokenizer puts a space before a text, which counts
    as one of its bytes.
    """

    name = FILE

    def __init__(self, folder):
        path = os.path.join(folder, FILE)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(f"{path} needs the package tokenizers; pip install -r requirements-extra.txt") from None
        try:
            self.tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the package raises nothing narrower
            raise UserError(f"{path} cannot be read ({error}); copy it again") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<s>" in a text is three characters
        vocab, spell = self.tokenizer.get_vocab(with_added_tokens=True), speller(path)
        self.unknown = unknown_token(path, vocab)
        self.n_vocab = max(vocab.values(), default=-1) + 1
        self.eot_token = end_of_text(folder, vocab)
        self.added = self.tokenizer.get_added_tokens_decoder()
        self.pieces = {number: spell(piece) for piece, number in vocab.items()}
        self.pieces |= {number: token.content.encode() for number, token in self.added.items()}

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, allowed_special=(), disallowed_special=()):
        self.tokenizer.encode_special_tokens = allowed_special != "all"
        ids = np.array(self.encode_ordinary(text), np.uint32)
        self.tokenizer.encode_special_tokens = True
        return ids

    def is_special_token(self, token):
        return token in (self.eot_token, self.unknown) or (token in self.added and self.added[token].special)

    def decode_single_token_bytes(self, token):
        return self.pieces.get(token, b"")  # some vocabularies have gaps

    def decode(self, tokens):
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode(errors="replace")


def speller(path):
    """A function from a piece of the vocabulary to the bytes it spells, according to tokenizer.json's decoder."""
    decoder = read_json(path, "copy it again").get("decoder") or {}
    steps = {step.get("type"): step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        table = {character: bytes([byte]) for byte, character in byte_characters().items()}
        return lambda piece: b"".join(table.get(character) or character.encode() for character in piece)
    space = steps.get("Metaspace", {}).get("replacement") or steps.get("Replace", {}).get("pattern", {}).get("String")
    if space is None:
        kinds = ", ".join(map(str, steps))
        raise UserError(f"{path} has the decoder {kinds}; only byte-level and SentencePiece tokenizers can be read")

    def spell(piece):
        if "ByteFallback" in steps and (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece)):
            return bytes.fromhex(byte[1])
        return piece.replace(space, " ").encode()

    return spell


def unknown_token(path, vocab):
    """The id for text that no piece spells, or None if there is no such id."""
    model = read_json(path, "copy it again").get("model") or {}
    return vocab.get(model.get("unk_token"), model.get("unk_id"))


def end_of_text(folder, vocab):
    """The id of the token that ends a text."""
    for name in (SETTINGS, "special_tokens_map.json"):
        path = os.path.join(folder, name)
        token = read_json(path, "copy it again").get("eos_token") if os.path.exists(path) else None
        token = token.get("content") if isinstance(token, dict) else token
        if token in vocab:
            return vocab[token]
    if END_OF_TEXT in vocab:
        return vocab[END_OF_TEXT]
    raise UserError(f"{folder} does not say which token ends a text; give its {SETTINGS} an eos_token")


def json_hash(folder, added=True):
    """The hash of a tokenizer.json: of everything that decides ids, whatever the file's layout."""
    found = read_json(os.path.join(folder, FILE), "copy it again")
    found = found if isinstance(found, dict) else {}
    names = ("added_tokens",) * added + ("normalizer", "pre_tokenizer", "decoder")
    parts = {name: found.get(name) for name in names}
    model = {name: value for name, value in (found.get("model") or {}).items() if value}
    merges = model.get("merges", [])  # "a b" or ["a", "b"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return hashlib.sha256(json.dumps([model, parts], sort_keys=True).encode()).hexdigest()
