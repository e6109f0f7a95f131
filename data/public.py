"""Turn a public data set, streamed by name, into a domain in a data folder.

    python -m data.public --source=fineweb-edu --tokens=2e9 --out_dir=out/web/data --tokenizer=hf:OWNER/NAME
    python -m data.public --source=~/parquet --domain=mine --out_dir=out/web/data

writes <out_dir>/<domain>/{train.bin,val.bin,test.bin,meta.json}, as data/prepare.py does. Public data sets and parquet
need the package datasets (requirements-extra.txt). Text is never in memory as a whole, except a plain text file: tokens
are appended to files as documents come in, and a run that was stopped, or met an unreadable file, resumes from its last
progress note. A document's split depends only on its text, so the same text from another source, or twice in this one,
is never both trained and scored on. Local files may have a column `group` (a project, a section): then all documents of
a group are in one split. Held-out documents that are largely contained in the training text are removed and counted
(data/overlap.py).
"""

import atexit
import contextlib
import dataclasses
import hashlib
import os
import time
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.config import key, parse
from common.corpus import HELD_OUT, SPLITS, check_name, split_of
from common.errors import UserError, atomic_file, command, read_json, write_json
from common.hf import copy_tokenizer, local_folder
from common.run import locked
from common.tokenizer import has_tokenizer, load_tokenizer, spelled_bytes, token_bytes, tokenizer_hash
from data.files import TextFiles, document_ids, kind_of, list_files, losses, not_read
from data.overlap import IN_TRAIN, LENGTH, MOST, without_copies
from data.prepare import MAX_HELD_OUT_BYTES, end_markers, is_finished, print_table, token_dtype

LOOK_EVERY = 512  # documents between two checks whether there are enough tokens
NOTE_EVERY = 20 * LOOK_EVERY  # documents between two progress notes; a stopped run repeats no more than that
MIN_HELD_OUT_TOKENS = 2**15  # of val, and of test: --tokens may be small, but held-out text should not be
PROGRESS = "progress.json"
FILES = {"train": "train.bin", **{split: f"{split}.raw" for split in HELD_OUT}}  # until it is done; see TokenFiles


class Source(NamedTuple):
    """A public data set: its id on the Hugging Face Hub, its configuration, its licence, and its text column."""

    id: str
    config: str | None
    licence: str
    column: str


SOURCES = {
    "fineweb-edu": Source("HuggingFaceFW/fineweb-edu", "sample-10BT", "ODC-By 1.0", "text"),
    "finemath": Source("HuggingFaceTB/finemath", "finemath-4plus", "ODC-By 1.0", "text"),
    "wikipedia": Source("wikimedia/wikipedia", "20231101.en", "CC BY-SA 3.0 and GFDL", "text"),
    "code": Source("codeparrot/codeparrot-clean", None, "of each repository, in its column `license`", "content"),
}
KINDS = ((".parquet",), (".jsonl",), (".json",), (".txt", ".md", ".py"))  # the first kind that a folder has is read


@dataclasses.dataclass
class PublicConfig:
    """Stream a public data set, or local parquet and JSON lines, into a domain."""

    source: str = key("fineweb-edu", f"one of {', '.join(SOURCES)}; or a file or folder of .parquet, .jsonl or text")
    domain: str = key("", "the domain's name; empty takes the source's")
    column: str = key("", "in local files: the column with the text; empty: text, content or messages (chats)")
    group: str = key("group", "in local files: a column; rows with equal values go into the same split")
    special_tokens: bool = key(False, "read special tokens such as <|im_start|> in the text as such")
    tokens: float = key(1e8, "training tokens to stop after, once there is enough held-out text", within="[1, inf)")
    out_dir: str = key("out/public/data", "the data folder")
    tokenizer: str = key("", "a checkpoint or data folder, or hf:OWNER/NAME; empty: the one in out_dir")
    overwrite: bool = key(False, "prepare an existing domain again")


class Hub:
    """A public data set, as a stream with the interface of TextFiles."""

    def __init__(self, name):
        try:
            from datasets import disable_progress_bars, load_dataset
        except ImportError:
            raise UserError("data.public needs the package datasets; pip install -r requirements-extra.txt") from None
        disable_progress_bars()
        # pyarrow keeps reading for a moment after the last row; if Python ended sooner it would hang or abort
        atexit.unregister(time.sleep)
        atexit.register(time.sleep, 0.5)
        source = SOURCES[name]
        self.name, self.column = name, source.column
        with self.reading():
            self.stream = load_dataset(source.id, source.config, split="train", streaming=True)
            self.stream = self.stream.select_columns([source.column])
            next(iter(self.stream))

    @contextlib.contextmanager
    def reading(self):
        try:
            yield
        except Exception as error:  # from a dozen packages behind datasets, each with its own classes
            reason = (str(error).strip().splitlines() or [""])[0]
            remedy = "check the network and run the command again, or name local files"
            raise UserError(
                f"--source={self.name} cannot be read ({type(error).__name__}: {reason}); {remedy}"
            ) from None

    def __iter__(self):
        rows = iter(self.stream)
        while True:
            with self.reading():
                row = next(rows, None)
            if row is None:
                return
            yield self.name, None, [row[self.column]], None

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)

    def origin(self):
        return {"datasets": version("datasets")}

    def remarks(self):
        return ()


def open_stream(config):
    """(a stream of (where, row, texts, group), the recipe's entry "source")."""
    if config.source in SOURCES:
        return Hub(config.source), SOURCES[config.source]._asdict()
    files, others = list_files(config.source, KINDS)
    if not files:
        known = f"{', '.join(SOURCES)}) nor files of {', '.join(suffix for kind in KINDS for suffix in kind)}"
        raise UserError(f"--source={config.source} is neither a known data set ({known}")
    for remark in not_read(others):
        print(f"{config.source}: {remark}")
    folder = local_folder(config.tokenizer) or config.out_dir
    options = {"markers": end_markers(config, folder), "folder": folder}
    first = TextFiles(files, config.column, config.group).columns()
    if not first:
        raise UserError(f"--source={config.source} has no documents; choose another")
    about = {"files": [[name, os.path.getsize(path)] for name, path in files.items()]}
    about |= {name: value for name, value in zip(("column", "group"), first, strict=True) if value}
    return TextFiles(files, *first, **options), about


def domain_name(source):
    """ "text/law.jsonl.gz" -> "law"."""
    name = os.path.basename(os.path.normpath(source))
    known = any(kind_of(name) in kind for kind in KINDS)
    return os.path.splitext(name[:-3] if name.lower().endswith(".gz") else name)[0] if known else name


def use_tokenizer(config):
    """The encoding of out_dir's tokenizer, which is copied from --tokenizer if there is none yet."""
    os.makedirs(config.out_dir, exist_ok=True)
    folder = local_folder(config.tokenizer) or config.out_dir
    if not has_tokenizer(folder):
        remedy = "give --tokenizer=FOLDER, a checkpoint or data folder, or run data.prepare first"
        raise UserError(f"{folder} has no tokenizer; {remedy}")
    if not has_tokenizer(config.out_dir):
        copy_tokenizer(folder, config.out_dir)
    elif tokenizer_hash(folder) != tokenizer_hash(config.out_dir):
        raise UserError(f"{config.out_dir} already has another tokenizer than {folder}; use another --out_dir")
    return load_tokenizer(config.out_dir)


class TokenFiles:
    """The .bin files of a domain, which grow on disk, and a note of their progress.

    The note, progress.json, has {"recipe", "state" of the stream, "splits": {split: documents, tokens, bytes, hash,
    "lost" bytes, and for held-out text the "lengths" of documents}}. The recipe leaves out the list of files: the state
    knows which of them must be unchanged.
    Anything in the .bin files beyond the note was written after it and is cut off. Held-out text is kept in val.raw and
    test.raw until the end; val.bin and test.bin then leave out what training text also contains. The note and the raw
    files are removed once meta.json is there.
    """

    def __init__(self, folder, recipe, dtype):
        self.folder = folder
        self.dtype = np.dtype(dtype)
        self.progress = os.path.join(folder, PROGRESS)
        empty = {split: {"documents": 0, "tokens": 0, "bytes": 0, "hash": ""} for split in SPLITS}
        for split in HELD_OUT:
            empty[split]["lengths"] = []
        source = {name: value for name, value in recipe["source"].items() if name != "files"}
        recipe = {**recipe, "source": source}
        self.note = {"recipe": recipe, "state": None, "splits": empty}
        if os.path.exists(self.progress):
            self.note = read_json(self.progress, f"delete {folder} to start over")
            if not isinstance(self.note, dict) or self.note.get("recipe") != recipe:
                other = f"{self.progress} is of a run with other settings"
                raise UserError(f"{other}; delete {folder} to start over, or use those settings")
        self.files = {split: self.reopen(split) for split in SPLITS}

    def reopen(self, split):
        """The file of a split, opened to append after the tokens that the note counts."""
        path = os.path.join(self.folder, FILES[split])
        size = self.note["splits"][split]["tokens"] * self.dtype.itemsize
        file = open(path, "ab")  # noqa: SIM115 (it stays open while documents come)
        if file.tell() < size:
            raise UserError(f"{path} has lost tokens; delete {self.folder} to start over")
        file.truncate(size)
        return file

    def add(self, split, text, tokens, lost):
        """Append a document. tokens: an array of its ids. lost: how many bytes of the text have no ids."""
        self.files[split].write(tokens.astype(self.dtype).tobytes())
        counts = self.note["splits"][split]
        counts["documents"] += 1
        counts["tokens"] += len(tokens)
        counts["bytes"] += len(text.encode())
        if split in HELD_OUT:
            counts["lengths"].append(len(tokens))
        if lost:
            counts["lost"] = counts.get("lost", 0) + lost
        counts["hash"] = hashlib.sha256(f"{counts['hash']} {text}".encode()).hexdigest()

    def flush(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def save(self, state):
        """Write the note: everything in the files now counts, and the stream would resume from `state`."""
        self.flush()
        self.note["state"] = state
        write_json(self.progress, self.note)

    def finish(self, about, encoding):
        """Write val.bin, test.bin and meta.json, which holds `about` and the note's counts; returns what is in it."""
        splits = self.note["splits"]
        self.flush()
        for file in self.files.values():
            file.close()
        sizes = token_bytes(encoding)
        for split in HELD_OUT if splits["train"]["documents"] else ():
            train = np.memmap(os.path.join(self.folder, FILES["train"]), self.dtype, mode="r")
            tokens = np.fromfile(os.path.join(self.folder, FILES[split]), self.dtype)
            tokens, stays = without_copies(train, tokens, splits[split].pop("lengths"))
            counts = {"copies": int((~stays).sum()), "documents": int(stays.sum()), "tokens": len(tokens)}
            splits[split] |= {**counts, "bytes": int(sizes[tokens].sum())}
            with atomic_file(os.path.join(self.folder, f"{split}.bin")) as file:
                file.write(tokens.tobytes())
        if lacking := [split for split in SPLITS if not splits[split]["documents"]]:
            nothing = f"there is no text for {' and '.join(lacking)}"
            raise UserError(f"{self.folder}: {nothing}; delete it, and raise --tokens or add text")
        hashes = "".join(splits[split].pop("hash") for split in SPLITS)
        meta = {**about, **splits, "content_hash": hashlib.sha256(hashes.encode()).hexdigest()}
        write_json(os.path.join(self.folder, "meta.json"), meta, indent=2)
        clean_up(self.folder)
        return meta


def clean_up(folder):
    """Remove the files that a domain's folder no longer needs once meta.json is there."""
    for name in (PROGRESS, *(FILES[split] for split in HELD_OUT)):
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))


def write_domain(config, stream, encoding, files):
    """Read and tokenize the source until there are enough tokens or no more text."""
    splits = files.note["splits"]
    if files.note["state"]:
        stream.load_state_dict(files.note["state"])
    spelled = spelled_bytes(encoding)
    options = {"initial": splits["train"]["tokens"], "unit": "token", "unit_scale": True}
    with tqdm(desc=files.folder, total=int(config.tokens), **options) as bar:
        rows = 0
        for _, _, texts, group in stream:
            texts = [text for text in texts if isinstance(text, str) and text.strip()]
            for text in texts:
                split = split_of(text if group in (None, "") else group)
                if split == "train" or splits[split]["bytes"] < MAX_HELD_OUT_BYTES:
                    ids, lost, _ = document_ids(encoding, text, config.special_tokens, spelled)
                    files.add(split, text, ids, lost)
                    bar.update(splits["train"]["tokens"] - bar.n)
            rows += bool(texts)
            if texts and rows % LOOK_EVERY == 0 and enough(splits, config.tokens):
                break
            if texts and rows % NOTE_EVERY == 0:
                files.save(stream.state_dict())


def enough(splits, tokens):
    """Whether there are `tokens` training tokens, and enough held-out text (or as much as is ever kept)."""
    held_out = [splits[split] for split in HELD_OUT]
    full = [part["tokens"] >= MIN_HELD_OUT_TOKENS or part["bytes"] >= MAX_HELD_OUT_BYTES for part in held_out]
    return splits["train"]["tokens"] >= tokens and all(full)


def main():
    config = parse(PublicConfig)
    name = config.domain or domain_name(config.source)
    check_name(name, "--domain")
    folder = os.path.join(config.out_dir, name)
    encoding = use_tokenizer(config)
    stream, source = open_stream(config)
    recipe = {
        "domain": name,
        "source": source,
        "tokens": config.tokens,
        "processes": 1,  # this used to be an option; folders from then are still valid
        "tokenizer": tokenizer_hash(config.out_dir),
        "copies": [LENGTH, MOST],  # what counts as one: data/overlap.py
    }
    if config.special_tokens:
        recipe["special_tokens"] = True
    meta = os.path.join(folder, "meta.json")
    with locked(folder):
        if not config.overwrite and os.path.exists(meta):  # more text than asked for is fine
            recipe["tokens"] = max(config.tokens, read_json(meta, "delete it")["recipe"].get("tokens", 0))
        kept = is_finished(folder, recipe, config)
        if os.path.exists(meta):
            clean_up(folder)  # in case a kill left something
            if kept:
                print(f"{folder}: already there, kept")
                return
            os.remove(meta)
        files = TokenFiles(folder, recipe, token_dtype(encoding))
        try:
            write_domain(config, stream, encoding, files)
        except UserError:
            if isinstance(stream, TextFiles):  # its state is still right, so the text read so far is kept
                files.save(stream.state_dict())
            raise
        about = {"recipe": recipe, "tokenizer_hash": recipe["tokenizer"], "sources": stream.origin()}
        found = files.finish({**about, "dtype": token_dtype(encoding)}, encoding)
    print_table({name: found})
    remarks = [*stream.remarks(), *losses([found[split] for split in SPLITS])]
    if copies := sum(found[split]["copies"] for split in HELD_OUT):
        remarks.append(f"{copies:,} held-out documents {IN_TRAIN}")
    for remark in remarks:
        print(f"{folder}: {remark}")


if __name__ == "__main__":
    command(main)
