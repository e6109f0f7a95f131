"""tokenizer.json, the format of Hugging Face's `tokenizers`: read for published models, written for our own.

JsonEncoding reads one through the package `tokenizers` (requirements-extra.txt) and has those methods of
tiktoken.Encoding that this repository calls. `from_ranks` needs no package: it says in that format what a tiktoken
encoding does, so that AutoTokenizer gives the same ids.
"""

import functools
import hashlib
import json
import os
import re

import numpy as np

from common.errors import UserError
from common.files import read_json

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"


@functools.cache
def byte_characters():
    """{byte: character}: byte-level tokenizers spell each byte as a printable character (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# ---- reading ----


class JsonEncoding:
    """The tokenizer.json of a folder, used like a tiktoken.Encoding.

    Special tokens in a text are text. A SentencePiece tokenizer puts a space before a text, which counts as one of its
    bytes.
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
        self.vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.n_vocab = max(self.vocab.values(), default=-1) + 1
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_tokens_set = {token.content for token in added.values() if token.special}
        spell = speller(path)
        self.pieces = {number: spell(piece) for piece, number in self.vocab.items() if number not in added}
        self.pieces |= {number: token.content.encode() for number, token in added.items()}
        self.eot_token = end_of_text(folder, self.vocab)

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), np.uint32)

    def encode_single_token(self, text):
        return self.vocab[text]

    def decode_single_token_bytes(self, token):
        return self.pieces.get(token, b"")  # some vocabularies have gaps

    def decode(self, tokens):
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode(errors="replace")


def speller(path):
    """A function from a piece of the vocabulary to the bytes it stands for, as tokenizer.json's decoder has it."""
    decoder = read_json(path, "copy it again").get("decoder") or {}
    steps = {step.get("type"): step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        table = {character: bytes([byte]) for byte, character in byte_characters().items()}
        return lambda piece: b"".join(table.get(character) or character.encode() for character in piece)
    space = steps.get("Metaspace", {}).get("replacement") or steps.get("Replace", {}).get("pattern", {}).get("String")
    if space is None:
        kinds = ", ".join(map(str, steps))
        raise UserError(f"{path} has the decoder {kinds}; bytes are known of byte-level and SentencePiece tokenizers")

    def spell(piece):
        if "ByteFallback" in steps and (byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece)):
            return bytes.fromhex(byte[1])
        return piece.replace(space, " ").encode()

    return spell


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


def json_hash(folder):
    """The hash that identifies a tokenizer.json: of all that decides ids, in whatever layout it was written."""
    found = read_json(os.path.join(folder, FILE), "copy it again")
    found = found if isinstance(found, dict) else {}
    parts = {name: found.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")}
    model = {name: value for name, value in (found.get("model") or {}).items() if value}
    merges = model.get("merges", [])  # "a b" or ["a", "b"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return hashlib.sha256(json.dumps([model, parts], sort_keys=True).encode()).hexdigest()


# ---- writing ----


def last_merge(token, ranks):
    """The two tokens that byte-pair encoding joins last to spell `token` (bytes); None where it never gets there."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        place = min(range(len(joined)), key=joined.__getitem__)
        if joined[place] >= ranks[token]:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def from_ranks(ranks, pattern, end):
    """The contents of tokenizer.json and tokenizer_config.json for a tiktoken encoding. ranks: {bytes: id}; pattern:
    what a token may not cross; end: the id of END_OF_TEXT."""
    spelled = {token: "".join(byte_characters()[byte] for byte in token) for token in ranks}
    merges = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {"id": end, "content": END_OF_TEXT, "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled[token]: number for token, number in ranks.items()},
            "merges": [[spelled[part] for part in merge] for merge in merges if merge],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return tokenizer, settings
