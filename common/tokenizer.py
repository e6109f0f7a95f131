"""The tokenizer: a short trainer for byte-level BPE, used through tiktoken.

A folder with `tiktoken.json` and `tokenizer.tiktoken` (tiktoken's own rank format) is a
tokenizer: data folders hold one, and every checkpoint carries a copy.
"""

import base64
import hashlib
import heapq
import json
import os
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import regex
import tiktoken

from common.config import UserError, read_json, write_atomically

TOKENIZER_FILES = ("tiktoken.json", "tokenizer.tiktoken")
END_OF_TEXT = "<|endoftext|>"

# What a token may not cross. In this order: a line break with the blank lines and the indentation
# around it; a word, with the one space, dot or underscore before it; a single digit, so that numbers
# always look the same; a run of punctuation; any other space, leaving the last one to the next word.
PATTERN = r"\s*\n\s*|[ ._]?\p{L}+|[0-9]| ?[^\s\p{L}0-9]+|\s+(?!\S)|\s"


def _merge(symbols, target):
    """Join every two neighbours that spell `target`, from left to right."""
    merged, position = [], 0
    while position < len(symbols):
        joined = b"".join(symbols[position : position + 2])
        pair = joined == target and len(symbols) - position > 1
        merged.append(joined if pair else symbols[position])
        position += 2 if pair else 1
    return merged


def train_bpe(texts, vocab_size):
    """Learn byte-pair merges from an iterable of strings.

    Returns ranks: {token bytes: id}, ids 0..vocab_size-2 (the 256 bytes first, then the merges in the
    order learned); the last id of the vocabulary is left to END_OF_TEXT. Each merge takes the most
    frequent pair of neighbours; of equally frequent ones the first in byte order. A pair is
    identified by the bytes it spells, as tiktoken does when it encodes.

    vocab_size is 257 or more. Raises UserError when the text has too few pairs for it.
    """
    frequency = Counter()
    for text in texts:
        frequency.update(regex.findall(PATTERN, text))
    words = [[bytes([byte]) for byte in word.encode()] for word in frequency]
    frequency = list(frequency.values())

    counts = Counter()  # pair -> how often it occurs in the text
    places = defaultdict(set)  # pair -> the words it occurs, or once occurred, in

    def count_pairs(index, sign):
        symbols = words[index]
        pairs = [left + right for left, right in pairwise(symbols)]
        for pair in pairs:
            counts[pair] += sign * frequency[index]
            places[pair].add(index)
        return pairs

    for index in range(len(words)):
        count_pairs(index, +1)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size - 1:
        if not heap:
            raise UserError(
                f"vocab_size={vocab_size} is too large for this little text; --vocab_size={len(ranks) + 1} or less"
            )
        count, target = heapq.heappop(heap)
        if -count != counts[target] or not count:
            continue  # the count has changed since; a newer entry is in the heap
        ranks.setdefault(target, len(ranks))
        changed = set()
        for index in places.pop(target):
            changed.update(count_pairs(index, -1))
            words[index] = _merge(words[index], target)
            changed.update(count_pairs(index, +1))
        for pair in changed:
            heapq.heappush(heap, (-counts[pair], pair))
    return ranks


def _gpt2():
    """The ranks and the pattern of GPT-2's tokenizer, downloaded and cached by tiktoken."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(
            f"the gpt2 tokenizer could not be downloaded ({reason}); set TIKTOKEN_CACHE_DIR to a folder that has "
            "it, or train one here with --tokenizer=bpe"
        ) from None
    return encoding._mergeable_ranks, encoding._pat_str


def save_tokenizer(folder, name, vocab_size, texts):
    """Write TOKENIZER_FILES: "bpe" is trained on `texts` (strings); "gpt2" ignores texts and vocab_size."""
    ranks, pattern = (train_bpe(texts, vocab_size), PATTERN) if name == "bpe" else _gpt2()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    description = {
        "name": name,
        "pattern": pattern,
        "special_tokens": {END_OF_TEXT: len(ranks)},
        "vocab_size": len(ranks) + 1,
    }
    description["hash"] = _hash(description, "".join(lines))
    write_atomically(os.path.join(folder, "tokenizer.tiktoken"), "".join(lines))
    # Last, because its presence means that the tokenizer is complete.
    write_atomically(os.path.join(folder, "tiktoken.json"), json.dumps(description, indent=2) + "\n")


def _hash(description, rank_lines):
    content = [description["pattern"], description["special_tokens"], rank_lines]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_tokenizer(folder):
    """The tiktoken.Encoding of a data or checkpoint folder. UserError when a file is missing or damaged."""
    remedy = "prepare the data first (python -m data.prepare), or copy both tokenizer files from where it was prepared"
    description = read_json(os.path.join(folder, "tiktoken.json"), remedy)
    path = os.path.join(folder, "tokenizer.tiktoken")
    try:
        with open(path) as file:
            text = file.read()
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or cannot be read; {remedy}") from None
    if _hash(description, text) != description["hash"]:
        raise UserError(f"{path} does not belong to the tiktoken.json next to it; {remedy}")
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
    return read_json(os.path.join(folder, "tiktoken.json"), "prepare the data first (python -m data.prepare)")["hash"]


def token_bytes(encoding):
    """How many bytes of text each id stands for: int64 array [n_vocab], 0 for special tokens."""
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    lengths = [
        0 if token in special else len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)
    ]
    return np.array(lengths, dtype=np.int64)
