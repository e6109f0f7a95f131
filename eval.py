"""Evaluate checkpoints: bits per byte on fixed windows, answers to held-out problems, where the router sends tokens.

    python eval.py config/cpu/eval.py --model=out/cpu/btx
    python eval.py config/cpu/eval.py --experts=out/cpu/expert-code,out/cpu/expert-math,out/cpu/seed

The second is Branch-Train-Merge: the experts as an ensemble (btm.py).
Each model becomes a row of out_dir/results.json. Every model sees the same windows and the same problems.
"""

import dataclasses
import functools
import json
import math
import os
import platform
from importlib.metadata import version

import torch
from tqdm import tqdm

from common import checkpoint
from common.config import UserError, command, key, parse, read_json, write_atomically
from common.device import device_key, pick_device, place, threads_key
from common.loader import held_out_windows, list_domains, read_meta
from common.split import HELD_OUT
from common.tokenizer import load_tokenizer, token_bytes
from data.task import METRICS, mean_score, read_answer
from model import generate
from study import btm

LINE_TOKENS = 48  # enough for a line to complete, and most of a context of 256 is left for what precedes it


@dataclasses.dataclass
class EvalConfig:
    """Evaluate one or several checkpoints, and the ensembles of Branch-Train-Merge."""

    model: str = key("", "checkpoint folders, separated by commas; a row each, named after the folder")
    experts: str = key("", "checkpoint folders to run as ensembles; a row for each way to weigh them (btm.py)")
    out_dir: str = key("out/cpu/report", "where results.json goes; rows already there are kept")
    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    split: str = key("test", "held-out text and problems to score: val for searching, test for reporting", HELD_OUT)
    sequence_length: int = key(256, "tokens a window", minimum=1)
    eval_windows: int = key(128, "windows per domain", minimum=1)
    task_problems: int = key(200, "held-out problems per task, answered by greedy decoding", minimum=1)
    max_new_tokens: int = key(128, "the longest answer, in tokens", minimum=1)
    device: str = device_key()
    dtype: str = key("float32", "precision of activations", ("float32", "bfloat16"))
    threads: int = threads_key()
    overwrite: bool = key(False, "discard a results.json made with other settings or data")


class Validation:
    """Fixed windows of every domain's split ("val" or "test"), and how many bytes each token stands for."""

    def __init__(self, data_dir, sequence_length, count, split="val", batch_size=16):
        self.windows = {
            domain: held_out_windows(data_dir, domain, split, sequence_length, count)
            for domain in list_domains(data_dir)
        }
        self.bytes = torch.from_numpy(token_bytes(load_tokenizer(data_dir)))
        self.batch_size = batch_size

    @torch.no_grad()
    def scores(self, model):
        """{"bpb": {domain: bits per byte, "avg": their mean}}, and for a mixture "load": {domain: L x E shares}.

        Bits per byte = nats summed over tokens / (ln 2 * bytes summed), comparable between tokenizers. A share is
        the part of a layer's (token, expert) pairs that went to an expert; the E shares of a layer sum to 1.
        """
        device = next(model.parameters()).device
        bpb, load = {}, {}
        for domain, (inputs, targets) in self.windows.items():
            nats, pairs = 0.0, 0
            for x, y in zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True):
                output = model(x.to(device), y.to(device))
                nats += output.loss.item() * y.numel()
                if output.gates is not None:
                    pairs = pairs + (output.gates > 0).sum(dim=(1, 2)).cpu()  # (L, E)
            bpb[domain] = nats / math.log(2) / int(self.bytes[targets].sum())
            if torch.is_tensor(pairs):
                shares = pairs / pairs.sum(dim=1, keepdim=True)
                load[domain] = [[round(share, 4) for share in layer] for layer in shares.tolist()]
        bpb["avg"] = sum(bpb.values()) / len(bpb)
        return {"bpb": bpb, "load": load} if load else {"bpb": bpb}


def task_scores(model, config):
    """{metric: {domain: mean over held-out problems}}, for greedy answers; see data/task.py. A prompt too long to leave
    room for an answer loses its beginning."""
    encoding = load_tokenizer(config.data_dir)
    line_ends = {token for token in range(encoding.n_vocab) if b"\n" in encoding.decode_single_token_bytes(token)}
    scores = {metric: {} for metric in METRICS}
    for domain in list_domains(config.data_dir):
        task = read_meta(config.data_dir, domain).get("task")
        if task is None:
            continue
        new_tokens = config.max_new_tokens if task["marker"] else min(LINE_TOKENS, config.max_new_tokens)
        room = model.max_length - new_tokens
        if room < 1:
            raise UserError(f"--max_new_tokens={new_tokens} leaves no room to ask: the model takes {model.max_length}")
        with open(os.path.join(config.data_dir, domain, f"task-{config.split}.jsonl")) as file:
            problems = [json.loads(line) for line in file][: config.task_problems]
        stop = {encoding.eot_token} if task["marker"] else {encoding.eot_token, *line_ends}
        answers = []
        for start in range(0, len(problems), 100):
            prompts = [encoding.encode_ordinary(problem["prompt"])[-room:] for problem in problems[start : start + 100]]
            texts = map(encoding.decode, generate(model, prompts, new_tokens, stop))
            answers += [read_answer(text, task["marker"]) for text in texts]
        for metric in task["baselines"][config.split]:
            scores[metric][domain] = mean_score(metric, answers, problems)
    return scores


def load_rows(config):
    """Yield (row name, its id, history of training runs, function that loads the model)."""
    for folder in filter(None, config.model.split(",")):
        identity, history = checkpoint.parent(folder)
        yield os.path.basename(os.path.normpath(folder)), identity, history, lambda f=folder: checkpoint.load_model(f)
    if config.experts:
        folders = config.experts.split(",")
        parents = [checkpoint.parent(folder) for folder in folders]
        history = checkpoint.joint_history(one for _, one in parents)
        device = pick_device(config.device, config.threads)
        for name, load in btm.ENSEMBLES.items():
            identity = checkpoint.recipe_id([name, *(identity for identity, _ in parents)])
            arguments = folders, config.data_dir, config.sequence_length, device
            yield name, identity, history, functools.partial(load, *arguments)


def evaluate_row(name, identity, history, model, validation, config):
    """One row of results.json: scores, parameters, and the cost of all training behind the weights."""
    cost = checkpoint.total_cost(history)
    active, total = model.num_parameters()
    scores = validation.scores(model)
    if "load" in scores:
        scores["experts"] = model.config.expert_names
    return {
        "name": name,
        "id": identity,
        "active_params": active,
        "total_params": total,
        "train_tokens": cost["tokens"],
        "train_flops": cost["flops"],
        "seconds": cost["seconds"],
        "runs": list(history),
        **scores,
        **task_scores(model, config),
    }


def versions():
    """{name: version} of what decides a run's digits."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}}


def read_results(config):
    """results.json as it stands, or an empty one; refused when its settings or data differ."""
    settings = ("data_dir", "split", "sequence_length", "eval_windows", "task_problems", "max_new_tokens", "dtype")
    metas = {domain: read_meta(config.data_dir, domain) for domain in list_domains(config.data_dir)}
    fresh = {
        "rows": [],
        "config": {name: getattr(config, name) for name in settings},
        "data": {
            domain: {name: meta[name] for name in ("content_hash", "tokenizer_hash")} for domain, meta in metas.items()
        },
        "baselines": {
            domain: meta["task"]["baselines"][config.split] for domain, meta in metas.items() if "task" in meta
        },
        "versions": versions(),
    }
    path = os.path.join(config.out_dir, "results.json")
    if not os.path.exists(path):
        return fresh
    found = read_json(path, "delete it and run again")
    if any(found.get(name) != fresh[name] for name in ("config", "data", "baselines")) and not config.overwrite:
        raise UserError(f"{path} was made with other settings or data; use --overwrite=True or another --out_dir")
    return fresh if config.overwrite else found


def main():
    config = parse(EvalConfig)
    if not config.model and not config.experts:
        raise UserError("nothing to evaluate; give --model=DIR or --experts=DIR,DIR")
    device = pick_device(config.device, config.threads)
    validation = Validation(config.data_dir, config.sequence_length, config.eval_windows, config.split)
    results = read_results(config)
    os.makedirs(config.out_dir, exist_ok=True)
    rows = {row["name"]: row for row in results["rows"]}
    todo = list(load_rows(config))
    names = [name for name, *_ in todo]
    if len(set(names)) < len(names):
        raise UserError(f"--model={config.model}: two rows would have one name; evaluate them into different --out_dir")
    checkpoint.same_tokenizer([config.data_dir, *filter(None, f"{config.model},{config.experts}".split(","))])
    for name, identity, history, load in tqdm(todo, desc="evaluate", unit="model"):
        if name not in rows or rows[name]["id"] != identity:
            model = place(load(), device, config.dtype)
            if config.sequence_length > model.max_length:
                raise UserError(
                    f"--sequence_length={config.sequence_length} is longer than {name} takes: {model.max_length}"
                )
            rows[name] = evaluate_row(name, identity, history, model, validation, config)
            results["rows"] = list(rows.values())
            write_atomically(os.path.join(config.out_dir, "results.json"), json.dumps(results, indent=1) + "\n")
        bits, right = rows[name]["bpb"], rows[name]["accuracy"]
        scores = {
            **{f"{d} bits per byte": v for d, v in bits.items()},
            **{f"{t} accuracy": v for t, v in right.items()},
        }
        tqdm.write(f"{name:14s}" + "  ".join(f"{what} {value:.3f}" for what, value in scores.items()))


if __name__ == "__main__":
    command(main)
