"""Turn a public data set, streamed by name, into a domain of a data folder.

    python -m data.public --source=fineweb-edu --tokens=2e9 --out_dir=out/web/data --tokenizer=hf:OWNER/NAME
    python -m data.public --source=~/parquet --domain=mine --out_dir=out/web/data

writes <out_dir>/<domain>/{train.bin,val.bin,test.bin,meta.json}, as data/prepare.py does. Needs the package datasets
(requirements-extra.txt). Text is never in memory as a whole: tokens are appended to files as documents come, and a run
that was stopped goes on from its last note of where it stood. A document's text alone decides its split, so the same
text from another source, or twice in this one, is never both learned from and scored on.
"""

import dataclasses
import glob
import hashlib
import os
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.config import key, parse
from common.errors import UserError, command
from common.files import read_json, write_json
from common.hub import local_folder
from common.runs import locked
from common.split import SPLITS, split_of
from common.tokenizer import has_tokenizer, load_tokenizer, tokenizer_hash
from common.weights import copy_tokenizer
from data.prepare import MAX_HELD_OUT_BYTES, print_table

DOCUMENTS = 512  # tokenized together, on all threads
NOTE_EVERY = 20  # of those; a stopped run repeats no more
PROGRESS = "progress.json"


class Source(NamedTuple):
    """A public data set: its id on the Hugging Face Hub, its configuration, its column of text, its licence."""

    id: str
    config: str | None
    column: str
    licence: str


SOURCES = {
    "fineweb-edu": Source("HuggingFaceFW/fineweb-edu", "sample-10BT", "text", "ODC-By 1.0"),
    "finemath": Source("HuggingFaceTB/finemath", "finemath-4plus", "text", "ODC-By 1.0"),
    "wikipedia": Source("wikimedia/wikipedia", "20231101.en", "text", "CC BY-SA 3.0 and GFDL"),
    "code": Source("codeparrot/codeparrot-clean", None, "content", "of each repository, in its column `license`"),
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
    threads: int = key(2, "threads that tokenize", within="[1, 1024]")
    overwrite: bool = key(False, "prepare again what is there already")


def open_stream(config):
    """(an iterable of {column: text}, the column, what the recipe says about the source)."""
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError:
        raise UserError("data.public needs the package datasets; pip install -r requirements-extra.txt") from None
    disable_progress_bars()
    if config.source in SOURCES:
        source = SOURCES[config.source]
        column, options = source.column, {"path": source.id, "name": source.config}
        about = {"id": source.id, "config": source.config, "licence": source.licence}
    else:
        files = list_files(config.source)
        kind = FORMATS[os.path.splitext(files[0])[1]]
        column, options = config.column, {"path": kind, "data_files": files}
        if kind == "parquet":
            options["columns"] = [column]  # reading all takes several times as long
        about = {"files": [[os.path.basename(name), os.path.getsize(name)] for name in files]}
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
    return stream, column, {**about, "column": column}


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
    folder = local_folder(config.tokenizer)
    if folder and not has_tokenizer(folder):
        raise UserError(f"--tokenizer={folder}: there is no tokenizer; give a checkpoint or data folder")
    if not has_tokenizer(config.out_dir):
        if not folder:
            raise UserError(
                f"{config.out_dir} has no tokenizer yet; give --tokenizer=FOLDER, or run data.prepare first"
            )
        copy_tokenizer(folder, config.out_dir)
    elif folder and tokenizer_hash(folder) != tokenizer_hash(config.out_dir):
        raise UserError(f"{config.out_dir} already has another tokenizer than {folder}; use another --out_dir")
    return load_tokenizer(config.out_dir)


class Writer:
    """Token files that grow, and a note of how far they and the stream have come.

    note: {"recipe", "state" of the stream, "splits": {split: documents, tokens, bytes, hash}}. What is in the files
    beyond a note was written after it and is cut off.
    """

    def __init__(self, folder, recipe, dtype):
        self.folder, self.dtype = folder, np.dtype(dtype)
        empty = {split: {"documents": 0, "tokens": 0, "bytes": 0, "hash": ""} for split in SPLITS}
        self.note = {"recipe": recipe, "state": None, "splits": empty}
        path = os.path.join(folder, PROGRESS)
        if os.path.exists(path):
            found = read_json(path, "delete it to begin anew")
            if isinstance(found, dict) and found.get("recipe") == recipe:
                self.note = found
            else:
                raise UserError(f"{path} is of a run with other settings; delete it to begin anew, or repeat that run")
        self.files = {split: self.reopen(split) for split in SPLITS}

    def reopen(self, split):
        """The file of a split, to append to what the note says is in it."""
        path, final = self.part(split), os.path.join(self.folder, f"{split}.bin")
        size = self.note["splits"][split]["tokens"] * self.dtype.itemsize
        if size and not os.path.exists(path) and os.path.exists(final):  # killed while files got their names
            os.replace(final, path)
        if size > (os.path.getsize(path) if os.path.exists(path) else 0):
            raise UserError(f"{path} has lost tokens; delete {os.path.join(self.folder, PROGRESS)} to begin anew")
        file = open(path, "ab")  # noqa: SIM115 (it stays open while documents come)
        file.truncate(size)
        return file

    def part(self, split):
        return os.path.join(self.folder, f"{split}.part")

    def add(self, split, text, ids):
        counts = self.note["splits"][split]
        self.files[split].write(np.array(ids, self.dtype).tobytes())
        sizes = {"documents": 1, "tokens": len(ids), "bytes": len(text.encode())}
        counts |= {name: counts[name] + size for name, size in sizes.items()}
        counts["hash"] = hashlib.sha256(f"{counts['hash']} {text}".encode()).hexdigest()

    def save(self, state):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(os.path.join(self.folder, PROGRESS), {**self.note, "state": state})

    def finish(self, meta):
        """Give the files their names; meta.json comes last, and the note goes."""
        splits = self.note["splits"]
        if lacking := [split for split in SPLITS if not splits[split]["documents"]]:
            raise UserError(f"{self.folder}: nothing came for {' and '.join(lacking)}; raise --tokens or add text")
        for split, file in self.files.items():
            file.close()
            os.replace(self.part(split), os.path.join(self.folder, f"{split}.bin"))
        hashes = "".join(splits[split].pop("hash") for split in SPLITS)
        meta |= {**splits, "dtype": str(self.dtype), "content_hash": hashlib.sha256(hashes.encode()).hexdigest()}
        write_json(os.path.join(self.folder, "meta.json"), meta, indent=2)
        if os.path.exists(note := os.path.join(self.folder, PROGRESS)):
            os.remove(note)
        return meta


def batches(stream, column):
    """Lists of up to DOCUMENTS texts."""
    texts = []
    for row in stream:
        if isinstance(row[column], str) and row[column].strip():
            texts.append(row[column])
        if len(texts) == DOCUMENTS:
            yield texts
            texts = []
    if texts:
        yield texts


def fill(writer, stream, column, encoding, config):
    """Append documents until there are enough training tokens, or no more text."""
    if writer.note["state"]:
        stream.load_state_dict(writer.note["state"])
    splits = writer.note["splits"]
    bar = tqdm(desc=writer.folder, total=int(config.tokens), initial=splits["train"]["tokens"], unit="token")
    bar.unit_scale = True
    for number, texts in enumerate(batches(stream, column), start=1):
        wanted = [(split, text) for text in texts if (split := split_of(text)) == "train" or has_room(splits[split])]
        encoded = encoding.encode_ordinary_batch([text for _, text in wanted], num_threads=config.threads)
        for (split, text), ids in zip(wanted, encoded, strict=True):
            if split == "train" or has_room(splits[split]):
                writer.add(split, text, [*ids, encoding.eot_token])
        bar.update(splits["train"]["tokens"] - bar.n)
        if splits["train"]["tokens"] >= config.tokens:
            break
        if number % NOTE_EVERY == 0:
            writer.save(stream.state_dict())
    bar.close()


def has_room(counts):
    return counts["bytes"] < MAX_HELD_OUT_BYTES


def main():
    config = parse(PublicConfig)
    name = config.domain or os.path.splitext(os.path.basename(os.path.normpath(config.source)))[0]
    folder = os.path.join(config.out_dir, name)
    encoding = use_tokenizer(config)
    stream, column, about = open_stream(config)
    recipe = {"domain": name, "source": about, "tokens": config.tokens, "tokenizer": tokenizer_hash(config.out_dir)}
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        meta = read_json(path, "use --overwrite=True")
        if not config.overwrite:
            if meta["recipe"] != recipe:
                raise UserError(f"{folder} was prepared with other settings; use --overwrite=True or another --domain")
            print(f"{folder}: already there, kept")
            return
        os.remove(path)
    with locked(folder, create=True):
        writer = Writer(folder, recipe, "uint16" if encoding.n_vocab <= 2**16 else "uint32")
        fill(writer, stream, column, encoding, config)
        sources = {"datasets": version("datasets")}
        meta = writer.finish({"recipe": recipe, "tokenizer_hash": recipe["tokenizer"], "sources": sources})
    print_table({name: meta})


if __name__ == "__main__":
    command(main)
