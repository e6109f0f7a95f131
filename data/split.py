"""Which split a document belongs to, and in which order documents are taken: by hash, never by chance."""

import hashlib

VALIDATION_SHARE = 0.05


def _fraction(text):
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(key):
    """ "val" for about 5% of all keys, else "train". It does not depend on a seed: a source file that
    gives prose its validation text cannot give code its training text, whenever either was prepared."""
    return "val" if _fraction(f"split {key}") < VALIDATION_SHARE else "train"


def in_hash_order(keys, seed):
    """The keys in an order that mixes all sources evenly and depends only on the keys and the seed."""
    return sorted(keys, key=lambda key: _fraction(f"order {seed} {key}"))
