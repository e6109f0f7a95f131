"""How much held-out text a model could know by heart: what of it stands in the training text word for word.

    python -m study.overlap --data_dir=out/cpu/data

Splits are made by document, which keeps no sentence from standing in two documents. This counts them: of the held-out
text's stretches of 8, 16 and 32 tokens, the share that its domain's training text also holds; of its windows (the unit
of bits per byte), the share that is mostly copies; of its questions, the share that was asked in training in the same
words. Writes overlap.json and overlap.md.
"""

import dataclasses
import os

import numpy as np

from common.config import key, parse
from common.corpus import HELD_OUT, Corpus
from common.errors import command, write_atomically, write_json
from study.tables import markdown_table

LENGTHS = (8, 16, 32)  # tokens in a stretch
COPY = 16  # the length at which a window counts as mostly copies
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2^64


@dataclasses.dataclass
class OverlapConfig:
    """Count what of the held-out text also stands in the training text."""

    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    out_dir: str = key("out/cpu/report", "where overlap.json and overlap.md go")
    split: str = key("test", "held-out text to look at", HELD_OUT)
    sequence_length: int = key(256, "tokens per window", within="[32, inf)")


def stretches(tokens, length):
    """A 64-bit number for each stretch of `length` tokens: (N,) -> (N - length + 1,) uint64, equal for equal stretches.

    (A polynomial in BASE. Two different stretches among 10 million agree by chance once in about 400,000 corpora.)
    """
    tokens = np.asarray(tokens).astype(np.uint64) + np.uint64(1)
    numbers = np.zeros(max(0, len(tokens) - length + 1), dtype=np.uint64)
    for offset in range(length):
        numbers = numbers * BASE + tokens[offset : offset + len(numbers)]  # wraps around, as it should
    return numbers


def known(train, held_out, length):
    """Which of the held-out text's stretches the training text holds: (N - length + 1,) bool."""
    return np.isin(stretches(held_out, length), np.unique(stretches(train, length)))


def share_of_copies(in_training, window):
    """The share of windows of `window` tokens in which more than half of the stretches stand in the training text."""
    count = len(in_training) // window
    if not count:
        return 0.0
    return float((in_training[: count * window].reshape(count, window).mean(axis=1) > 0.5).mean())


def share_asked(corpus, domain, split, train):
    """The share of a domain's questions that its training text asks in the same words; None without a task."""
    if "task" not in corpus.metas[domain]:
        return None
    text = corpus.encoding.decode_bytes(train.tolist())
    prompts = [row["prompt"].encode() for row in corpus.problems(domain, split, None)]
    return sum(prompt in text for prompt in prompts) / len(prompts)


def overlap(corpus, domain, split, window):
    """One domain's row: {"stretches": {length: share}, "copies": share of windows, "questions": share or None}."""
    train, held_out = (corpus.tokens(domain, name, window) for name in ("train", split))
    found = {length: known(train, held_out, length) for length in LENGTHS}
    return {
        "stretches": {str(length): float(one.mean()) for length, one in found.items()},
        "copies": share_of_copies(found[COPY], window),
        "questions": share_asked(corpus, domain, split, train),
    }


def overlap_table(rows):
    header = [
        "domain",
        *(f"{length} tokens" for length in LENGTHS),
        "windows mostly copied",
        "questions asked in training",
    ]
    body = []
    for name, row in rows.items():
        asked = "-" if row["questions"] is None else f"{row['questions']:.1%}"
        body.append([name, *(f"{share:.1%}" for share in row["stretches"].values()), f"{row['copies']:.1%}", asked])
    return markdown_table(header, body)


def main():
    config = parse(OverlapConfig)
    corpus = Corpus(config.data_dir)
    rows = {name: overlap(corpus, name, config.split, config.sequence_length) for name in corpus.domains}
    table = overlap_table(rows)
    os.makedirs(config.out_dir, exist_ok=True)
    write_json(os.path.join(config.out_dir, "overlap.json"), {"rows": rows, "config": dataclasses.asdict(config)})
    write_atomically(
        os.path.join(config.out_dir, "overlap.md"), f"# Held-out text that is also in training\n\n{table}\n"
    )
    print(table)


if __name__ == "__main__":
    command(main)
