"""Which held-out documents are copies: against sets of tuples, document by document."""

import itertools

import numpy as np
import pytest

from data import overlap
from data.overlap import LENGTH, MOST, without_copies

END = 0


def slowly(train, documents):
    """The documents that stay, by the definition: sets of 13-grams as tuples."""
    grams = {tuple(train[i : i + LENGTH]) for i in range(len(train) - LENGTH + 1)}
    stays = []
    for document in documents:
        own = [tuple(document[i : i + LENGTH]) for i in range(len(document) - LENGTH + 1)]
        if not own or sum(gram in grams for gram in own) / len(own) <= MOST:
            stays.append(document)
    return stays


@pytest.mark.parametrize("piece", [5, 64, 2**22])
def test_documents_that_stay_are_those_of_the_definition(piece, monkeypatch):
    """Documents that share nothing with the training text, a little, a fifth, most and all; in pieces of any length."""
    monkeypatch.setattr(overlap, "PIECE", piece)
    random = np.random.default_rng(1)
    train = random.integers(1, 6, 900)
    train[::50] = END
    documents = []
    for length in (1, 11, 12, 13, 14, 40, 60, 75):
        for copied in (0, 12, 13, 20, length):
            document = random.integers(1, 6, length)
            start = int(random.integers(0, 800))
            document[:copied] = train[start : start + copied][:length]
            document[document == END] = 1
            documents.append([*document.tolist(), END])
    tokens = np.array([*itertools.chain(*documents)])
    lengths = [*map(len, documents)]
    expected = slowly(train.tolist(), documents)
    found, stays = without_copies(train.astype(np.uint16), tokens.astype(np.uint16), lengths)
    assert found.tolist() == [*itertools.chain(*expected)] and 5 < stays.sum() < len(documents) - 5
    assert [document for document, stay in zip(documents, stays, strict=True) if stay] == expected


def test_a_gram_across_two_documents_is_none():
    """Training text holds the end of one document with the beginning of the next: neither goes."""
    first, second = list(range(1, 11)), list(range(11, 21))
    tokens = np.array([*first, END, *second, END])
    found, stays = without_copies(np.array([*first, END, *second]), tokens, [11, 11])
    assert found.tolist() == tokens.tolist() and stays.tolist() == [True, True]
