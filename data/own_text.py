"""A domain of one's own: a file or a folder of .txt, .md, .py or .jsonl files."""

import hashlib
import json
import os
from functools import partial

from common.corpus import HELD_OUT_SHARE, SPLITS, in_hash_order
from common.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
MIN_HELD_OUT_BYTES = 4000  # of a split: some windows of a small model's context
PIECE_BYTES = 4000  # longer files are cut at blank lines, so that one long file can be split too
FEW_PIECES = 8  # as many where there are fewer documents than splits


def _list_files(path):
    """The files at `path`: {path relative to the folder: full path}."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; a domain of your own is NAME=FOLDER or NAME=FILE")
    found = {os.path.basename(path): path} if os.path.isfile(path) else {}
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            full = os.path.join(folder, name)
            found[os.path.relpath(full, path).replace(os.sep, "/")] = full
    found = {key: full for key, full in found.items() if full.endswith(SUFFIXES)}
    if not found:
        raise UserError(f"{path} has no readable text; put {', '.join(SUFFIXES)} files there")
    return found


def _jsonl_documents(text, key, path):
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            document = None
        if not isinstance(document, str):
            raise UserError(f'{path}:{number}: expected a JSON object with a string under "text"')
        yield f"{key}:{number}", document


def _pieces(text, piece_bytes=PIECE_BYTES):
    """Cut a long text at blank lines into pieces of about piece_bytes."""
    piece = []
    size = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph.encode()) + 2
        if size >= piece_bytes:
            yield "\n\n".join(piece)
            piece = []
            size = 0
    if piece:
        yield "\n\n".join(piece)


def read_own(path):
    """Read all documents at `path`: {key: text}, and the hash (hex) of what the files hold.

    Raises UserError when the path is missing, holds no such files, or a file is not UTF-8.
    """
    path = os.path.expanduser(path)
    documents = {}
    digest = hashlib.sha256()
    for key, full in _list_files(path).items():
        try:
            with open(full, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError:
            raise UserError(f"{full} is not UTF-8 text; convert it or move it away") from None
        digest.update(f"{key}\0{text}\0".encode())
        if full.endswith(".jsonl"):
            documents.update(_jsonl_documents(text, key, full))
        elif full.endswith(".py"):
            documents[key] = text
        else:
            documents.update((f"{key}#{number}", piece) for number, piece in enumerate(_pieces(text)))
    documents = {key: text for key, text in documents.items() if text.strip()}
    if not documents:
        raise UserError(f"{path} has no readable text; its files are empty")
    if len(documents) < len(SPLITS):
        piece_bytes = sum(len(text.encode()) for text in documents.values()) // FEW_PIECES
        cut = {key: _pieces(text, piece_bytes) for key, text in documents.items()}
        pieces = [(f"{key}.{n}", piece) for key, parts in cut.items() for n, piece in enumerate(parts)]
        documents = {key: piece for key, piece in pieces if piece.strip()}
    return documents, digest.hexdigest()


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
