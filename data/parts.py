"""A domain that grows on disk: token files in parts, one for each process that writes, which are joined at the end.

    <domain>/part-0/{train.bin,val.bin,test.bin,progress.json}, part-1 ...

A part's note says how far its files and the stream that they come from had come, so a killed run goes on from there.
"""

import glob
import hashlib
import os
import shutil

import numpy as np

from common.corpus import SPLITS
from common.errors import UserError, read_json, write_json

PROGRESS = "progress.json"


def part_folder(domain, number):
    return os.path.join(domain, f"part-{number}")


def check_notes(domain, recipe):
    """UserError where a domain's folder holds a stopped run of another recipe."""
    for path in sorted(glob.glob(os.path.join(glob.escape(domain), "part-*", PROGRESS))):
        found = read_json(path, f"delete {domain} to begin anew")
        if not isinstance(found, dict) or found.get("recipe") != recipe:
            raise UserError(
                f"{path} is of a run with other settings; delete {domain} to begin anew, or repeat that run"
            )


def remove_parts(domain):
    for folder in glob.glob(os.path.join(glob.escape(domain), "part-*")):
        shutil.rmtree(folder)


class Part:
    """The token files that one process writes.

    note: {"recipe", "state" of the stream, "done", "splits": {split: documents, tokens, bytes, hash}}. What is in the
    files beyond a note was written after it and is cut off.
    """

    def __init__(self, domain, number, recipe, dtype):
        self.domain, self.folder, self.dtype = domain, part_folder(domain, number), np.dtype(dtype)
        empty = {split: {"documents": 0, "tokens": 0, "bytes": 0, "hash": ""} for split in SPLITS}
        self.note = {"recipe": recipe, "state": None, "done": False, "splits": empty}
        path = os.path.join(self.folder, PROGRESS)
        if os.path.exists(path):
            self.note = read_json(path, f"delete {domain} to begin anew")
        self.files = {split: self.reopen(split) for split in SPLITS}

    def reopen(self, split):
        """The file of a split, to append to what the note says is in it."""
        path, final = (os.path.join(folder, f"{split}.bin") for folder in (self.folder, self.domain))
        size = self.note["splits"][split]["tokens"] * self.dtype.itemsize
        if size and not os.path.exists(path) and os.path.exists(final):  # killed while the parts were joined
            os.replace(final, path)
        if size > (os.path.getsize(path) if os.path.exists(path) else 0):
            raise UserError(f"{path} has lost tokens; delete {self.domain} to begin anew")
        file = open(path, "ab")  # noqa: SIM115 (it stays open while documents come)
        file.truncate(size)
        return file

    def add(self, split, text, tokens):
        """Append a document: its text, and its token ids as an array."""
        counts = self.note["splits"][split]
        self.files[split].write(tokens.astype(self.dtype).tobytes())
        sizes = {"documents": 1, "tokens": len(tokens), "bytes": len(text.encode())}
        counts |= {name: counts[name] + size for name, size in sizes.items()}
        counts["hash"] = hashlib.sha256(f"{counts['hash']} {text}".encode()).hexdigest()

    def save(self, state, done=False):
        """Write the note: what is in the files stays, and the stream goes on from `state`."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.note |= {"state": state, "done": done}
        write_json(os.path.join(self.folder, PROGRESS), self.note)


def join_parts(domain, count, meta):
    """Append the files of parts 1, 2 ... to those of part 0, which become the domain's. meta.json comes last, then the
    parts go. meta: what it is to hold besides the counts, which are added; returned."""
    folders = [part_folder(domain, number) for number in range(count)]
    notes = [read_json(os.path.join(folder, PROGRESS), "run again")["splits"] for folder in folders]
    names = "documents", "tokens", "bytes"
    counts = {split: {name: sum(note[split][name] for note in notes) for name in names} for split in SPLITS}
    if lacking := [split for split in SPLITS if not counts[split]["documents"]]:
        nothing = f"nothing came for {' and '.join(lacking)}"
        raise UserError(f"{domain}: {nothing}; delete it, and raise --tokens or add text")
    for split in SPLITS:
        first, *others = (os.path.join(folder, f"{split}.bin") for folder in folders)
        with open(first, "ab") as file:
            for path in others:
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, file, 2**24)
            file.flush()
            os.fsync(file.fileno())
        os.replace(first, os.path.join(domain, f"{split}.bin"))
    hashes = "".join(note[split]["hash"] for split in SPLITS for note in notes)
    meta |= {**counts, "content_hash": hashlib.sha256(hashes.encode()).hexdigest()}
    write_json(os.path.join(domain, "meta.json"), meta, indent=2)
    remove_parts(domain)
    return meta
