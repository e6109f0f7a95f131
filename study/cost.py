"""What training cost, counted over every run behind a checkpoint: seconds side by side, bytes between workers.

Tokens, FLOPs and seconds of one run are in its run.json (model.flops_per_token has the FLOPs' formula).
"""

import math
from typing import NamedTuple

from common.runs import read_run
from common.weights import expected_tensors
from model import ModelConfig

WORKERS = 8
NUMBER_BYTES = 4  # gradients and weights travel in fp32


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


def step_bytes(parameters, workers, shard_size=1, micro_batches=1):
    """Bytes that one training step on `workers` machines sends, all of them together (common/parallel.py).

    Rings: an all-reduce of P numbers over w sends 2 (w - 1) P, a gather or a reduce-scatter (w - 1) P. With shard_size
    s there are w / s copies: each micro-batch gathers weights twice and reduces gradients once within each of them,
    and once a step the s rings across the copies average the pieces. s = 1 is plain data parallelism, 2 (w - 1) P.
    """
    copies = workers / shard_size
    within = micro_batches * 3 * copies * (shard_size - 1)
    across = 2 * max(0, copies - 1)  # half a worker, where branches outnumber the workers, sends nothing
    return (within + across) * parameters * NUMBER_BYTES


def bytes_sent(runs, workers=WORKERS):
    """Bytes that data-parallel training on `workers` machines would have sent, all of them together.

    Gradients of all of a mixture's experts are among them. Runs that can go side by side share the workers evenly, so
    each of N branches has w = workers / N and nothing passes between branches.
    """
    trained = {folder: run for folder, run in runs.items() if run.steps}
    total = 0
    for folder, run in trained.items():
        beside = [f for f, other in trained.items() if f not in run.before and folder not in other.before]
        total += run.steps * step_bytes(run.parameters, workers / len(beside))
    return total
