"""Evaluate checkpoints: bits per byte on fixed windows, answers to held-out problems, where routers send tokens.

    python eval.py config/cpu/eval.py --model=out/cpu/btx,out/cpu/seed

Each model becomes a row of out_dir/results.json. Every model sees the same windows and the same problems.
(`python -m study.btm` adds the rows of Branch-Train-Merge, which uses the experts as an ensemble.)
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm import tqdm

from common.config import key, parse, split_list
from common.corpus import HELD_OUT, Corpus
from common.device import DEVICES, pick_device, place
from common.errors import UserError, command, read_json, write_json
from common.hf import local_folder, same_tokenizer
from common.run import changed_files, hash_of, locked, parent_of, source, total_cost, versions
from common.tokenizer import encode_continuation
from data.task import CHOICES, METRICS, read_answer
from data.two_experts import two_expert_questions
from model import ModelConfig, Transformer, generate
from sample import end_tokens, unknown_ids
from train import validation_scores

GENERATED_ROWS = 64  # problems answered together, of similar length: a batch takes as long as its longest
PASSAGE_TOKENS = 64  # of other text before a question, or a quarter of the model's context if that is less
LINE_TOKENS = 48  # enough to complete a line, and leaves most of a context of 256 for the lines before it
SETTINGS = ("data_dir", "split", "sequence_length", "eval_windows", "task_problems", "max_new_tokens", "dtype")
SETTINGS += ("spliced_windows", "unread")


@dataclasses.dataclass
class ReadingConfig:
    """Which held-out text a model reads, and how: the keys shared by all scripts that score or inspect models."""

    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    domains: str = key("all", "the domains to read, separated by commas")
    split: str = key("test", "held-out text and problems to use: val for tuning, test for reporting", HELD_OUT)
    sequence_length: int = key(256, "tokens per window", within="[1, inf)")
    eval_windows: int = key(128, "windows per domain", within="[1, inf)")
    device: str = key("auto", "where to compute; auto picks cuda or mps if available", DEVICES)
    dtype: str = key("float32", "precision of activations", ("float32", "bfloat16"))
    threads: int = key(0, "CPU threads; 0 lets torch choose", within="[0, 1024]")


@dataclasses.dataclass
class EvalConfig(ReadingConfig):
    """Evaluate one or several checkpoints."""

    model: str = key("", "checkpoints as FOLDER, hf:OWNER/NAME or ROW=FOLDER, separated by commas; one row each")
    unread: str = key("", "the domains that no model was trained on; they do not count in the average")
    spliced_windows: int = key(512, "windows that switch domain in the middle, in total; 0 for none", within="[0, inf)")
    num_experts_per_tok: int = key(0, "experts per token of mixtures; 0 follows each checkpoint", within="[0, inf)")
    out_dir: str = key("out/cpu/report", "where results.json goes; rows already in it are kept")
    task_problems: int = key(200, "held-out problems per task, answered by greedy decoding", within="[1, inf)")
    max_new_tokens: int = key(128, "the longest answer, in tokens", within="[1, inf)")
    overwrite: bool = key(False, "discard an existing results.json, and score everything again")


def averaged(scores):
    """{name: score} plus their mean as "avg"; {} stays {}."""
    return {**scores, "avg": sum(scores.values()) / len(scores)} if scores else {}


def read_domains(corpus, config):
    """The domains that models were trained on, a list."""
    unread = split_list(config.unread)
    if unknown := set(unread) - set(corpus.domains):
        raise UserError(f"--unread={config.unread}: {min(unknown)!r} is not among the domains; name it there too")
    read = [domain for domain in corpus.domains if domain not in unread]
    if not read:
        raise UserError(f"--unread={config.unread} names all domains; leave out one that models were trained on")
    return read


def answer_marks(model, corpus, config):
    """{metric: {domain: [the mark of each held-out problem, from 0 to 1]}} for greedy answers; see data/task.py."""
    marks = {metric: {} for metric in METRICS}
    for domain, meta in corpus.metas.items():
        task = meta.get("task")
        if task is None:
            continue
        problems = corpus.problems(domain, config.split, config.task_problems)
        answers = written_answers(model, corpus.encoding, problems, task["marker"], config.max_new_tokens)
        for metric in METRICS.keys() & task["baselines"][config.split].keys():
            pairs = zip(answers, problems, strict=True)
            marks[metric][domain] = [METRICS[metric](answer, problem["answer"]) for answer, problem in pairs]
    return marks


def written_answers(model, encoding, problems, marker, max_new_tokens):
    """A model's greedy answer to each problem; see data/task.py. A prompt that leaves no room for an answer loses its
    beginning."""
    line_ends = {token for token in range(encoding.n_vocab) if b"\n" in encoding.decode_single_token_bytes(token)}
    new_tokens = max_new_tokens if marker else min(LINE_TOKENS, max_new_tokens)
    room = model.max_length - new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens={new_tokens} leaves no room for the question: the model takes {model.max_length} tokens"
        )
    ends = end_tokens(encoding, model.config.eos_token_id)
    stop = ends if marker else ends | line_ends
    unknown = unknown_ids(encoding, model.config.vocab_size)
    prompts = [encoding.encode_ordinary(problem["prompt"])[-room:] for problem in problems]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(prompts), GENERATED_ROWS):
        chosen = by_length[start : start + GENERATED_ROWS]
        texts = map(encoding.decode, generate(model, [prompts[i] for i in chosen], new_tokens, stop, unknown=unknown))
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = read_answer(text, marker)
    return answers


def choice_marks(model, corpus, config, after_text=False):
    """{domain: [1 for each held-out question whose right continuation is the likeliest of four per byte, else 0]}.

    after_text: put PASSAGE_TOKENS tokens of another domain's held-out text before each question, so that text and
    question need two experts. The questions are the same either way."""
    marks = {}
    for domain in (name for name, meta in corpus.metas.items() if "task" in meta):
        problems = corpus.problems(domain, config.split, config.task_problems)
        length = passage_length(model) if after_text else 0
        before = passages(corpus, domain, config.split, length, len(problems))
        marks[domain] = choose(model, corpus.encoding, problems, before)
    return marks


def together_marks(model, corpus, config):
    """Marks of the questions that need two experts at once (data/two_experts.py), for pairs of built-in domains:
    {"math + wiki": [1 or 0 for each question], ...} twice, for answers chosen from four and for written ones."""
    asked = {domain for domain, meta in corpus.metas.items() if "task" in meta}
    chosen, written = {}, {}
    for kind, problems in two_expert_questions(config.task_problems, asked).items():
        chosen[kind] = choose(model, corpus.encoding, problems, [[]] * len(problems))
        marker = corpus.metas["math"]["task"]["marker"] if kind == "math + wiki" else ""
        answers = written_answers(model, corpus.encoding, problems, marker, config.max_new_tokens)
        written[kind] = [int(answer == problem["answer"]) for answer, problem in zip(answers, problems, strict=True)]
    return chosen, written


def passage_length(model):
    """How many tokens of other text to put before a question: PASSAGE_TOKENS, or a quarter of the context if less."""
    return min(PASSAGE_TOKENS, model.max_length // 4)


@torch.no_grad()
def choose(model, encoding, problems, before, batch_size=32):
    """[1 for each problem whose first choice, the right one, is the likeliest of its four per byte, else 0].

    before: token ids of the text before each problem. A prompt that is too long loses its beginning: for all choices
    alike it makes room for the longest one and for a passage of passage_length tokens, even if there is no passage.
    """
    device = next(model.parameters()).device
    rows, own = [], []  # token ids of each continuation with everything before it; how many are its own
    for passage, problem in zip(before, problems, strict=True):
        choices = [encode_continuation(encoding, choice) for choice in problem["choices"]]
        room = model.max_length + 1 - passage_length(model) - max(map(len, choices))
        prompt = encoding.encode_ordinary(problem["prompt"])[-max(1, room) :]
        rows += [(passage + prompt + choice)[-model.max_length - 1 :] for choice in choices]
        own += [min(len(choice), model.max_length) for choice in choices]
    sizes = [len(choice.encode()) for problem in problems for choice in problem["choices"]]
    nats_per_byte = []  # of each continuation
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)  # (B, T + 1)
        losses = model(ids[:, :-1], ids[:, 1:]).losses  # (B, T)
        for i, row in enumerate(batch, start):
            # the continuation's own tokens, without those before it and without padding
            nats = losses[i - start, len(row) - 1 - own[i] : len(row) - 1].sum().item()
            nats_per_byte.append(nats / sizes[i])
    questions = [nats_per_byte[i : i + CHOICES] for i in range(0, len(nats_per_byte), CHOICES)]
    return [int(min(choices) == choices[0]) for choices in questions]


def passages(corpus, domain, split, length, count):
    """`count` lists of `length` tokens of held-out text, from the other domains in turn; empty lists if there is no
    other domain."""
    others = [name for name in corpus.domains if name != domain]
    if not length or not others:
        return [[]] * count
    turns = math.ceil(count / len(others))
    windows = [corpus.windows(name, split, length, turns)[0].tolist() for name in others]
    return [windows[i % len(others)][i // len(others) % len(windows[i % len(others)])] for i in range(count)]


class Entry(NamedTuple):
    """A row to make: its name, an id of its weights, the history of training behind them, and a loader of the model."""

    name: str
    id: str
    history: dict
    load: Callable


def checkpoint_entry(model, k=0):
    """(the Entry of a finished checkpoint, its folder). model: FOLDER, or ROW=FOLDER to name the row. k: a mixture's
    experts per token; 0 keeps the checkpoint's own number."""
    name, equals, folder = model.partition("=")
    if os.path.isdir(model) or not equals:  # a path may contain =
        name, folder = model.removeprefix("hf:"), model
    folder = local_folder(folder)
    identity, history = parent_of(folder)
    name = os.path.basename(os.path.abspath(name))
    changes = {"num_experts_per_tok": k} if k and ModelConfig.from_pretrained(folder).num_local_experts else {}
    identity = hash_of([identity, changes]) if changes else identity
    return Entry(name, identity, history, lambda: Transformer.from_pretrained(folder, **changes)), folder


def score(entry, model, windows, spliced, corpus, config):
    """One row of results.json: scores, parameters, and the cost of all training behind the weights.

    windows, spliced: {name: (inputs, targets)}, from Corpus.windows for each domain and from Corpus.spliced.
    """
    cost = total_cost(entry.history)
    active, total = model.num_parameters()
    scores = validation_scores(model, windows, corpus.token_bytes)
    bpb = scores["bpb"]
    scores["bpb"] = averaged({domain: bpb[domain] for domain in read_domains(corpus, config)})
    if config.unread:
        scores["unread"] = averaged({domain: bpb[domain] for domain in split_list(config.unread)})
    if spliced:
        mixed = validation_scores(model, spliced, corpus.token_bytes)
        scores["spliced"] = mixed["bpb"]
        scores["bits"] |= mixed["bits"]
    every = {**windows, **spliced}
    scores["bytes"] = {name: corpus.token_bytes[targets].sum(dim=1).tolist() for name, (_, targets) in every.items()}
    if "load" in scores:
        scores["experts"] = model.config.expert_names
    if hasattr(model, "settings"):  # what an ensemble chose for itself
        scores["settings"] = model.settings
    marks = answer_marks(model, corpus, config)
    marks["choice"] = choice_marks(model, corpus, config)
    marks["switched"] = choice_marks(model, corpus, config, after_text=True)
    marks["together"], marks["together_written"] = together_marks(model, corpus, config)
    means = {metric: {name: sum(some) / len(some) for name, some in found.items()} for metric, found in marks.items()}
    return {
        "name": entry.name,
        "id": entry.id,
        "active_params": active,
        "total_params": total,
        "train_tokens": cost["tokens"],
        "train_flops": cost["flops"],
        "seconds": cost["seconds"],
        "runs": list(entry.history),
        "source": source(),
        **scores,
        **means,
        **{metric: averaged(means[metric]) for metric in ("choice", "switched", "together", "together_written")},
        "marks": marks,
    }


def read_results(path):
    """results.json, as this script wrote it."""
    found = read_json(path, "make it first: python eval.py --model=DIR,DIR")
    rows = found.get("rows") if isinstance(found, dict) else None
    needed = {"name", "id", "bpb", "accuracy", "runs"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise UserError(f"{path} was not written by eval.py; choose another folder or move it away")
    return found


def results_so_far(path, corpus, config, keep):
    """The existing results.json, or an empty one if there is none or not `keep`. UserError if its settings or data
    differ."""
    tasks = {domain: meta["task"] for domain, meta in corpus.metas.items() if "task" in meta}
    fresh = {
        "rows": [],
        "config": {name: getattr(config, name) for name in SETTINGS},
        "data": {
            domain: {name: meta[name] for name in ("content_hash", "tokenizer_hash")}
            for domain, meta in corpus.metas.items()
        },
        "baselines": {domain: task["baselines"][config.split] for domain, task in tasks.items()},
        "versions": versions(),
    }
    if not keep or not os.path.exists(path):
        return fresh
    found = read_results(path)
    if any(found.get(name) != fresh[name] for name in ("config", "data", "baselines")):
        raise UserError(f"{path} was made with other settings or data; use --overwrite=True or another --out_dir")
    return found


def check_fits(entry, model, corpus, config):
    """Raise UserError unless the windows fit the model and it knows all tokens that occur in them."""
    if config.sequence_length > model.max_length:
        raise UserError(
            f"--sequence_length={config.sequence_length} is longer than {entry.name} takes, {model.max_length} tokens"
        )
    corpus.check_vocabulary(entry.name, model.config.vocab_size)


def evaluate(config, corpus, entries):
    """Bring results.json up to date with a row for each Entry, scoring only those it does not have yet. Several
    processes may do this at once."""
    if len({entry.name for entry in entries}) < len(entries):
        raise UserError(f"--model={config.model}: two rows would share a name; name one with ROW=FOLDER")
    device = pick_device(config.device, config.threads)
    path = os.path.join(config.out_dir, "results.json")
    with locked(config.out_dir, wait=True):  # report a folder that cannot be written now, not after hours
        if not os.access(config.out_dir, os.W_OK):
            raise UserError(f"{config.out_dir} is read-only; choose another --out_dir")
    keep = not config.overwrite  # False only until the first new row has replaced the old results
    rows = {row["name"]: row for row in results_so_far(path, corpus, config, keep)["rows"]}
    todo = [entry for entry in entries if rows.get(entry.name, {}).get("id") != entry.id]
    length, count = config.sequence_length, config.eval_windows
    windows = {domain: corpus.windows(domain, config.split, length, count) for domain in corpus.domains if todo}
    read = Corpus(config.data_dir, ",".join(read_domains(corpus, config)))
    spliced = read.spliced(config.split, length, config.spliced_windows) if todo and config.spliced_windows else {}
    for entry in tqdm(todo, desc="evaluate", unit="model", dynamic_ncols=True, disable=not todo):
        model = place(entry.load(), device, config.dtype)
        check_fits(entry, model, corpus, config)
        rows[entry.name] = score(entry, model, windows, spliced, corpus, config)
        with locked(config.out_dir, wait=True):
            results = results_so_far(path, corpus, config, keep)
            others = {row["name"]: row for row in results["rows"]}
            write_json(path, {**results, "rows": list({**others, entry.name: rows[entry.name]}.values())})
        keep = True
    for entry in entries:
        row = rows[entry.name]
        if files := changed_files(row.get("source", {})):
            names = " and ".join(files)
            print(f"{path}: {entry.name} was scored before {names} changed; --overwrite=True scores all rows again")
        scores = {f"{domain} bits per byte": value for domain, value in row["bpb"].items()}
        scores |= {f"{task} accuracy": value for task, value in row["accuracy"].items()}
        print(f"{entry.name:14s} " + "  ".join(f"{what} {value:.3f}" for what, value in scores.items()))


def main():
    config = parse(EvalConfig)
    models = split_list(config.model)
    if not models:
        raise UserError("nothing to evaluate; give --model=DIR or --model=DIR,DIR")
    corpus = Corpus(config.data_dir, config.domains)
    read_domains(corpus, config)
    k = config.num_experts_per_tok
    entries, folders = zip(*(checkpoint_entry(model, k) for model in models), strict=True)
    same_tokenizer([config.data_dir, *folders])
    evaluate(config, corpus, entries)


if __name__ == "__main__":
    command(main)
