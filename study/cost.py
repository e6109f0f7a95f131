"""What training cost, counted over every run behind a checkpoint: seconds side by side, bytes between workers.

Tokens, FLOPs and seconds of one run are in its run.json (model.flops_per_token has the FLOPs' formula).
"""

import math
from typing import NamedTuple

from common.runs import read_run
from common.weights import expected_tensors
from model import ModelConfig

WORKERS = 8
GRADIENT_BYTES = 4  # gradients travel in fp32


class Run(NamedTuple):
    """One training or mixing run and its own cost. parents: the runs it starts from. before: all runs behind it."""

    parents: tuple
    before: frozenset
    seconds: float
    steps: int
    parameters: int


def lineage(folders):
    """{folder: Run} for finished checkpoints and all runs behind them, each after its parents.

    Weights from elsewhere have no run.json and cost nothing here. Mixing trains nothing: 0 steps.
    """
    found = {}
    for folder in folders:
        run = read_run(folder)
        if run is None or folder in found:
            continue
        parents = tuple(run["recipe"]["parents"])
        found |= {name: one for name, one in lineage(parents).items() if name not in found}
        known = [name for name in parents if name in found]
        before = frozenset(known).union(*(found[name].before for name in known))
        own = run["history"].get(run["recipe"]["config"]["out_dir"], {"seconds": 0.0})
        shapes = expected_tensors(ModelConfig.from_pretrained(folder))
        parameters = sum(math.prod(shape) for shape in shapes.values())
        found[folder] = Run(tuple(known), before, own["seconds"], run.get("step", 0), parameters)
    return found


def critical_seconds(runs):
    """Seconds of the longest path through {folder: Run}: how long training takes when branches run side by side."""
    finish = {}
    for folder, run in runs.items():
        finish[folder] = run.seconds + max((finish[parent] for parent in run.parents), default=0.0)
    return max(finish.values(), default=0.0)


def ring_bytes(parameters, workers):
    """Bytes that all workers of a ring all-reduce send together, an equal share each.

    A ring passes the parameters / workers gradients of a part on workers - 1 times to sum them and workers - 1 times to
    spread the sums, and does so for all parts at once.
    """
    return 2 * (workers - 1) * parameters * GRADIENT_BYTES


def bytes_sent(runs, workers=WORKERS):
    """Bytes that data-parallel training on `workers` machines would have sent, all of them together.

    A ring all-reduce of P gradients over w workers sends 2 (w - 1) P numbers a step, all of a mixture's experts
    included. Runs that can go side by side share the workers evenly, so each of N branches has w = workers / N
    and nothing passes between branches.
    """
    trained = {folder: run for folder, run in runs.items() if run.steps}
    total = 0
    for folder, run in trained.items():
        beside = [f for f, other in trained.items() if f not in run.before and folder not in other.before]
        total += run.steps * ring_bytes(run.parameters, max(1, workers / len(beside)))
    return total
