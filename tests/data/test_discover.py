"""data/discover.py: equal shares against brute force, and clusters of text whose kinds are known."""

import itertools
import os
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import SHAPE, SHORT, error_line, must, read, read_json, run, tokens_of

from common.corpus import SPLITS
from common.errors import write_json
from common.tokenizer import load_tokenizer
from data.discover import balanced, closeness, find_clusters

FAST = "--features=16", "--sample=1000"


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn")


@pytest.fixture
def source(data, tmp_path):
    """The tiny pipeline's text, math cut down to as many training tokens as rain has. Its last document has no end."""
    folder = tmp_path / "source"
    shutil.copytree(data, folder)
    tokens = tokens_of(data, "math", "train")[: len(tokens_of(data, "rain", "train"))]
    ends = np.flatnonzero(tokens == load_tokenizer(data).eot_token)
    tokens[: ends[-1]].astype("uint16").tofile(folder / "math" / "train.bin")
    meta = read_json(folder / "math" / "meta.json")
    meta["train"] |= {"documents": len(ends), "tokens": int(ends[-1])}
    write_json(folder / "math" / "meta.json", meta)
    return folder


@pytest.fixture
def discover(source, tmp_path):
    def discover(*flags, out="out"):
        return run("data/discover.py", f"--data_dir={source}", f"--out_dir={tmp_path}/{out}", *FAST, *flags)

    return discover


def documents_of(folder, domain, split):
    """How often each document is in a split, read token by token."""
    end = load_tokenizer(folder).eot_token
    found, current = Counter(), []
    for token in tokens_of(folder, domain, split).tolist():
        current.append(token)
        if token == end:
            found[tuple(current)] += 1
            current = []
    return found + Counter([tuple(current)] if current else [])


def files_of(folder):
    return {
        os.path.relpath(os.path.join(where, name), folder): read(os.path.join(where, name))
        for where, _, names in os.walk(folder)
        for name in names
    }


# ---- equal shares ----


def best_sum(scores):
    """The highest sum of any assignment to clusters of equal size."""
    n, K = scores.shape
    equal = set(itertools.permutations([k for k in range(K) for _ in range(n // K)]))
    return max(scores[np.arange(n), list(found)].sum() for found in equal)


@pytest.mark.parametrize("seed", range(5))
def test_two_clusters_are_the_best_of_all(seed):
    scores = np.random.default_rng(seed).normal([1, 0], size=(8, 2))
    found = balanced(scores)
    assert np.bincount(found).tolist() == [4, 4]
    assert scores[np.arange(8), found].sum() == pytest.approx(best_sum(scores))


def test_three_clusters_are_near_the_best():
    random = np.random.default_rng(0)
    lost = []
    for _ in range(20):
        scores = random.normal([2, 0, 0], size=(6, 3))
        found = balanced(scores)
        assert np.bincount(found).tolist() == [2, 2, 2]
        lost.append(best_sum(scores) - scores[np.arange(6), found].sum())
    assert min(lost) > -1e-9 and np.mean(lost) < 0.25  # taking documents as they come loses 1.4


def test_who_would_lose_most_chooses_first():
    scores = np.array([[5, 4, 0], [9, 1, 0], [6, 1, 5]], float)  # all want the first
    assert balanced(scores).tolist() == [1, 0, 2]


def test_all_in_one_place_are_dealt_evenly():
    points = np.ones((4000, 3))
    assert np.bincount(balanced(closeness(points, np.eye(8, 3)))).tolist() == [500] * 8


def test_the_nearest_centre():
    random = np.random.default_rng(0)
    points, centres = random.normal(size=(50, 4)), random.normal(size=(3, 4))
    distances = np.linalg.norm(points[:, None] - centres, axis=2)
    assert (closeness(points, centres).argmax(axis=1) == distances.argmin(axis=1)).all()


# ---- clusters ----


def test_few_long_documents_are_a_cluster(sklearn):
    """Of the documents 3 % are of the one kind, of the tokens a half: equal numbers of documents would split the
    other kind."""
    random = np.random.default_rng(0)
    words = [*(f"rain{i}" for i in range(20)), *(f"Sum{i}" for i in range(20)), "and", "5th", "."]
    encoding = SimpleNamespace(eot_token=len(words), decode=lambda ids: " ".join(words[i] for i in ids))
    draws = [((0, 20), 980, 6), ((20, 40), 28, 200)]
    long, short = ([random.integers(*ids, length) for _ in range(n)] for ids, length, n in draws)
    documents = [np.append(ids, [40, 41, 42, len(words)]) for ids in [*long, *short]]
    config = SimpleNamespace(clusters=2, features=10, sample=500, method="tfidf", seed=0, domains="all")
    found, terms = find_clusters(config, encoding, {"train": documents, "val": documents[::-1]})
    first = [found["train"][0]] * 6
    assert found["train"].tolist() == first + [1 - first[0]] * 200
    assert found["val"].tolist() == found["train"].tolist()[::-1]
    kinds = [{term.rstrip("0123456789") for term in own} for own in terms]
    assert kinds[first[0]] == {"rain"} and kinds[1 - first[0]] == {"sum"}  # no "and", "5th"
    assert [len(own) for own in terms] == [10, 10]


def test_two_kinds_of_text(sklearn, discover, source, tmp_path):
    out = must(discover("--clusters=2")).out
    report = read_json(tmp_path / "out" / "discover.json")
    assert report["nmi"] == 1 and "1.000" in out
    shares = [cluster["shares"] for cluster in report["clusters"].values()]
    assert sorted(map(str, shares)) == ["{'math': 0.0, 'rain': 1.0}", "{'math': 1.0, 'rain': 0.0}"]
    sizes = [cluster["tokens"] for cluster in report["clusters"].values()]
    assert sizes == sorted(sizes, reverse=True)
    encoding = load_tokenizer(source)
    for name, cluster in report["clusters"].items():
        assert len(cluster["terms"]) >= 8 and all(term in out for term in cluster["terms"])  # rain has no more words
        [domain] = [domain for domain, share in cluster["shares"].items() if share == 1]
        old, new = (
            read_json(os.path.join(*path, "meta.json")) for path in ((source, domain), (tmp_path / "out", name))
        )
        for split in SPLITS:
            assert documents_of(source, domain, split) == documents_of(tmp_path / "out", name, split)
            assert [new[split][key] for key in ("documents", "tokens")] == [
                old[split][key] for key in ("documents", "tokens")
            ]
            text = encoding.decode(tokens_of(source, domain, split).tolist()).replace("<|endoftext|>", "")
            assert new[split]["bytes"] == len(text.encode())
        assert (new["dtype"], new["tokenizer_hash"]) == (old["dtype"], old["tokenizer_hash"])
    folders = f"--data_dir={tmp_path}/out", f"--out_dir={tmp_path}/expert"
    must(run("train.py", *SHAPE, *SHORT, "--max_steps=2", "--domain=c1", *folders))


def test_nothing_is_lost_and_nothing_is_there_twice(sklearn, discover, source, tmp_path):
    """Of three clusters, and of the control, whose clusters are as large but of no kind."""
    old = [(source, "math"), (source, "rain")]
    sizes, nmi = {}, {}
    for method in ("tfidf", "random"):
        must(discover("--clusters=3", "--sequence_length=32", f"--method={method}", out=method))
        new = [(tmp_path / method, f"c{k}") for k in range(3)]
        for split in SPLITS:
            ids = [np.concatenate([tokens_of(*place, split) for place in places]) for places in (old, new)]
            assert (np.bincount(ids[0]) == np.bincount(ids[1])).all()
            metas = [
                [read_json(folder / name / "meta.json")[split] for folder, name in places] for places in (old, new)
            ]
            assert sum(meta["documents"] for meta in metas[0]) == sum(meta["documents"] for meta in metas[1])
            sizes[method, split] = sorted(meta["tokens"] for meta in metas[1])
            if split != "train":  # where one document has no end
                before, after = (
                    sum((documents_of(*place, split) for place in places), Counter()) for places in (old, new)
                )
                assert before == after
        nmi[method] = read_json(tmp_path / method / "discover.json")["nmi"]
    for split in SPLITS:
        longest = max(len(ids) for place in old for ids in documents_of(*place, split))
        assert np.abs(np.subtract(sizes["tfidf", split], sizes["random", split])).max() <= longest
    assert nmi["random"] < 0.2 < 0.5 < nmi["tfidf"]


def test_the_same_command_makes_the_same_bits(sklearn, discover, tmp_path):
    flags = "--clusters=3", "--sequence_length=32"
    must(discover(*flags))
    must(discover(*flags, out="again"))
    first = files_of(tmp_path / "out")
    assert first == files_of(tmp_path / "again")
    assert "already there, kept" in must(discover(*flags)).out
    assert "other settings (seed)" in error_line(discover(*flags, "--seed=1"))
    assert files_of(tmp_path / "out") == first
    write_json(
        tmp_path / "again" / "discover.json", {"recipe": read_json(tmp_path / "out" / "discover.json")["recipe"]}
    )
    os.remove(tmp_path / "again" / "c1" / "meta.json")  # as a kill may leave it
    assert "kept" not in must(discover(*flags, out="again")).out
    assert files_of(tmp_path / "again") == first
    must(discover("--clusters=2", "--overwrite"))
    assert {"c0", "c1"} <= {*os.listdir(tmp_path / "out")} and not (tmp_path / "out" / "c2").exists()


# ---- errors ----


def test_too_many_clusters(sklearn, discover, tmp_path):
    assert "ask for fewer clusters" in error_line(discover("--clusters=100000"))
    line = error_line(discover("--clusters=2", "--sequence_length=6000"))
    assert "a sequence needs 6001; ask for fewer clusters" in line and "val of one cluster" in line
    assert not (tmp_path / "out").exists()


def test_without_the_package(discover, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert "needs the package scikit-learn; pip install -r" in error_line(discover())
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(discover, source, tmp_path):
    assert "no domain 'rian'" in error_line(discover("--domains=rian"))
    assert "choose another" in error_line(
        run("data/discover.py", f"--data_dir={source}", f"--out_dir={source}/", "--overwrite")
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "files that data.discover did not write" in error_line(discover("--overwrite"))
