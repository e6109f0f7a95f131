"""Domains without labels, as in cluster-Branch-Train-Merge (Gururangan et al. 2023, arXiv 2303.14177, section 3.1).

    python -m data.prepare --domains=mine=~/text --out_dir=out/mine/data      # first, raw text becomes one domain
    python -m data.discover --data_dir=out/mine/data --clusters=4 --out_dir=out/mine/clusters-4

writes a data folder like data/prepare.py's, with the same tokenizer, the domains c0 (most tokens), c1, ..., and
discover.json, which describes them. The end-of-text token separates documents; each goes to one cluster as a whole,
with its ids unchanged.

A document is represented by the tf-idf weights of its words, reduced by a truncated SVD and scaled to length 1. While
centres are fitted, clusters have equal sizes; afterwards each document, held-out ones too, joins the nearest centre.
Two things are ours: documents to fit on are drawn in proportion to their tokens, so that clusters are equal in tokens
(if they were equal in documents, a domain of few, long ones would never be found); and the closest fit of several
starts is used. Needs the package scikit-learn.
"""

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from common.config import key, parse
from common.corpus import HELD_OUT, SPLITS, Corpus
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.hf import copy_tokenizer
from common.run import differing_settings, locked
from data.prepare import token_dtype

WORD = r"(?u)\b[^\W\d]\w+\b"  # two characters or more, the first one not a digit
ITERATIONS = 20
STARTS = 8  # of which the closest fit is used
CHUNK = 10_000  # documents weighed at a time
TOP_TERMS = 10
REPORT = "discover.json"


@dataclass
class DiscoverConfig:
    """Find domains in prepared text by clustering its documents."""

    data_dir: str = key("out/cpu/data", "the folder with the prepared text")
    domains: str = key("all", "the domains to take documents from, separated by commas, or all")
    out_dir: str = key("out/cpu/clusters", "the folder for the clusters, which becomes a data folder")
    clusters: int = key(4, "how many clusters to make", within="[2, inf)")
    method: str = key(
        "tfidf", "random, the control, assigns documents to clusters of the same sizes", choices=("tfidf", "random")
    )
    features: int = key(100, "dimensions after the SVD", within="[1, inf)")
    sample: int = key(20_000, "how many training documents to fit on at most", within="[2, inf)")
    sequence_length: int = key(256, "tokens that each split of a cluster must have at least", within="[1, inf)")
    seed: int = key(0, "random seed: which documents to fit on, and where centres start", within="[0, 4294967295]")
    overwrite: bool = key(False, "discard clusters that already exist")


def closeness(points, centres):
    """(n, d) and (K, d) -> (n, K), highest at the nearest centre: |p - c|^2 = |p|^2 - 2 (p c - |c|^2 / 2)."""
    return points @ centres.T - (centres**2).sum(axis=1) / 2


def balanced(scores):
    """Assign documents to clusters of equal size, greedily by regret: (n, K) scores, K divides n -> (n,) clusters.

    Documents that would lose most by their second choice choose first. When a cluster is full, those left choose again
    among the rest: at most K rounds, O(K n (K + log n)). The sum of scores is optimal for K = 2, else nearly so.
    """
    n, K = scores.shape
    found, room, left = np.full(n, -1), np.full(K, n // K), np.arange(n)
    while len(left):
        wishes = np.where(room > 0, scores[left], -np.inf)
        second, first = np.partition(wishes, K - 2, axis=1)[:, -2:].T
        order = np.argsort(second - first, kind="stable")
        left, choice = left[order], wishes.argmax(axis=1)[order]
        taken = (choice[:, None] == np.arange(K)).cumsum(axis=0)  # (len(left), K), up to and with each document
        fits = (taken <= room).all(axis=1).sum()
        found[left[:fits]] = choice[:fits]
        room -= taken[fits - 1]
        left = left[fits:]
    return found


def balanced_means(points, centres):
    """K-means with equal sizes, starting from centres (K, d): (how close points are on average, the final centres)."""
    found = None
    for _ in range(ITERATIONS):
        before, found = found, balanced(closeness(points, centres))
        if np.array_equal(before, found):
            break
        centres = np.stack([points[found == k].mean(axis=0) for k in range(len(centres))])
    return float(closeness(points, centres)[np.arange(len(points)), found].mean()), centres


def fit(texts, draws, config):
    """(words, the texts' weights (n, words), a function from other texts to their clusters (n,)), fitted on `texts`.
    draws: (S,) indices of texts, where K divides S; a text counts as often as its index occurs."""
    from sklearn.cluster import kmeans_plusplus
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    tfidf = TfidfVectorizer(stop_words="english", token_pattern=WORD, dtype=np.float32)
    try:
        weights = tfidf.fit_transform(texts)
    except ValueError:  # an empty vocabulary
        raise UserError(f"--domains={config.domains}: no document has any usable words; choose others") from None
    svd = TruncatedSVD(min(config.features, *weights.shape), random_state=config.seed)
    points = normalize(svd.fit_transform(weights))[draws]
    random = np.random.RandomState(config.seed)
    starts = (kmeans_plusplus(points, config.clusters, random_state=random)[0] for _ in range(STARTS))
    _, centres = max((balanced_means(points, start) for start in starts), key=lambda found: found[0])

    def assign(texts):
        return closeness(normalize(svd.transform(tfidf.transform(texts))), centres).argmax(axis=1)

    return tfidf.get_feature_names_out(), weights, assign


def read_documents(corpus, split):
    """The documents of a split, a list of (tokens,) arrays, and the index of each one's domain, (n,)."""
    documents, labels = [], []
    for label, name in enumerate(corpus.domains):
        tokens = np.asarray(corpus.tokens(name, split, 0))
        ends = np.flatnonzero(tokens == corpus.encoding.eot_token) + 1
        pieces = [piece for piece in np.split(tokens, ends) if len(piece)]  # the last one may have no end token
        documents += pieces
        labels += [label] * len(pieces)
    return documents, np.array(labels)


def shuffled(found, documents, K, random):
    """Assign documents at random, nearly keeping the number of tokens in each of K clusters: (n,) -> (n,)."""
    lengths = np.array([len(ids) for ids in documents])
    order = random.permutation(len(lengths))
    middles = np.cumsum(lengths[order]) - lengths[order] / 2
    dealt = np.empty_like(found)
    dealt[order] = np.searchsorted(np.cumsum(np.bincount(found, lengths, K)), middles)
    return dealt


def find_clusters(config, encoding, documents):
    """({split: (n,), the cluster of each document}, the top terms of each cluster)."""

    def spell(rows):
        return [encoding.decode(ids[ids != encoding.eot_token].tolist()) for ids in rows]

    K, random, train = config.clusters, np.random.default_rng(config.seed), documents["train"]
    if (most := min(len(train), config.sample)) < K:
        raise UserError(f"--clusters={K}: there are only {most} documents to fit on; ask for fewer clusters")
    lengths = [len(ids) for ids in train]
    draws = config.sample // K * K
    places = (np.arange(draws) + random.random()) * sum(lengths) / draws  # evenly spaced tokens
    drawn = np.searchsorted(np.cumsum(lengths), places.astype(int), side="right")
    drawn, draws = np.unique(drawn, return_inverse=True)
    words, weights, assign = fit(spell(train[i] for i in drawn), draws, config)
    parts = {split: range(0, len(rows), CHUNK) for split, rows in documents.items()}
    found = {
        split: np.concatenate([assign(spell(documents[split][start : start + CHUNK])) for start in starts])
        for split, starts in parts.items()
    }
    if config.method == "random":
        found = {split: shuffled(own, documents[split], K, random) for split, own in found.items()}
    rank = np.argsort(np.argsort(-np.bincount(found["train"], lengths, K), kind="stable"))  # the largest first
    found = {split: rank[own] for split, own in found.items()}
    sums = [np.asarray(weights[found["train"][drawn] == k].sum(axis=0)).ravel() for k in range(K)]
    return found, [[words[i] for i in np.argsort(-row, kind="stable")[:TOP_TERMS] if row[i] > 0] for row in sums]


def write_cluster(folder, documents, corpus, about):
    """Write a domain's folder, meta.json last. documents: {split: list of (tokens,) arrays}."""
    os.makedirs(folder)
    dtype, digest, counts = token_dtype(corpus.encoding), hashlib.sha256(), {}
    for split, rows in documents.items():
        tokens = np.concatenate(rows).astype(dtype)
        size = int(corpus.token_bytes.numpy()[tokens].sum())
        counts[split] = {"documents": len(rows), "tokens": len(tokens), "bytes": size}
        digest.update(split.encode() + tokens.tobytes())
        write_atomically(os.path.join(folder, f"{split}.bin"), tokens.tobytes())
    hashes = {"content_hash": digest.hexdigest(), "tokenizer_hash": corpus.tokenizer_hash}
    write_json(os.path.join(folder, "meta.json"), {**about, **counts, "dtype": dtype, **hashes}, indent=2)


def finished(config, recipe):
    """The discover.json of out_dir if it already has these clusters, else None; UserError if it has others."""
    path, remedy = os.path.join(config.out_dir, REPORT), "use --overwrite=True or another --out_dir"
    if not os.path.exists(path) and set(os.listdir(config.out_dir)) - {f"{REPORT}.tmp"}:  # left by a kill
        raise UserError(f"{config.out_dir} holds files that data.discover did not write; choose another --out_dir")
    if not os.path.exists(path) or config.overwrite:
        return None
    report = read_json(path, remedy)
    if differing := differing_settings(report.get("recipe", {}), recipe):
        raise UserError(f"{config.out_dir} holds clusters made with other settings ({', '.join(differing)}); {remedy}")
    return report if "clusters" in report else None


def discover(config, corpus, recipe):
    """Find the clusters, write them, and return the report."""
    try:
        from sklearn.metrics import normalized_mutual_info_score
        from threadpoolctl import threadpool_limits  # comes with scikit-learn
    except ImportError:
        remedy = "pip install -r requirements-extra.txt"
        raise UserError(f"data.discover needs the package scikit-learn; {remedy}") from None
    documents, labels = zip(*(read_documents(corpus, split) for split in SPLITS), strict=True)
    documents, labels = (dict(zip(SPLITS, part, strict=True)) for part in (documents, labels))
    with threadpool_limits(1):  # the same result, bit for bit, on any number of cores
        found, terms = find_clusters(config, corpus.encoding, documents)
    clusters = [
        {split: [rows[i] for i in np.flatnonzero(found[split] == k)] for split, rows in documents.items()}
        for k in range(config.clusters)
    ]
    needed = config.sequence_length + 1
    for k, cluster in enumerate(clusters):
        for split, rows in cluster.items():
            if (size := sum(map(len, rows))) < needed:
                short = f"{split} of one cluster, c{k}, has {size} tokens, but a sequence needs {needed}"
                raise UserError(f"--clusters={config.clusters}: {short}; ask for fewer clusters")
    path = os.path.join(config.out_dir, REPORT)
    write_json(path, {"recipe": recipe})  # unfinished from here on
    for name in filter(re.compile(r"c\d+").fullmatch, os.listdir(config.out_dir)):
        shutil.rmtree(os.path.join(config.out_dir, name))
    copy_tokenizer(config.data_dir, config.out_dir)
    sources = {"data_dir": config.data_dir, "scikit-learn": version("scikit-learn")}
    report = {"recipe": recipe, "clusters": {}}
    for k, cluster in enumerate(clusters):
        about = {"recipe": {"domain": f"c{k}", **recipe}, "sources": sources}
        write_cluster(os.path.join(config.out_dir, f"c{k}"), cluster, corpus, about)
        sizes = [len(ids) for ids in cluster["train"]]
        shares = np.bincount(labels["train"][found["train"] == k], sizes, len(corpus.domains)) / sum(sizes)
        counts = {"documents": len(sizes), "tokens": sum(sizes), "terms": terms[k]}
        report["clusters"][f"c{k}"] = {**counts, "shares": dict(zip(corpus.domains, shares.round(4), strict=True))}
    if len(corpus.domains) > 1:
        pairs = (np.concatenate([part[split] for split in HELD_OUT]) for part in (labels, found))
        report["nmi"] = round(float(normalized_mutual_info_score(*pairs)), 4)
    write_json(path, report)
    return report


def print_report(report):
    """Print a line per cluster, and how well clusters agree with the labels."""
    print("cluster  documents      tokens", *(f"{domain:>7}" for domain in report["recipe"]["data"]), " top terms")
    for name, cluster in report["clusters"].items():
        shares = (f"{share:7.1%}" for share in cluster["shares"].values())
        print(f"{name:8}{cluster['documents']:10,}{cluster['tokens']:12,}", *shares, "", *cluster["terms"])
    if "nmi" in report:
        print(f"normalised mutual information of clusters and domains, held-out documents: {report['nmi']:.3f}")


def main():
    config = parse(DiscoverConfig)
    corpus = Corpus(config.data_dir, config.domains)
    if os.path.realpath(config.out_dir) == os.path.realpath(config.data_dir):
        raise UserError(f"--out_dir={config.out_dir} is the folder that the text comes from; choose another one")
    settings = ("clusters", "method", "features", "sample", "seed")
    recipe = {name: getattr(config, name) for name in settings}
    recipe |= {"data": corpus.hashes(), "tokenizer": corpus.tokenizer_hash}
    with locked(config.out_dir, wait=True):  # of two running at once, the second finds what the first has made
        if report := finished(config, recipe):
            print(f"{config.out_dir}: already there, kept")
        print_report(report or discover(config, corpus, recipe))


if __name__ == "__main__":
    command(main)
