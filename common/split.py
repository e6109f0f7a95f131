"""Which split a document belongs to, and in which order documents are taken: by hash, never by chance.

Models learn from train; settings are chosen on val; test is for what is reported, so that no choice has seen it.
"""

import hashlib

from common.errors import UserError

HELD_OUT = ("val", "test")
SPLITS = ("train", *HELD_OUT)
HELD_OUT_SHARE = 0.05  # of all text, for each split of HELD_OUT


def _fraction(text):
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(key):
    """ "val" for about 5% of all keys, "test" for as many, else "train". It does not depend on a seed: a source
    file that gives prose its test text cannot give code its training text, whenever either was prepared."""
    number = int(_fraction(f"split {key}") / HELD_OUT_SHARE)
    return HELD_OUT[number] if number < len(HELD_OUT) else "train"


def in_hash_order(keys, seed):
    """The keys in an order that mixes all sources evenly and depends only on the keys and the seed."""
    return sorted(keys, key=lambda key: _fraction(f"order {seed} {key}"))


def check_splits(meta, folder):
    """UserError when `meta`, the meta.json of a domain's folder, is from before there was a test split."""
    if "test" not in meta:
        raise UserError(
            f"{folder} was prepared without a test split; prepare it again with --overwrite=True or another --out_dir"
        )
