"""Removes held-out documents that training text also contains, found by 13-grams as for GPT-3.

A copy with a few words changed is still a copy. A document is removed if more than a fifth of its 13-grams occur
anywhere in the training text (Brown et al. 2020, appendix C, use 13-grams of words; these are of tokens).
"""

import numpy as np

LENGTH = 13
MOST = 0.2  # share of a document's 13-grams that may occur in the training text
IN_TRAIN = "are largely contained in the training text and were removed"
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is lost modulo 2^64
PIECE = 2**22  # tokens hashed at a time


def hashes(tokens):
    """A 64-bit hash of each run of 13 tokens: (S,) -> (S - 12,)."""
    tokens = tokens.astype(np.uint64)
    found = np.zeros(max(0, len(tokens) - LENGTH + 1), np.uint64)
    for place in range(LENGTH):
        found = found * FACTOR + tokens[place : place + len(found)] + np.uint64(1)  # wraps around
    return found


def seen_in(train, held_out):
    """For each hash in `held_out` (N,), whether a 13-gram of the training tokens has it. train: (S,)."""
    wanted, places = np.unique(held_out, return_inverse=True)
    seen = np.zeros(len(wanted), bool)
    for start in range(0, len(train), PIECE):
        piece = np.asarray(train[start : start + PIECE + LENGTH - 1])
        seen |= np.isin(wanted, hashes(piece))
    return seen[places]


def without_copies(train, tokens, lengths):
    """(the tokens of the documents that stay, (documents,) bools: which ones do).

    train, tokens: (S,) token ids. lengths: (documents,), the length of each document in `tokens`. A document stays if,
    including its end token, it is shorter than 13 tokens.
    """
    count = len(lengths)
    document = np.repeat(np.arange(count), lengths)  # (S,): the number of each token's document
    whole = document[: 1 - LENGTH] == document[LENGTH - 1 :]  # n-grams within one document
    of = document[: 1 - LENGTH][whole]
    seen = seen_in(train, hashes(tokens)[whole])
    shares = np.bincount(of, seen, count) / np.maximum(1, np.bincount(of, minlength=count))  # (documents,)
    stays = shares <= MOST
    return tokens[stays[document]], stays
