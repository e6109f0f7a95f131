"""Turn a public data set, streamed by name, into a domain of a data folder.

    python -m data.public --source=fineweb-edu --tokens=2e9 --out_dir=out/web/data --tokenizer=hf:OWNER/NAME
    python -m data.public --source=~/parquet --domain=mine --out_dir=out/web/data

writes <out_dir>/<domain>/{train.bin,val.bin,test.bin,meta.json}, as data/prepare.py does. Needs the package datasets
(requirements-extra.txt). Text is never in memory as a whole: tokens are appended to files as documents come, and a run
that was stopped goes on from its last note of where it stood. A document's text alone decides its split, so the same
text from another source, or twice in this one, is never both learned from and scored on.
"""

import atexit
import dataclasses
import glob
import hashlib
import os
import time
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.config import key, parse
from common.corpus import SPLITS, split_of
from common.errors import UserError, command, read_json, write_json
from common.hf import copy_tokenizer, local_folder
from common.run import locked
from common.tokenizer import has_tokenizer, load_tokenizer, tokenizer_hash
from data.prepare import MAX_HELD_OUT_BYTES, is_finished, print_table, token_dtype

LOOK_EVERY = 512  # documents from one look at whether there are enough tokens to the next
NOTE_EVERY = 20 * LOOK_EVERY  # from one note to the next; a stopped run repeats no more
PROGRESS = "progress.json"


class Source(NamedTuple):
    """A public data set: its id on the Hugging Face Hub, its configuration, its licence, its column of text."""

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
FORMATS = {".parquet": "parquet", ".jsonl": "json"}


@dataclasses.dataclass
class PublicConfig:
    """Stream a public data set, or local parquet and JSON lines, into a domain."""

    source: str = key("fineweb-edu", f"one of {', '.join(SOURCES)}; or a file or folder of .parquet or .jsonl")
    domain: str = key("", "the domain's name; empty is the source's")
    column: str = key("text", "of local files: the column that holds the text")
    tokens: float = key(1e8, "training tokens to stop after", within="[1, inf)")
    out_dir: str = key("out/public/data", "the data folder")
    tokenizer: str = key("", "a checkpoint or data folder, or hf:OWNER/NAME; empty is what out_dir has")
    overwrite: bool = key(False, "prepare again what is there already")


def open_stream(config):
    """(an iterable of {column: text}, what the recipe says about the source, its column among it)."""
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError:
        raise UserError("data.public needs the package datasets; pip install -r requirements-extra.txt") from None
    disable_progress_bars()
    # pyarrow reads on for a moment after nobody asks any more: Python then hangs or aborts at its end if that is sooner
    atexit.unregister(time.sleep)
    atexit.register(time.sleep, 0.5)
    if config.source in SOURCES:
        source = SOURCES[config.source]
        about = source._asdict()
        options = {"path": source.id, "name": source.config}
    else:
        files = list_files(config.source)
        about = {"files": [[os.path.basename(name), os.path.getsize(name)] for name in files], "column": config.column}
        options = {"path": FORMATS[os.path.splitext(files[0])[1]], "data_files": files}
        if options["path"] == "parquet":
            options["columns"] = [config.column]  # reading all takes several times as long
    column = about["column"]
    try:
        stream = load_dataset(split="train", streaming=True, **options).select_columns([column])
        next(iter(stream))
    except StopIteration:
        raise UserError(f"--source={config.source} holds no documents; choose another") from None
    except Exception as error:  # of a dozen packages behind datasets, a class each
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"--source={config.source} cannot be read ({type(error).__name__}: {reason}); check the network, or name "
            f"local files that have a column {column!r}"
        ) from None
    return stream, about


def list_files(path):
    """The .parquet files or else the .jsonl files at a path, sorted."""
    path = os.path.expanduser(path)
    for suffix in FORMATS:
        found = [path] if path.endswith(suffix) else sorted(glob.glob(os.path.join(glob.escape(path), "*" + suffix)))
        if found and all(map(os.path.isfile, found)):
            return found
    known = ", ".join(SOURCES)
    raise UserError(f"--source={path} is neither a known data set ({known}) nor .parquet or .jsonl files")


def use_tokenizer(config):
    """The encoding of out_dir, copied from --tokenizer where there is none yet."""
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
    """The .bin files of a domain, which grow on disk, and a note of how far they have come.

    The note, progress.json, holds {"recipe", "state" of the stream, "splits": {split: documents, tokens, bytes, hash}}.
    What is in the files beyond it was written after it and is cut off. It goes when meta.json says that all is there.
    """

    def __init__(self, folder, recipe, dtype):
        self.folder = folder
        self.dtype = np.dtype(dtype)
        self.progress = os.path.join(folder, PROGRESS)
        empty = {split: {"documents": 0, "tokens": 0, "bytes": 0, "hash": ""} for split in SPLITS}
        self.note = {"recipe": recipe, "state": None, "splits": empty}
        if os.path.exists(self.progress):
            self.note = read_json(self.progress, f"delete {folder} to begin anew")
            if not isinstance(self.note, dict) or self.note.get("recipe") != recipe:
                other = f"{self.progress} is of a run with other settings"
                raise UserError(f"{other}; delete {folder} to begin anew, or repeat that run")
        self.files = {split: self.reopen(split) for split in SPLITS}

    def reopen(self, split):
        """The file of a split, to append to what the note says is in it."""
        path = os.path.join(self.folder, f"{split}.bin")
        size = self.note["splits"][split]["tokens"] * self.dtype.itemsize
        file = open(path, "ab")  # noqa: SIM115 (it stays open while documents come)
        if file.tell() < size:
            raise UserError(f"{path} has lost tokens; delete {self.folder} to begin anew")
        file.truncate(size)
        return file

    def add(self, split, text, tokens):
        """Append a document: its text, and its token ids as an array."""
        self.files[split].write(tokens.astype(self.dtype).tobytes())
        counts = self.note["splits"][split]
        counts["documents"] += 1
        counts["tokens"] += len(tokens)
        counts["bytes"] += len(text.encode())
        counts["hash"] = hashlib.sha256(f"{counts['hash']} {text}".encode()).hexdigest()

    def flush(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def save(self, state):
        """Write the note: what is in the files stays, and the stream goes on from `state`."""
        self.flush()
        self.note["state"] = state
        write_json(self.progress, self.note)

    def finish(self, about):
        """Write meta.json, the note's counts and what `about` adds to them, and return it."""
        splits = self.note["splits"]
        if lacking := [split for split in SPLITS if not splits[split]["documents"]]:
            nothing = f"nothing came for {' and '.join(lacking)}"
            raise UserError(f"{self.folder}: {nothing}; delete it, and raise --tokens or add text")
        self.flush()
        for file in self.files.values():
            file.close()
        hashes = "".join(splits[split].pop("hash") for split in SPLITS)
        meta = {**about, **splits, "content_hash": hashlib.sha256(hashes.encode()).hexdigest()}
        write_json(os.path.join(self.folder, "meta.json"), meta, indent=2)
        if os.path.exists(self.progress):
            os.remove(self.progress)
        return meta


def write_domain(config, stream, column, encoding, files):
    """Read and tokenize the source until there are enough tokens or there is no more text."""
    splits = files.note["splits"]
    if files.note["state"]:
        stream.load_state_dict(files.note["state"])
    options = {"initial": splits["train"]["tokens"], "unit": "token", "unit_scale": True}
    with tqdm(desc=files.folder, total=int(config.tokens), **options) as bar:
        documents = 0
        for row in stream:
            text = row[column]
            if not isinstance(text, str) or not text.strip():
                continue
            split = split_of(text)
            if split == "train" or splits[split]["bytes"] < MAX_HELD_OUT_BYTES:
                # an array where encode_ordinary makes a list, which takes a quarter longer
                ids = encoding.encode_to_numpy(text, disallowed_special=())
                files.add(split, text, np.append(ids, encoding.eot_token))
                bar.update(splits["train"]["tokens"] - bar.n)
            documents += 1
            if documents % LOOK_EVERY == 0 and splits["train"]["tokens"] >= config.tokens:
                break
            if documents % NOTE_EVERY == 0:
                files.save(stream.state_dict())


def main():
    config = parse(PublicConfig)
    name = config.domain or os.path.splitext(os.path.basename(os.path.normpath(config.source)))[0]
    folder = os.path.join(config.out_dir, name)
    encoding = use_tokenizer(config)
    stream, source = open_stream(config)
    recipe = {
        "domain": name,
        "source": source,
        "tokens": config.tokens,
        "processes": 1,  # once a choice; folders from then are still good
        "tokenizer": tokenizer_hash(config.out_dir),
    }
    meta = os.path.join(folder, "meta.json")
    with locked(folder):
        kept = is_finished(folder, recipe, config)
        if os.path.exists(meta):
            if os.path.exists(os.path.join(folder, PROGRESS)):
                os.remove(os.path.join(folder, PROGRESS))  # which a kill has left
            if kept:
                print(f"{folder}: already there, kept")
                return
            os.remove(meta)
        files = TokenFiles(folder, recipe, token_dtype(encoding))
        write_domain(config, stream, source["column"], encoding, files)
        about = {"recipe": recipe, "tokenizer_hash": recipe["tokenizer"], "sources": {"datasets": version("datasets")}}
        print_table({name: files.finish({**about, "dtype": token_dtype(encoding)})})


if __name__ == "__main__":
    command(main)
