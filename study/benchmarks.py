"""Benchmarks that people know, through lm-eval on any checkpoint that transformers loads.

    python -m study.benchmarks --model=out/smollm/btx --tasks=arc_easy,hellaswag --out_dir=out/smollm/report

Scores go into the model's row of the results.json that eval.py wrote there, under "benchmarks": {task: what lm-eval
says, standard errors, the number of examples in a prompt and the task's version included}. Tasks are downloaded by
name; a folder of one's own (--include) needs no network: a YAML file for each task, the questions in JSON lines. Needs
the package lm-eval (requirements-extra.txt).
"""

import dataclasses
import os

from common import run as runs
from common.config import key, parse, split_list
from common.device import device_key, pick_device, threads_key
from common.errors import UserError, command, write_json
from common.hf import LIKE_MIXTRAL, local_folder
from eval import checkpoint_entry
from model import ModelConfig


@dataclasses.dataclass
class BenchmarkConfig:
    """Score checkpoints on the tasks of lm-eval."""

    model: str = key("", "checkpoint folders or hf:OWNER/NAME, separated by commas; those of eval.py")
    tasks: str = key("arc_easy,arc_challenge,hellaswag", "lm-eval's names of tasks, such as triviaqa, gsm8k, humaneval")
    include: str = key("", "a folder of tasks to use instead of lm-eval's own")
    out_dir: str = key("out/cpu/report", "the folder with the results.json of eval.py")
    limit: int = key(0, "questions of each task, 0 for all", within="[0, inf)")
    batch_size: int = key(16, "questions scored together", within="[1, inf)")
    run_code: bool = key(False, "run what a model writes on this machine, as humaneval and mbpp do")
    device: str = device_key()
    dtype: str = key("float32", "precision of weights and activations", ("float32", "bfloat16"))
    threads: int = threads_key()
    overwrite: bool = key(False, "score tasks again that are there already")


def find_tasks(config):
    """(lm-eval's scoring function, its TaskManager, the names of the tasks)."""
    try:
        import accelerate  # noqa: F401  (lm-eval says only in the middle of things that it is missing)
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("study.benchmarks needs lm-eval; pip install -r requirements-extra.txt") from None
    manager = TaskManager(include_path=config.include or None, include_defaults=not config.include)
    names = split_list(config.tasks)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        where = config.include or "lm-eval"
        raise UserError(f"--tasks={config.tasks}: {where} has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    return simple_evaluate, manager, names


def score(folder, names, simple_evaluate, manager, config):
    """{task: {"acc,none": 0.41, "acc_stderr,none": 0.01, ..., "version", "examples", "limit"}} of a checkpoint."""
    if config.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        found = simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder},dtype={config.dtype}",
            tasks=names,
            task_manager=manager,
            device=str(pick_device(config.device, config.threads)),
            batch_size=config.batch_size,
            limit=config.limit or None,
            confirm_run_unsafe_code=config.run_code,
        )
    except Exception as error:  # of a dozen packages behind lm-eval, a class each
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"--tasks={','.join(names)} on {folder} failed ({type(error).__name__}: {reason}); check the network, and "
            "--run_code=True for tasks that run code"
        ) from None
    scores = {}
    for task, values in found["results"].items():
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        about = {"version": found["versions"].get(task), "examples": found["n-shot"].get(task), "limit": config.limit}
        scores[task] = numbers | about
    return scores


def main():
    config = parse(BenchmarkConfig)
    folders = [local_folder(name) for name in split_list(config.model)]
    if not folders:
        raise UserError("nothing to score; give --model=DIR or --model=DIR,DIR")
    path = os.path.join(config.out_dir, "results.json")
    results = runs.read_results(path)
    rows = {(row["name"], row["id"]): row for row in results["rows"]}
    entries = [checkpoint_entry(folder) for folder in folders]
    for folder, entry in zip(folders, entries, strict=True):
        if (entry.name, entry.id) not in rows:
            raise UserError(f"{path} has no row of {folder}; make it first: python eval.py --model={folder}")
        if (router := ModelConfig.from_pretrained(folder).router) not in LIKE_MIXTRAL:
            raise UserError(f"{folder} has the router {router!r}, which transformers and so lm-eval do not know")
    simple_evaluate, manager, names = find_tasks(config)
    for folder, entry in zip(folders, entries, strict=True):
        scores = rows[entry.name, entry.id].setdefault("benchmarks", {})
        done = {name for name, values in scores.items() if values["limit"] == config.limit and not config.overwrite}
        if todo := [name for name in names if name not in done]:
            scores |= score(folder, todo, simple_evaluate, manager, config)
            write_json(path, results)
        for name in names:
            print(f"{entry.name:14s} {name:16s} " + "  ".join(f"{k} {v}" for k, v in scores[name].items()))


if __name__ == "__main__":
    command(main)
