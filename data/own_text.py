"""Your own domain: a file or folder of text, in any of the formats that data/files.py reads."""

import hashlib
import os
from functools import partial

from common.corpus import HELD_OUT_SHARE, SPLITS, in_hash_order
from common.errors import UserError
from data.files import TextFiles, kind_of, list_files, not_read, opened, pieces

KINDS = ((".txt", ".md", ".py", ".jsonl"), (".json",), (".parquet",))  # the first kind that a folder has is read
MIN_HELD_OUT_BYTES = 4000  # in each split: a few windows of a small model's context
FEW_PIECES = 8  # into how many the text is cut if there are fewer documents than splits


def hash_of(files):
    """The hash (hex) of the contents of files. files: {name: path}."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0".encode())
        with open(path, "rb") if kind_of(path) == ".parquet" else opened(path) as file:
            while part := file.read(2**20):
                digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def distinct(documents):
    """{key: text} without blank and repeated texts."""
    first = {}
    for key, text in documents.items():
        if text.strip():
            first.setdefault(text.strip(), key)
    return {key: documents[key] for key in first.values()}


def read_own(path, **options):
    """Read all documents at `path`: {key: text}, the hash (hex) of the files' contents, and remarks, a line each.

    options: for TextFiles. Raises UserError if the path is missing, holds no text, or cannot be read.
    """
    if not os.path.exists(os.path.expanduser(path)):
        raise UserError(f"{path} does not exist; give your own domain as NAME=FOLDER or NAME=FILE")
    files, others = list_files(path, KINDS)
    if not files:
        known = ", ".join(suffix for kind in KINDS for suffix in kind)
        raise UserError(f"{path} has no readable text; put {known} files there, gzipped or not")
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
        remarks.append(f"{copies:,} of {read:,} documents repeat another and were left out")
    if len(documents) < len(SPLITS):
        piece_bytes = sum(len(text.encode()) for text in documents.values()) // FEW_PIECES
        cut = {key: pieces(text, piece_bytes) for key, text in documents.items()}
        documents = distinct({f"{key}.{n}": piece for key, parts in cut.items() for n, piece in enumerate(parts)})
    return documents, hash_of(files), remarks


def own_documents(documents, seed):
    """(split, read) for each document, in hash order; read() returns its text.

    val and test get about 5% of the bytes each, or MIN_HELD_OUT_BYTES if that is more (there may be little text), but
    no more than it takes to reach a quarter of the bytes. Three documents are enough for one in each split.
    """
    sizes = {key: len(text.encode()) for key, text in documents.items()}
    wanted = min(max(HELD_OUT_SHARE * sum(sizes.values()), MIN_HELD_OUT_BYTES), sum(sizes.values()) / 4)
    left = in_hash_order(documents, "split")[::-1]
    held_out = {}
    for split, to_leave in (("val", 2), ("test", 1)):  # leave at least this many for the remaining splits
        size = 0
        while size < wanted and len(left) > to_leave:
            key = left.pop()
            held_out[key] = split
            size += sizes[key]
    for key in in_hash_order(documents, seed):
        yield held_out.get(key, "train"), partial(documents.get, key)
