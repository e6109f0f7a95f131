"""The prepared text of a data folder: its domains, its tokenizer, batches for training and windows for evaluation.

Batches and windows are functions of their arguments alone. The batch of step 812 is the same in a fresh run, in a
resumed one, and split over any number of processes, so there is no loader state to save.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re

import numpy as np
import torch

from common.errors import UserError, read_json
from common.ops import IGNORE
from common.tokenizer import has_tokenizer, load_tokenizer, token_bytes, tokenizer_hash

HELD_OUT = ("val", "test")
SPLITS = ("train", *HELD_OUT)
HELD_OUT_SHARE = 0.05  # of all text, for each split of HELD_OUT
NAME = r"[\w-]+"  # of a domain
DTYPES = ("uint16", "uint32")  # of token ids
QUESTION = {"prompt", "answer", "choices"}  # what a row of a task has
LOSS_ON = ("text", "answers")  # what the targets are: all tokens, or those of a chat's answers
RESERVED = ("all", "avg")  # every domain, and the mean of their scores
REMEDY = "prepare the domain again with --overwrite=True"


def _fraction(text):
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(key):
    """ "val" for about 5% of all keys, "test" for as many, else "train". It does not depend on a seed: a source
    file that gives one domain its test text cannot give another its training text, whenever either was prepared."""
    number = int(_fraction(f"split {key}") / HELD_OUT_SHARE)
    return HELD_OUT[number] if number < len(HELD_OUT) else "train"


def check_name(name, option):
    """Raise UserError unless a domain can have this name, given by an option."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"{option}: {name!r} cannot name a folder; use letters, digits, - and _")
    if name in RESERVED:
        raise UserError(f"{option}: {name!r} has a meaning of its own where domains are named; use another name")


def in_hash_order(keys, seed):
    """The keys in an order that mixes all sources evenly and depends only on the keys and the seed."""
    return sorted(keys, key=lambda key: _fraction(f"order {seed} {key}"))


def as_targets(rows, counts):
    """Rows of T + 1 tokens as inputs and targets, each (N, T); a target whose count (N, T + 1) is 0 is IGNORE."""
    return rows[:, :-1], rows[:, 1:].masked_fill(counts[:, 1:] == 0, IGNORE)


class Corpus:
    """The folder that data/prepare.py wrote, opened once. UserError when something is missing or damaged.

    only: some of its domains, separated by commas, or all. domains: their names, sorted. metas: {domain: meta.json}.
    """

    def __init__(self, folder, only="all"):
        self.folder = folder
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        names = [name for name in names if re.fullmatch(NAME, name)]  # "rain copy" and .ipynb_checkpoints are none
        for path in [os.path.join(folder, name) for name in names]:
            if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
                raise UserError(f"{path} may not be read; change its permissions or move it away")
        self.domains = [name for name in names if os.path.exists(os.path.join(folder, name, "meta.json"))]
        if not self.domains:
            raise UserError(f"{folder} holds no data; prepare it first: python -m data.prepare --out_dir={folder}")
        if only != "all":
            self.domains = sorted(self.mixture(only))
        self.metas = {name: self.read_meta(name) for name in self.domains}

    def read_meta(self, name):
        """meta.json of a domain."""
        path = os.path.join(self.folder, name, "meta.json")
        meta = read_json(path, REMEDY)
        whole = isinstance(meta, dict) and {"content_hash", "tokenizer_hash", *SPLITS} <= meta.keys()
        if not whole or meta.get("dtype") not in DTYPES:
            raise UserError(f"{path} is no meta.json of this project; {REMEDY}")
        return meta

    @functools.cached_property
    def encoding(self):
        """The tiktoken.Encoding. Large ones take a second to load, and who asks for hashes alone needs none."""
        return load_tokenizer(self.folder)

    @functools.cached_property
    def tokenizer_hash(self):
        """What identifies the folder's tokenizer; None where it has none."""
        return tokenizer_hash(self.folder) if has_tokenizer(self.folder) else None

    @functools.cached_property
    def token_bytes(self):
        """(V,) int64: how many bytes of text each token stands for."""
        return torch.from_numpy(token_bytes(self.encoding))

    def hashes(self, domains=None):
        """{domain: hash of its text}, of some domains or all."""
        return {name: self.metas[name]["content_hash"] for name in domains or self.domains}

    def mixture(self, text):
        """'code' -> {'code': 1.0}; 'code:3,math:1' -> {'code': 0.75, 'math': 0.25}; 'all' -> every domain, evenly."""
        weights = {}
        for part in self.domains if text == "all" else text.split(","):
            name, _, weight = part.strip().partition(":")
            if name not in self.domains:
                remedy = f"python -m data.prepare --out_dir={self.folder} --domains={name}"
                have = f"{self.folder} has {', '.join(self.domains)}"
                raise UserError(f"--domain={text}: there is no domain {name!r}, {have}; prepare it: {remedy}")
            if name in weights:
                raise UserError(f"--domain={text}: {name} comes twice; give it one weight")
            try:
                weights[name] = float(weight or 1)
            except ValueError:
                raise UserError(f"--domain={text}: {weight!r} is no number; write it like code:3,math:1") from None
        total = sum(weights.values())
        if not all(0 <= weight < math.inf for weight in weights.values()) or not 0 < total < math.inf:
            raise UserError(f"--domain={text}: weights must be positive numbers, such as code:3,math:1")
        return {name: weight / total for name, weight in weights.items()}

    def check_vocabulary(self, name, vocab_size):
        """Raise UserError unless a model of so many ids knows all that occur in these domains. A tokenizer may have
        more entries: a token that was added to it and that no text needs."""
        if self.encoding.n_vocab <= vocab_size:
            return
        for domain in self.domains:
            highest = max(int(self.tokens(domain, split, 0).max()) for split in SPLITS)
            if highest >= vocab_size:
                text = f"{domain} in {self.folder} holds token {highest}"
                raise UserError(f"{text}, {name} has {vocab_size} entries; prepare the text with the model's tokenizer")

    def tokens(self, domain, split, length):
        """The token ids of one domain's split as a memory map, checked to hold at least one window of `length`."""
        path = os.path.join(self.folder, domain, f"{split}.bin")
        try:
            tokens = np.memmap(path, dtype=np.dtype(self.metas[domain]["dtype"]), mode="r")
        except (FileNotFoundError, ValueError) as error:  # a network that is gone has another remedy
            raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from None
        if self.tokenizer_hash not in (None, self.metas[domain]["tokenizer_hash"]):
            folder = os.path.join(self.folder, domain)
            raise UserError(f"{folder} was prepared with another tokenizer than {self.folder} has; {REMEDY}")
        if len(tokens) != (count := self.metas[domain][split]["tokens"]):
            raise UserError(f"{path} has {len(tokens)} tokens, meta.json beside it says {count}; copy the folder again")
        if len(tokens) <= length:
            raise UserError(
                f"{path} has {len(tokens)} tokens, a sequence needs {length + 1}; add text or shorten --sequence_length"
            )
        return tokens

    def counts(self, domain, split, loss_on):
        """(S,) integers, one for each token of a domain's split: 1 where the loss counts it, 0 elsewhere. loss_on: see
        LOSS_ON. UserError where answers are asked for and there are none."""
        size = self.metas[domain][split]["tokens"]
        if loss_on == "text":
            return np.broadcast_to(np.uint8(1), size)
        path = os.path.join(self.folder, domain, f"{split}.answers.bin")
        if "answers" not in self.metas[domain]:
            remedy = "prepare chats with data.prepare, or train with --loss_on=text"
            raise UserError(f"--loss_on=answers: {domain} in {self.folder} has no answers; {remedy}")
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise UserError(f"{path} is missing or has another size than {split}.bin; {REMEDY}")
        return np.memmap(path, dtype=np.uint8, mode="r")

    def windows(self, domain, split, length, count, loss_on="text"):
        """Up to `count` windows spread evenly over the text of a domain's split, the same for every model: inputs
        and targets, each (count, length). loss_on: see LOSS_ON; other targets are IGNORE."""
        tokens, counts = self.tokens(domain, split, length), self.counts(domain, split, loss_on)
        count = min(count, (len(tokens) - 1) // length)
        starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
        rows = (np.stack([some[start : start + length + 1] for start in starts]) for some in (tokens, counts))
        inputs, targets = as_targets(*(torch.from_numpy(some.astype(np.int64)) for some in rows))
        if (targets == IGNORE).all():
            raise UserError(f"{domain}: no answer is in its {count} windows of {split}; raise --eval_windows")
        return inputs, targets

    def spliced(self, split, length, count):
        """About `count` windows whose first half is from one domain and whose second half is from another:
        {"code + math": (inputs, targets), ...} in both orders, each (count / pairs, length). Nothing says where the
        change is, and no two halves are the same text, so that all of them count as evidence. A single domain has no
        such windows, and neither have two whose text is too short."""
        half = length // 2
        uses = 2 * (len(self.domains) - 1)  # of a domain: first and second, with each other one
        each = math.ceil(count / max(1, len(self.domains) * uses / 2))
        halves = {}
        for name in self.domains if uses else ():
            inputs, targets = self.windows(name, split, length - half, each * uses)
            rows = torch.cat((inputs, targets[:, -1:]), dim=1)  # (each uses, length - half + 1), the last a target
            halves[name] = iter([rows[use::uses] for use in range(uses)])
        found = {}
        for pair in itertools.permutations(self.domains, 2):
            first, second = (next(halves[name]) for name in pair)
            n = min(len(first), len(second))
            rows = torch.cat((first[:n, :half], second[:n]), dim=1)  # (n, length + 1)
            found.setdefault(" + ".join(sorted(pair)), []).append(rows)
        both = {pair: torch.cat(rows) for pair, rows in found.items()}
        return {pair: (rows[:, :-1], rows[:, 1:]) for pair, rows in both.items() if len(rows)}

    def problems(self, domain, split, count):
        """The first `count` questions of a domain's task: a list of {"prompt", "answer", ...}; see data/task.py."""
        path = os.path.join(self.folder, domain, f"task-{split}.jsonl")
        try:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from None
        if not rows or not all(isinstance(row, dict) and row.keys() >= QUESTION for row in rows):
            raise UserError(f"{path} lacks questions, or a question lacks {', '.join(sorted(QUESTION))}; {REMEDY}")
        return rows[:count]


class Batches:
    """Random training windows from a weighted mixture of domains: {domain: share}.

    splice: the share of windows whose second part, from a random place on, is from another draw of domain and place:
    text that changes its subject, as the text of an ordinary corpus does. stage: how many runs came before this one,
    so that a branch does not see the seed model's windows again. loss_on: see LOSS_ON; other targets are IGNORE.
    """

    def __init__(self, corpus, mixture, length, batch_size, seed, splice=0.0, stage=0, loss_on="text"):
        self.tokens = [corpus.tokens(name, "train", length) for name in mixture]
        self.counts = [corpus.counts(name, "train", loss_on) for name in mixture]
        self.weights = list(mixture.values())
        self.length, self.batch_size, self.splice = length, batch_size, splice
        self.seed = [seed, stage]

    def __call__(self, step, start, stop):
        """Rows start..stop of the batch of `step`: inputs and targets, each (stop - start, T)."""
        random, size = np.random.default_rng([*self.seed, step]), self.batch_size
        draws = [random.choice(len(self.tokens), size=size, p=self.weights), random.random(size)]
        draws += [random.choice(len(self.tokens), size=size, p=self.weights), random.random(size)]
        joints = np.where(random.random(size) < self.splice, random.integers(1, self.length + 1, size), self.length + 1)
        rows = []
        for domain, place, other, other_place, joint in list(zip(*draws, joints, strict=True))[start:stop]:
            window = self.window(domain, place)
            if joint <= self.length:
                window = np.concatenate((window[:, :joint], self.window(other, other_place)[:, joint:]), axis=1)
            rows.append(window)
        rows = torch.from_numpy(np.stack(rows))  # (stop - start, 2, T + 1)
        return as_targets(rows[:, 0], rows[:, 1])

    def window(self, domain, place):
        """(2, T + 1): the tokens of a domain from a place in [0, 1) on, and which of them count as targets."""
        start = int(place * (len(self.tokens[domain]) - self.length))
        parts = [some[domain][start : start + self.length + 1] for some in (self.tokens, self.counts)]
        return np.stack(parts).astype(np.int64)
