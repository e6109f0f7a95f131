"""Turn text into tokens: one folder per domain, all with the same tokenizer.

    python -m data.prepare config/cpu/data.py
    python -m data.prepare config/cpu/data.py --domains=poems=~/poems     # adds another domain later

writes <out_dir>/{tiktoken.json,tokenizer.tiktoken} and <out_dir>/<domain>/{train.bin,val.bin,test.bin,meta.json},
with task-val.jsonl and task-test.jsonl if the domain has a task, and {train,val,test}.answers.bin if its text is chats:
a byte for each token, 1 if it belongs to an answer or ends one. Finished domains are kept: running the same command
again continues, or does nothing.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from common.config import key, parse, split_list
from common.corpus import HELD_OUT, HELD_OUT_SHARE, SPLITS, check_name
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.hf import copy_tokenizer, local_folder
from common.run import differing_settings, locked
from common.tokenizer import END_OF_TEXT, has_tokenizer, load_tokenizer, spelled_bytes, tokenizer_hash
from data.bpe import save_tokenizer
from data.code_task import code_task
from data.encyclopedia import wiki_documents, wiki_task
from data.files import document_ids, losses
from data.math_problems import math_documents, math_task
from data.overlap import IN_TRAIN, without_copies
from data.own_text import own_documents, read_own
from data.python_text import code_documents, cpp_documents, english_documents, python_sources

# {domain: (its documents, its task or None)}
BUILT_IN = {
    "code": (code_documents, code_task),
    "math": (math_documents, math_task),
    "wiki": (wiki_documents, wiki_task),
    "cpp": (cpp_documents, None),
    "english": (english_documents, None),
}
GENERATED = ("math", "wiki")  # their text has no end
MAX_HELD_OUT_BYTES = 1_000_000  # of val, and of test
TOKENIZER_SAMPLE_BYTES = 3_000_000  # from each domain, at most


@dataclass
class DataConfig:
    """Prepare the training data of one or more domains."""

    out_dir: str = key("out/cpu/data", "the folder for the tokenizer and the domains")
    domains: str = key("code,math,wiki", f"built-in domains ({', '.join(BUILT_IN)}) or NAME=PATH, separated by commas")
    tokenizer: str = key("bpe", "bpe trains a small one here; or a folder or hf:OWNER/NAME to take it from")
    vocab_size: int = key(2048, "entries of the bpe tokenizer, special token included", within="[257, 1000000]")
    column: str = key("", "the column with the text in your JSON lines; empty: text, content or messages (chats)")
    special_tokens: bool = key(False, "read special tokens such as <|im_start|> in your own text as such")
    max_bytes: int = key(12_000_000, "bytes of text per domain; 0 takes all there is", within="[0, inf)")
    seed: int = key(0, "random seed: which documents to take, and what to generate")
    overwrite: bool = key(False, "prepare existing domains again")

    def __post_init__(self):
        if self.tokenizer != "bpe":
            self.tokenizer = local_folder(self.tokenizer)
            if not has_tokenizer(self.tokenizer):
                known = "give bpe, a folder that has one, or hf:OWNER/NAME"
                raise UserError(f"--tokenizer={self.tokenizer}: there is no tokenizer; {known}")


@dataclass
class Domain:
    """A domain to prepare: what to make it from and, after reading, its texts."""

    name: str
    folder: str
    recipe: dict  # everything that decides the content; a finished domain with the same recipe is not made again
    sources: dict  # the versions of what the texts are made from
    documents: object  # iterator of (split, read); read() returns the text, or None to skip the document
    remarks: list  # what the user should know, a line each
    texts: dict = field(default_factory=lambda: {split: [] for split in SPLITS})


def domain_of(entry, config):
    """The Domain for one entry of `domains`, a built-in name or NAME=PATH."""
    name, equals, path = entry.strip().partition("=")
    check_name(name, "--domains")
    recipe = {"domain": name, "max_bytes": config.max_bytes, "seed": config.seed}
    sources, remarks = python_sources(), []
    if equals:
        recipe |= {key: value for key in ("column", "special_tokens") if (value := getattr(config, key))}
        folder = "" if config.tokenizer == "bpe" else config.tokenizer
        options = {"column": config.column, "folder": folder, "markers": end_markers(config, folder)}
        texts, recipe["files"], remarks = read_own(path, **options)
        documents, sources = own_documents(texts, config.seed), {"files": path}
    elif name in BUILT_IN:
        documents = BUILT_IN[name][0](config.seed)
    else:
        known = f"the built-in ones are {', '.join(BUILT_IN)} (for your own text: {name}=FOLDER)"
        raise UserError(f"--domains: unknown domain {name!r}; {known}")
    if name in GENERATED and not equals and not config.max_bytes:
        raise UserError(f"--max_bytes=0: generated text ({name}) never ends; give a number of bytes")
    return Domain(name, os.path.join(config.out_dir, name), recipe, sources, documents, remarks)


def end_markers(config, folder):
    """The markers that end a document within a text: the usual one, and that of the folder's tokenizer, if any."""
    if config.special_tokens:
        return ()  # then they become tokens
    own = load_tokenizer(folder) if folder else None
    return {END_OF_TEXT, own.decode([own.eot_token])} if own else {END_OF_TEXT}


def is_finished(folder, recipe, config):
    """True if a domain's folder already has what was asked for; UserError if it was made differently."""
    path = os.path.join(folder, "meta.json")
    if config.overwrite or not os.path.exists(path):
        return False
    remedy = "use --overwrite=True or another --out_dir"
    meta = read_json(path, remedy)
    if differing := differing_settings(meta["recipe"], recipe):
        raise UserError(f"{folder} was prepared with other settings ({', '.join(differing)}); {remedy}")
    if meta["tokenizer_hash"] != tokenizer_hash(config.out_dir):
        raise UserError(f"{folder} was prepared with another tokenizer; {remedy}")
    return True


def collect(domain, max_bytes):
    """Read documents into domain.texts until all splits have their share of max_bytes (0: all)."""
    limits = {"train": max_bytes * (1 - HELD_OUT_SHARE * len(HELD_OUT)) or np.inf}
    limits |= dict.fromkeys(HELD_OUT, min(max_bytes * HELD_OUT_SHARE or np.inf, MAX_HELD_OUT_BYTES))
    sizes = dict.fromkeys(SPLITS, 0)
    options = {"total": sum(limits.values()), "unit": "B", "unit_scale": True, "leave": False, "disable": None}
    with tqdm(desc=f"{domain.name}: reading", **options) as bar:
        for split, read in domain.documents:
            if all(sizes[name] >= limits[name] for name in SPLITS):
                break
            text = read() if sizes[split] < limits[split] else None
            if text:
                domain.texts[split].append(text)
                sizes[split] += len(text.encode())
                bar.update(len(text.encode()))
    lacking = [split for split, texts in domain.texts.items() if not texts]
    if lacking:
        nothing = f"nothing is left for {' and '.join(lacking)}"
        raise UserError(f"domain {domain.name!r} is too small to split: {nothing}; add more text")


def tokenizer_sample(domains):
    """Training text of the domains, nearly the same number of bytes from each."""
    sizes = [sum(len(text.encode()) for text in domain.texts["train"]) for domain in domains]
    share = min(*sizes, TOKENIZER_SAMPLE_BYTES)
    for domain in domains:
        size = 0
        for text in domain.texts["train"]:
            if size >= share:
                break
            size += len(text.encode())
            yield text


def token_dtype(encoding):
    return "uint16" if encoding.n_vocab <= 2**16 else "uint32"


def write_domain(domain, encoding, config):
    """Tokenize a domain and write its folder, meta.json last. If people wrote the text, held-out documents that are
    mostly copies of training text are left out; in the user's own text, only if others remain."""
    os.makedirs(domain.folder, exist_ok=True)
    dtype, spelled = token_dtype(encoding), spelled_bytes(encoding)
    is_own = "files" in domain.recipe
    digest = hashlib.sha256()
    counts, answered = {}, {}
    for split, texts in domain.texts.items():  # train comes first
        bar = tqdm(texts, desc=f"{domain.name}: tokens of {split}", leave=False, disable=None)
        found = [document_ids(encoding, text, is_own and config.special_tokens, spelled) for text in bar]
        tokens = np.concatenate([ids.astype(dtype) for ids, *_ in found])
        stays = np.ones(len(texts), bool)
        if split == "train":
            train = tokens
        elif is_own or (domain.name in BUILT_IN and domain.name not in GENERATED):
            others, stays = without_copies(train, tokens, [len(ids) for ids, *_ in found])
            if not is_own and not stays.any():
                raise UserError(f"domain {domain.name!r}: all of {split} is copied from train; raise --max_bytes")
            if stays.any():
                tokens = others
            else:
                domain.remarks.append(f"all of {split} repeats text from train, and was kept; have a look at it")
                stays[:] = True
        copies = len(texts) - int(stays.sum())
        texts[:] = [text for text, stay in zip(texts, stays, strict=True) if stay]
        digest.update(b"\0".join([split.encode(), *(text.encode() for text in texts), b""]))
        size = sum(len(text.encode()) for text in texts)
        counts[split] = {"documents": len(texts), "copies": copies, "tokens": len(tokens), "bytes": size}
        if lost := sum(lost for (_, lost, _), stay in zip(found, stays, strict=True) if stay):
            counts[split]["lost"] = lost
        write_atomically(os.path.join(domain.folder, f"{split}.bin"), tokens.tobytes())
        answers = np.concatenate([mask for (*_, mask), stay in zip(found, stays, strict=True) if stay])
        if answers.any():
            digest.update(answers)
            answered[split] = int(answers.sum())
            write_atomically(os.path.join(domain.folder, f"{split}.answers.bin"), answers.tobytes())
    if copies := sum(count["copies"] for count in counts.values()):
        domain.remarks.append(f"{copies:,} held-out documents {IN_TRAIN}")
    domain.remarks += losses(counts.values())
    meta = {
        "recipe": domain.recipe,
        **counts,
        "dtype": dtype,
        "content_hash": digest.hexdigest(),
        "tokenizer_hash": tokenizer_hash(config.out_dir),
        "sources": domain.sources,
        **({"answers": answered} if len(answered) == len(SPLITS) else {}),
    }
    make_task = None if is_own else BUILT_IN[domain.name][1]
    if make_task:
        tasks = {split: make_task(domain.texts, split, config.seed) for split in HELD_OUT}
        if all(tasks.values()):
            meta["task"] = write_tasks(domain.folder, tasks)
    write_json(os.path.join(domain.folder, "meta.json"), meta, indent=2)


def write_tasks(folder, tasks):
    """Write a domain's task files from {split: Task}; returns the entry "task" of its meta.json."""
    for split, task in tasks.items():
        lines = "".join(json.dumps(row) + "\n" for row in task.rows)
        write_atomically(os.path.join(folder, f"task-{split}.jsonl"), lines)
    baselines = {split: task.baselines() for split, task in tasks.items()}
    return {"marker": tasks["val"].marker, "baselines": baselines}


def keeps_tokenizer(config, names):
    """True if out_dir has the requested tokenizer and keeps it, False if one has to be made.

    Checkpoints and all domains of out_dir depend on it, so it is made again only with overwrite, and only if all
    finished domains are among `names`, the ones to prepare. UserError if out_dir has another tokenizer.
    """
    folders = sorted(os.listdir(config.out_dir))
    finished = [name for name in folders if os.path.exists(os.path.join(config.out_dir, name, "meta.json"))]
    others = [name for name in finished if name not in names or not config.overwrite]
    if not has_tokenizer(config.out_dir):
        if others:
            raise UserError(f"{config.out_dir} has lost the tokenizer of {', '.join(others)}; use another --out_dir")
        return False
    if config.overwrite and not others:
        return False
    encoding = load_tokenizer(config.out_dir)
    if config.tokenizer == "bpe":
        same = (encoding.name, encoding.n_vocab) == ("bpe", config.vocab_size)
    else:
        same = tokenizer_hash(config.out_dir) == tokenizer_hash(config.tokenizer)
    if not same:
        remedy = f"--overwrite=True, preparing {','.join(finished)} again," if others else "--overwrite=True"
        has = f"{encoding.name}, {encoding.n_vocab} entries"
        raise UserError(f"{config.out_dir} already has another tokenizer ({has}); use {remedy} or another --out_dir")
    return True


def print_table(metas):
    """Print documents, tokens and bytes of each domain. metas: {name: meta}."""
    print(f"{'domain':12} {'split':5} {'documents':>9} {'tokens':>11} {'bytes':>11} {'bytes/token':>11}")
    for name, meta in metas.items():
        for split in SPLITS:
            documents, tokens, size = (meta[split][column] for column in ("documents", "tokens", "bytes"))
            print(f"{name:12} {split:5} {documents:9,} {tokens:11,} {size:11,} {size / tokens:11.2f}")


def prepare(config, domains):
    """Write the tokenizer, if needed, and the domains that are missing."""
    keep = keeps_tokenizer(config, [domain.name for domain in domains])
    missing = [domain for domain in domains if not is_finished(domain.folder, domain.recipe, config)]
    for domain in domains:
        if domain not in missing:
            print(f"{domain.folder}: already there, kept")
    for domain in missing:
        collect(domain, config.max_bytes)
    for domain in missing:
        meta = os.path.join(domain.folder, "meta.json")
        if os.path.exists(meta):
            os.remove(meta)  # from here on the domain counts as missing until it is complete again
    if not keep:
        print(f"{config.out_dir}: making the {config.tokenizer} tokenizer")
        if config.tokenizer == "bpe":
            save_tokenizer(config.out_dir, config.vocab_size, tokenizer_sample(missing))
        else:
            copy_tokenizer(config.tokenizer, config.out_dir)
    encoding = load_tokenizer(config.out_dir)
    for domain in missing:
        write_domain(domain, encoding, config)
        for remark in domain.remarks:
            print(f"{domain.folder}: {remark}")
    remedy = "prepare it again with --overwrite=True"
    print_table({domain.name: read_json(os.path.join(domain.folder, "meta.json"), remedy) for domain in domains})


def main():
    config = parse(DataConfig)
    domains = [domain_of(entry, config) for entry in split_list(config.domains)]
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise UserError(f"--domains={config.domains}: a name occurs twice; rename one")
    with locked(config.out_dir, wait=True):  # so that two running at once make one tokenizer
        prepare(config, domains)


if __name__ == "__main__":
    command(main)
