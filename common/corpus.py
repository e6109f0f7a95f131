"""The prepared text of a data folder: its domains, its tokenizer, batches for training and windows for evaluation.

Batches and windows depend only on their arguments. The batch of step 812 is the same in a fresh run, in a resumed
one, and split over any number of processes, so there is no loader state to save.
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
QUESTION = {"prompt", "answer", "choices"}  # the keys of a task's row
LOSS_ON = ("text", "answers")  # the targets: all tokens, or only those of a chat's answers
RESERVED = ("all", "avg")  # they mean every domain, and the mean of their scores
REMEDY = "prepare the domain again with --overwrite=True"


def _fraction(text):
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(key):
    """ "val" for about 5% of all keys, "test" for another 5%, else "train". It does not depend on a seed: a source
    file that gives one domain test text never gives another training text, whenever the two are prepared."""
    number = int(_fraction(f"split {key}") / HELD_OUT_SHARE)
    return HELD_OUT[number] if number < len(HELD_OUT) else "train"


def check_name(name, option):
    """Raise UserError unless a domain can have this name. option: the flag that gave it."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"{option}: {name!r} cannot name a folder; use letters, digits, - and _")
    if name in RESERVED:
        raise UserError(f"{option}: {name!r} has a special meaning in lists of domains; use another name")


def in_hash_order(keys, seed):
    """The keys in an order that mixes all sources evenly and depends only on the keys and the seed."""
    return sorted(keys, key=lambda key: _fraction(f"order {seed} {key}"))


def as_targets(rows, counts):
    """Rows of T + 1 tokens as inputs and targets, each (N, T); a target whose count (N, T + 1) is 0 is IGNORE."""
    return rows[:, :-1], rows[:, 1:].masked_fill(counts[:, 1:] == 0, IGNORE)


class Corpus:
    """A folder that data/prepare.py wrote. UserError when something is missing or damaged.

    only: the domains to use, separated by commas, or all. domains: their names, sorted. metas: {domain: meta.json}.
    """

    def __init__(self, folder, only="all"):
        self.folder = folder
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        names = [name for name in names if re.fullmatch(NAME, name)]  # not "rain copy", nor .ipynb_checkpoints
        for path in [os.path.join(folder, name) for name in names]:
            if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
                raise UserError(f"{path} is not readable; change its permissions or move it away")
        self.domains = [name for name in names if os.path.exists(os.path.join(folder, name, "meta.json"))]
        if not self.domains:
            raise UserError(f"{folder} holds no data; prepare it first: python -m data.prepare --out_dir={folder}")
        if only != "all":
            self.domains = sorted(self.mixture(only))
        self.metas = {name: self.read_meta(name) for name in self.domains}

    def read_meta(self, name):
        """The meta.json of a domain."""
        path = os.path.join(self.folder, name, "meta.json")
        meta = read_json(path, REMEDY)
        whole = isinstance(meta, dict) and {"content_hash", "tokenizer_hash", *SPLITS} <= meta.keys()
        if not whole or meta.get("dtype") not in DTYPES:
            raise UserError(f"{path} is not a meta.json of this project; {REMEDY}")
        return meta

    @functools.cached_property
    def encoding(self):
        """The tiktoken.Encoding, loaded on first use: large ones take a second, and hashes do not need it."""
        return load_tokenizer(self.folder)

    @functools.cached_property
    def tokenizer_hash(self):
        """The hash of the folder's tokenizer; None if it has none."""
        return tokenizer_hash(self.folder) if has_tokenizer(self.folder) else None

    @functools.cached_property
    def token_bytes(self):
        """(V,) int64: how many bytes of text each token spells."""
        return torch.from_numpy(token_bytes(self.encoding))

    def hashes(self, domains=None):
        """{domain: hash of its text}, for some domains or all."""
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
                raise UserError(f"--domain={text}: {name} is named twice; give it one weight")
            try:
                weights[name] = float(weight or 1)
            except ValueError:
                raise UserError(f"--domain={text}: {weight!r} is not a number; write it like code:3,math:1") from None
        total = sum(weights.values())
        if not all(0 <= weight < math.inf for weight in weights.values()) or not 0 < total < math.inf:
            raise UserError(f"--domain={text}: weights must be positive numbers, such as code:3,math:1")
        return {name: weight / total for name, weight in weights.items()}

    def check_vocabulary(self, name, vocab_size):
        """Raise UserError if these domains contain ids that a model with `vocab_size` of them does not know. The
        tokenizer itself may have more: tokens that were added to it and that no text uses."""
        if self.encoding.n_vocab <= vocab_size:
            return
        for domain in self.domains:
            highest = max(int(self.tokens(domain, split, 0).max()) for split in SPLITS)
            if highest >= vocab_size:
                text = f"{domain} in {self.folder} holds token {highest}"
                raise UserError(f"{text}, but {name} has {vocab_size} entries; prepare it with the model's tokenizer")

    def tokens(self, domain, split, length):
        """The token ids of a domain's split as a memory map. UserError unless they fill a window of `length`."""
        path = os.path.join(self.folder, domain, f"{split}.bin")
        try:
            tokens = np.memmap(path, dtype=np.dtype(self.metas[domain]["dtype"]), mode="r")
        except (FileNotFoundError, ValueError) as error:  # REMEDY does not help if a network drive is gone
            raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from None
        if self.tokenizer_hash not in (None, self.metas[domain]["tokenizer_hash"]):
            folder = os.path.join(self.folder, domain)
            raise UserError(f"{folder} was prepared with another tokenizer than the one in {self.folder}; {REMEDY}")
        if len(tokens) != (count := self.metas[domain][split]["tokens"]):
            raise UserError(f"{path} has {len(tokens)} tokens, but its meta.json says {count}; copy the folder again")
        if len(tokens) <= length:
            raise UserError(
                f"{path} has {len(tokens)} tokens, but a sequence needs {length + 1}; add text or shorten "
                "--sequence_length"
            )
        return tokens

    def counts(self, domain, split, loss_on):
        """(S,) integers, one for each token of a domain's split: 1 where the loss counts it, 0 elsewhere. loss_on: see
        LOSS_ON. UserError if it asks for answers and there are none."""
        size = self.metas[domain][split]["tokens"]
        if loss_on == "text":
            return np.broadcast_to(np.uint8(1), size)
        path = os.path.join(self.folder, domain, f"{split}.answers.bin")
        if "answers" not in self.metas[domain]:
            remedy = "prepare chats with data.prepare, or train with --loss_on=text"
            raise UserError(f"--loss_on=answers: {domain} in {self.folder} has no answers; {remedy}")
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise UserError(f"{path} is missing or does not match {split}.bin in size; {REMEDY}")
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
            raise UserError(f"{domain}: its {count} windows of {split} contain no answer; raise --eval_windows")
        return inputs, targets

    def spliced(self, split, length, count):
        """About `count` windows whose first half is from one domain and whose second half is from another:
        {"code + math": (inputs, targets), ...} in both orders, each (count / pairs, length). Nothing marks the switch,
        and no text is used twice, so that all windows count as evidence. A single domain has no such windows, nor have
        two whose text is too short."""
        half = length // 2
        uses = 2 * (len(self.domains) - 1)  # of a domain: as first and as second half, with each other domain
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

    splice: the share of windows that continue, from a random place on, with another random piece of text: they change
    the subject, as ordinary text does. stage: how many runs came before this one, so that a branch does not see the
    seed model's windows again. loss_on: see LOSS_ON; other targets are IGNORE.
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
        """(2, T + 1): the tokens of a domain, starting at a place in [0, 1), and which of them count as targets."""
        start = int(place * (len(self.tokens[domain]) - self.length))
        parts = [some[domain][start : start + self.length + 1] for some in (self.tokens, self.counts)]
        return np.stack(parts).astype(np.int64)
