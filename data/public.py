"""Turn a public data set, streamed by name, into a domain of a data folder.

    python -m data.public --source=fineweb-edu --tokens=2e9 --out_dir=out/web/data --tokenizer=hf:OWNER/NAME
    python -m data.public --source=~/parquet --domain=mine --out_dir=out/web/data

writes <out_dir>/<domain>/{train.bin,val.bin,test.bin,meta.json}, as data/prepare.py does. Needs the package datasets
(requirements-extra.txt). Text is never in memory as a whole: tokens are appended to files as documents come, and a run
that was stopped goes on from its last note of where it stood. A document's text alone decides its split, so the same
text from another source, or twice in this one, is never both learned from and scored on.

With --processes=N the source's shards (most often files) are cut into N runs of neighbours. Each process reads one run,
up to its Nth of the tokens and of the held-out text, and what they wrote is joined in the order of the source. So text
that comes to less than that gives the same files for any N.
"""

import atexit
import dataclasses
import glob
import multiprocessing
import os
import signal
import time
from importlib.metadata import version
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.config import key, parse
from common.corpus import split_of
from common.errors import UserError, command, read_json
from common.hf import copy_tokenizer, local_folder
from common.run import locked
from common.tokenizer import has_tokenizer, load_tokenizer, tokenizer_hash
from data.parts import Part, check_notes, join_parts, part_folder, remove_parts
from data.prepare import MAX_HELD_OUT_BYTES, print_table, token_dtype

DOCUMENTS = 512  # from one look at whether there are enough tokens to the next
NOTE_EVERY = 20  # of those; a stopped run repeats no more


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
    processes: int = key(1, "processes that read and tokenize, a core each", within="[1, 1024]")
    overwrite: bool = key(False, "prepare again what is there already")


def open_stream(config):
    """(an iterable of {column: text}, the column, what the recipe says about the source)."""
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


def write_part(config, folder, number, recipe):
    """Read and tokenize one process's share of the source, until it has its share of the tokens or no more text."""
    stream, column, _ = open_stream(config)
    stream = stream.shard(config.processes, number)
    encoding = load_tokenizer(config.out_dir)
    tokens, held_out = config.tokens / config.processes, MAX_HELD_OUT_BYTES / config.processes
    with locked(part_folder(folder, number), create=True):
        part = Part(folder, number, recipe, token_dtype(encoding))
        if part.note["done"]:
            return
        if part.note["state"]:
            stream.load_state_dict(part.note["state"])
        splits, parent = part.note["splits"], multiprocessing.parent_process()
        options = {"initial": splits["train"]["tokens"], "unit": "token", "unit_scale": True, "position": number}
        bar = tqdm(desc=part.folder, total=int(tokens), **options)
        for count, texts in enumerate(batches(stream, column), start=1):
            for text in texts:
                split = split_of(text)
                if split == "train" or splits[split]["bytes"] < held_out:
                    # an array where encode_ordinary makes a list, which takes a quarter longer
                    ids = encoding.encode_to_numpy(text, disallowed_special=())
                    part.add(split, text, np.append(ids, encoding.eot_token))
            bar.update(splits["train"]["tokens"] - bar.n)
            if splits["train"]["tokens"] >= tokens:
                break
            if count % NOTE_EVERY == 0:
                part.save(stream.state_dict())
            if parent and not parent.is_alive():
                raise SystemExit("the process that started this one is gone")
        part.save(None, done=True)
        bar.close()


def worker(*arguments):
    """write_part in a process of its own: it leaves Ctrl-C to the process that started it, and says what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    command(lambda: write_part(*arguments))


def write_parts(config, folder, recipe):
    """write_part in as many processes as asked for; they end with this one, and with the first that fails."""
    if config.processes == 1:
        return write_part(config, folder, 0, recipe)
    spawn = multiprocessing.get_context("spawn")  # a fork would lack the threads of what is imported already
    started = [
        spawn.Process(target=worker, args=(config, folder, number, recipe), daemon=True)
        for number in range(config.processes)
    ]
    for process in started:
        process.start()
    running = {process.sentinel: number for number, process in enumerate(started)}
    while running:
        for sentinel in wait(running):
            number = running.pop(sentinel)
            started[number].join()
            if started[number].exitcode == 2:
                raise SystemExit(2)  # it has said why
            if started[number].exitcode:
                raise UserError(
                    f"the process of {part_folder(folder, number)} was stopped (exit code {started[number].exitcode}); "
                    "the same command continues"
                )


def main():
    config = parse(PublicConfig)
    name = config.domain or os.path.splitext(os.path.basename(os.path.normpath(config.source)))[0]
    folder = os.path.join(config.out_dir, name)
    encoding = use_tokenizer(config)
    stream, _, about = open_stream(config)
    if config.processes > stream.num_shards:
        have = f"--source={config.source} has {stream.num_shards} shards to share out"
        raise UserError(f"--processes={config.processes}, but {have}; use as many at most")
    recipe = {"domain": name, "source": about, "tokens": config.tokens, "processes": config.processes}
    recipe["tokenizer"] = tokenizer_hash(config.out_dir)
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        meta = read_json(path, "use --overwrite=True")
        if not config.overwrite and meta["recipe"] != recipe:
            raise UserError(f"{folder} was prepared with other settings; use --overwrite=True or another --domain")
        remove_parts(folder)  # which a kill may have left
        if not config.overwrite:
            print(f"{folder}: already there, kept")
            return
        os.remove(path)
    with locked(folder, create=True):
        check_notes(folder, recipe)
        write_parts(config, folder, recipe)
        about = {"tokenizer_hash": recipe["tokenizer"], "sources": {"datasets": version("datasets")}}
        meta = join_parts(folder, config.processes, {"recipe": recipe, **about, "dtype": token_dtype(encoding)})
    print_table({name: meta})


if __name__ == "__main__":
    command(main)
