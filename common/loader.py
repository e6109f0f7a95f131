"""Tokens from disk: random batches for training, fixed windows for evaluation.

Both are functions of their arguments alone. The batch of step 812 is the same in a fresh run, in a
resumed one, and split over any number of processes, so there is no loader state to save.
"""

import os

import numpy as np
import torch

from common.config import UserError, read_json
from common.split import check_splits


def read_meta(data_dir, domain):
    """meta.json of one domain, as data/prepare.py wrote it. UserError when it is missing or has no test split."""
    folder = os.path.join(data_dir, domain)
    remedy = f"prepare it: python -m data.prepare --out_dir={data_dir} --domains={domain}"
    meta = read_json(os.path.join(folder, "meta.json"), remedy)
    check_splits(meta, folder)
    return meta


def list_domains(data_dir):
    """The prepared domains of a data folder, by name."""
    names = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
    found = [name for name in names if os.path.exists(os.path.join(data_dir, name, "meta.json"))]
    if not found:
        raise UserError(f"{data_dir} holds no data; prepare it first: python -m data.prepare --out_dir={data_dir}")
    return found


def parse_mixture(text, data_dir):
    """'code' -> {'code': 1.0}; 'code:3,math:1' -> {'code': 0.75, 'math': 0.25}; 'all' -> every domain, evenly."""
    if text == "all":
        text = ",".join(list_domains(data_dir))
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"--domain={text}: {weight!r} is no number; write it like code:3,math:1") from None
    total = sum(weights.values())
    if min(weights.values()) < 0 or total == 0:
        raise UserError(f"--domain={text}: weights must be positive")
    return {name: weight / total for name, weight in weights.items()}


def read_tokens(data_dir, domain, split, sequence_length):
    """The token ids of one domain's split as a memory map, checked to hold at least one window."""
    dtype = np.dtype(read_meta(data_dir, domain)["dtype"])
    path = os.path.join(data_dir, domain, f"{split}.bin")
    try:
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); prepare the domain again with --overwrite=True") from None
    if len(tokens) <= sequence_length:
        raise UserError(
            f"{path} has {len(tokens)} tokens, a sequence needs {sequence_length + 1}; "
            "add text or shorten --sequence_length"
        )
    return tokens


def cut(tokens, starts, length):
    """Windows of `length` tokens and their next-token targets: two int64 tensors (len(starts), length)."""
    rows = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


class Batches:
    """Random training windows from a weighted mixture of domains."""

    def __init__(self, data_dir, mixture, sequence_length, batch_size, seed):
        self.tokens = [read_tokens(data_dir, name, "train", sequence_length) for name in mixture]
        self.weights = list(mixture.values())
        self.length, self.batch_size, self.seed = sequence_length, batch_size, seed

    def __call__(self, step, start, stop):
        """Rows start..stop of the batch of `step`: inputs and targets, each (stop - start, T)."""
        random = np.random.default_rng([self.seed, step])
        domains = random.choice(len(self.tokens), size=self.batch_size, p=self.weights)
        places = random.random(self.batch_size)
        rows = []
        for domain, place in zip(domains[start:stop], places[start:stop], strict=True):
            tokens = self.tokens[domain]
            rows.append(cut(tokens, [int(place * (len(tokens) - self.length))], self.length))
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def held_out_windows(data_dir, domain, split, sequence_length, count):
    """Up to `count` windows spread evenly over the text of a domain's split ("val" or "test"), the same for every
    model: inputs and targets, each (count, sequence_length)."""
    tokens = read_tokens(data_dir, domain, split, sequence_length)
    count = min(count, (len(tokens) - 1) // sequence_length)
    starts = np.linspace(0, len(tokens) - sequence_length - 1, count).astype(int)
    return cut(tokens, starts, sequence_length)
