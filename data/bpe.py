"""A short trainer for byte-level BPE, and the files it writes; common/tokenizer.py reads them.

Each tokenizer is written twice: in tiktoken's format, and as the tokenizer.json of Hugging Face's `tokenizers`, so that
AutoTokenizer gives the same ids.
"""

import base64
import heapq
import json
import os
from collections import Counter, defaultdict
from itertools import pairwise

import regex
from tqdm import tqdm

from common.errors import UserError, write_atomically, write_json
from common.tokenizer import END_OF_TEXT, FILE, SETTINGS, byte_characters, content_hash

# Tokens do not cross the boundaries of these pieces. In this order: a line break with the blank lines and
# the indentation around it; a word, with one space, dot or underscore before it; a single digit, so that numbers
# always look the same; a run of punctuation; any other space, leaving the last one to the next word.
PATTERN = r"\s*\n\s*|[ ._]?\p{L}+|[0-9]| ?[^\s\p{L}0-9]+|\s+(?!\S)|\s"

# The same for counting, with long runs cut: otherwise text without spaces would be one word of a million letters. The
# limits are above anything in ordinary text.
LONGEST_WORD, LONGEST_RUN = 64, 256
COUNTED = (
    PATTERN.replace(r"\p{L}+", rf"\p{{L}}{{1,{LONGEST_WORD}}}")
    .replace("0-9]+", f"0-9]{{1,{LONGEST_RUN}}}")
    .replace(r"\s+", rf"\s{{1,{LONGEST_RUN}}}")
    .replace(r"\s*", rf"\s{{0,{LONGEST_RUN}}}")
)
LONG = 20  # characters: there may be no end of different longer words, such as the lines of a genome,
LONG_BYTES = 2**16  # so no more of them than this are counted


def count_words(texts):
    """{word: how often it occurs in the texts}, in order of first occurrence."""
    frequency = Counter()
    for text in texts:
        frequency.update(regex.findall(COUNTED, text))
    room = LONG_BYTES
    for word in [word for word in frequency if len(word) > LONG]:
        room -= len(word.encode())
        if room < 0:
            del frequency[word]
    return frequency


def _merge(symbols, target):
    """Join every two neighbours that spell `target`, from left to right."""
    merged = []
    for symbol in symbols:
        if merged and merged[-1] + symbol == target:
            merged[-1] = target
        else:
            merged.append(symbol)
    return merged


def train_bpe(texts, vocab_size):
    """Learn byte-pair merges from an iterable of strings.

    Returns ranks: {token bytes: id}, ids 0..vocab_size-2 (the 256 bytes first, then the merges in the
    order learned); the last id of the vocabulary is reserved for END_OF_TEXT. Each merge takes the most
    frequent pair of neighbours or, of equally frequent ones, the first in byte order. A pair is
    identified by the bytes it spells, as in tiktoken's encoding.

    vocab_size is 257 or more. Raises UserError if the text has too few pairs for it.
    """
    frequency = count_words(texts)
    words = [[bytes([byte]) for byte in word.encode()] for word in frequency]
    frequency = list(frequency.values())

    counts = Counter()  # pair -> how often it occurs in the text
    places = defaultdict(set)  # pair -> the words it occurs, or once occurred, in

    def count_pairs(index, sign, counts):
        for left, right in pairwise(words[index]):
            counts[left + right] += sign * frequency[index]
            places[left + right].add(index)

    for index in range(len(words)):
        count_pairs(index, +1, counts)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    ranks = {bytes([byte]): byte for byte in range(256)}
    bar = tqdm(total=vocab_size - 1, initial=256, desc="learning merges", leave=False, disable=None)
    while len(ranks) < vocab_size - 1:
        if not heap:
            raise UserError(
                f"vocab_size={vocab_size} is too large for so little text; use --vocab_size={len(ranks) + 1} or less"
            )
        count, target = heapq.heappop(heap)
        if -count != counts[target] or not count:
            continue  # the count has changed since; a newer entry is in the heap
        ranks.setdefault(target, len(ranks))
        bar.update(len(ranks) - bar.n)
        change = Counter()
        for index in places.pop(target):
            count_pairs(index, -1, change)
            words[index] = _merge(words[index], target)
            count_pairs(index, +1, change)
        for pair, difference in change.items():
            if difference:
                counts[pair] += difference
                heapq.heappush(heap, (-counts[pair], pair))
    bar.close()
    return ranks


# ---- writing ----


def last_merge(token, ranks):
    """The two tokens that byte-pair encoding merges last to spell `token` (bytes); None if it never gets there."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        place = min(range(len(joined)), key=joined.__getitem__)
        if joined[place] >= ranks[token]:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def from_ranks(ranks):
    """The contents of tokenizer.json and tokenizer_config.json for the ranks of train_bpe."""
    spelled = {token: "".join(byte_characters()[byte] for byte in token) for token in ranks}
    merges = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {"id": len(ranks), "content": END_OF_TEXT, "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "BPE"}
    model |= dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    model |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    model["vocab"] = {spelled[token]: number for token, number in ranks.items()}
    model["merges"] = [[spelled[part] for part in merge] for merge in merges if merge]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,  # as usual with GPT-2: no id is free for another token
        "padding_side": "left",  # generation continues at the right
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return tokenizer, settings


def save_tokenizer(folder, vocab_size, texts):
    """Train a tokenizer of vocab_size entries on `texts` (strings), and write it to a folder in both formats."""
    ranks = train_bpe(texts, vocab_size)
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    description = {
        "name": "bpe",
        "pattern": PATTERN,
        "special_tokens": {END_OF_TEXT: len(ranks)},
        "vocab_size": vocab_size,
    }
    description["hash"] = content_hash(description, lines)
    write_atomically(os.path.join(folder, "tokenizer.tiktoken"), lines)
    tokenizer, settings = from_ranks(ranks)
    write_json(os.path.join(folder, SETTINGS), settings, indent=2)
    write_atomically(os.path.join(folder, FILE), json.dumps(tokenizer, ensure_ascii=False))
    # Last, because its presence means that the tokenizer is complete.
    write_json(os.path.join(folder, "tiktoken.json"), description, indent=2)
