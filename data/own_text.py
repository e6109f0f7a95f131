"""A domain of one's own: a file or a folder of text, in any of the forms that data/files.py reads."""

import hashlib
import os
from functools import partial

from common.corpus import HELD_OUT_SHARE, SPLITS, in_hash_order
from common.errors import UserError
from data.files import TextFiles, kind_of, list_files, not_read, opened, pieces

KINDS = ((".txt", ".md", ".py", ".jsonl"), (".json",), (".parquet",))  # the first that a folder has are read
MIN_HELD_OUT_BYTES = 4000  # of a split: some windows of a small model's context
FEW_PIECES = 8  # as many where there are fewer documents than splits


def hash_of(files):
    """The hash (hex) of what files hold: {name: path}."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0".encode())
        with open(path, "rb") if kind_of(path) == ".parquet" else opened(path) as file:
            while part := file.read(2**20):
                digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def distinct(documents):
    """{key: text} without texts that are blank or there already."""
    first = {}
    for key, text in documents.items():
        if text.strip():
            first.setdefault(text.strip(), key)
    return {key: documents[key] for key in first.values()}


def read_own(path, **options):
    """Read all documents at `path`: {key: text}, the hash (hex) of what the files hold, and remarks, a line each.

    options: of TextFiles. Raises UserError when the path is missing, holds no text, or cannot be read.
    """
    if not os.path.exists(os.path.expanduser(path)):
        raise UserError(f"{path} does not exist; a domain of your own is NAME=FOLDER or NAME=FILE")
    files, others = list_files(path, KINDS)
    if not files:
        known = ", ".join(suffix for kind in KINDS for suffix in kind)
        raise UserError(f"{path} has no readable text; put {known} files there, or these gzipped")
    documents = {}
    stream = TextFiles(files, **options)
    for name, row, texts, _ in stream:
        key = {".py": name, ".txt": f"{name}#{row - 1}", ".md": f"{name}#{row - 1}"}.get(kind_of(name), f"{name}:{row}")
        documents |= {key if part == 0 else f"{key}/{part}": text for part, text in enumerate(texts)}
    read = sum(bool(text.strip()) for text in documents.values())
    documents = distinct(documents)
    if not documents:
        raise UserError(f"{path} has no readable text; its files are empty")
    remarks = [*stream.remarks(), *not_read(others)]
    if copies := read - len(documents):
        remarks.append(f"{copies:,} of {read:,} documents repeat another one and were left out")
    if len(documents) < len(SPLITS):
        piece_bytes = sum(len(text.encode()) for text in documents.values()) // FEW_PIECES
        cut = {key: pieces(text, piece_bytes) for key, text in documents.items()}
        documents = distinct({f"{key}.{n}": piece for key, parts in cut.items() for n, piece in enumerate(parts)})
    return documents, hash_of(files), remarks


def own_documents(documents, seed):
    """(split, read) for each document, in hash order; read() returns its text.

    val and test get about 5% of the bytes each, but MIN_HELD_OUT_BYTES where that is more (these texts may be few),
    and no more than it takes to reach a quarter of them. Three documents are enough for one in each split.
    """
    sizes = {key: len(text.encode()) for key, text in documents.items()}
    wanted = min(max(HELD_OUT_SHARE * sum(sizes.values()), MIN_HELD_OUT_BYTES), sum(sizes.values()) / 4)
    left = in_hash_order(documents, "split")[::-1]
    held_out = {}
    for split, to_leave in (("val", 2), ("test", 1)):  # documents at least, for the splits that follow
        size = 0
        while size < wanted and len(left) > to_leave:
            key = left.pop()
            held_out[key] = split
            size += sizes[key]
    for key in in_hash_order(documents, seed):
        yield held_out.get(key, "train"), partial(documents.get, key)
