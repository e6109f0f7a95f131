"""The tokenizer of a folder, used through tiktoken or, where a published model brings its own, through `tokenizers`.

A folder with `tiktoken.json` and `tokenizer.tiktoken` (tiktoken's own rank format) is a tokenizer: data folders hold
one (data/bpe.py trains it), and every checkpoint carries a copy. So is a folder with `tokenizer.json`, Hugging Face's
format (common/tokenizer_json.py). Ours hold both, which give the same ids.
"""

import base64
import hashlib
import json
import os

import numpy as np
import tiktoken

from common.errors import UserError
from common.files import read_json
from common.tokenizer_json import END_OF_TEXT as END_OF_TEXT
from common.tokenizer_json import FILE, JsonEncoding, json_hash

TOKENIZER_FILES = ("tiktoken.json", "tokenizer.tiktoken")
REMEDY = "prepare the data first (python -m data.prepare), or copy both tokenizer files from where it was prepared"


def is_published(folder):
    """Whether a folder's tokenizer is a published model's, in tokenizer.json alone."""
    ours = any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZER_FILES)
    return not ours and os.path.exists(os.path.join(folder, FILE))


def has_tokenizer(folder):
    return os.path.exists(os.path.join(folder, TOKENIZER_FILES[0])) or is_published(folder)


def content_hash(description, rank_lines):
    """The hash that identifies a tokenizer, from its tiktoken.json and the text of its tokenizer.tiktoken."""
    content = [description["pattern"], description["special_tokens"], rank_lines]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_tokenizer(folder):
    """The tiktoken.Encoding of a data or checkpoint folder, or the JsonEncoding that has its methods. UserError when a
    file is missing or damaged."""
    if is_published(folder):
        return JsonEncoding(folder)
    description = read_json(os.path.join(folder, "tiktoken.json"), REMEDY)
    path = os.path.join(folder, "tokenizer.tiktoken")
    try:
        with open(path) as file:
            text = file.read()
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or cannot be read; {REMEDY}") from None
    if content_hash(description, text) != description["hash"]:
        raise UserError(f"{path} does not belong to the tiktoken.json next to it; {REMEDY}")
    ranks = {}
    for line in text.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        name=description["name"],
        pat_str=description["pattern"],
        mergeable_ranks=ranks,
        special_tokens=description["special_tokens"],
        explicit_n_vocab=description["vocab_size"],
    )


def tokenizer_hash(folder):
    """The hash (hex) that identifies a folder's tokenizer: two folders with the same one share all ids."""
    if is_published(folder):
        return json_hash(folder)
    return read_json(os.path.join(folder, "tiktoken.json"), "prepare the data first (python -m data.prepare)")["hash"]


def token_bytes(encoding):
    """How many bytes of text each id stands for: int64 array [n_vocab], 0 for special tokens."""
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    lengths = [
        0 if token in special else len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)
    ]
    return np.array(lengths, dtype=np.int64)
