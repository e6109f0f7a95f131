"""A short trainer for byte-level BPE; common/tokenizer.py reads what it leaves."""

import base64
import heapq
import json
import os
from collections import Counter, defaultdict
from itertools import pairwise

import regex
import tiktoken

from common.errors import UserError, write_atomically, write_json
from common.tokenizer import END_OF_TEXT, FILE, SETTINGS, content_hash, from_ranks

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
    """Write TOKENIZER_FILES, and the same for transformers: "bpe" is trained on `texts` (strings); "gpt2" ignores texts
    and vocab_size."""
    ranks, pattern = (train_bpe(texts, vocab_size), PATTERN) if name == "bpe" else _gpt2()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    description = {
        "name": name,
        "pattern": pattern,
        "special_tokens": {END_OF_TEXT: len(ranks)},
        "vocab_size": len(ranks) + 1,
    }
    description["hash"] = content_hash(description, "".join(lines))
    write_atomically(os.path.join(folder, "tokenizer.tiktoken"), "".join(lines))
    tokenizer, settings = from_ranks(ranks, pattern, len(ranks))
    write_json(os.path.join(folder, SETTINGS), settings, indent=2)
    write_atomically(os.path.join(folder, FILE), json.dumps(tokenizer, ensure_ascii=False))
    # Last, because its presence means that the tokenizer is complete.
    write_json(os.path.join(folder, "tiktoken.json"), description, indent=2)
