"""What training cost, counted over every run behind a checkpoint: seconds side by side, bytes between workers.

Tokens, FLOPs and seconds of one run are in its run.json (model.flops_per_token has the FLOPs' formula).
"""

from typing import NamedTuple

from common.device import shapes_alone
from common.run import read_run
from model import ModelConfig, Transformer
from train import freeze

WORKERS = 8
NUMBER_BYTES = 4  # gradients and weights travel in fp32


class Run(NamedTuple):
    """One training or mixing run and its own cost. parents: the runs it starts from. before: all runs behind it.
    parameters: how many train, and so have gradients to send."""

    parents: tuple
    before: frozenset
    seconds: float
    steps: int
    parameters: int


def own_cost(run):
    """The tokens, FLOPs and seconds of a run.json's own run, without those before it; zeros where nothing trained."""
    nothing = {"tokens": 0, "flops": 0, "seconds": 0.0}
    return run["history"].get(run["recipe"]["config"]["out_dir"], nothing)


def flops_per_token(run):
    """Training FLOPs of a token in a run.json's own run."""
    return own_cost(run)["flops"] / own_cost(run)["tokens"]


def split_budget(flops, share, branch, mixture):
    """(tokens of all branches, tokens of the finetuning) that take `flops` together, the branches a `share` of the
    tokens. branch, mixture: FLOPs a token."""
    tokens = flops / (share * branch + (1 - share) * mixture)
    return share * tokens, (1 - share) * tokens


def trained_numbers(model):
    """How many numbers of a model get gradients, which is what workers send."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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
        with shapes_alone():
            model = Transformer(ModelConfig.from_pretrained(folder))
        freeze(model, run["recipe"]["config"].get("freeze", "none"))
        found[folder] = Run(tuple(known), before, own_cost(run)["seconds"], run.get("step", 0), trained_numbers(model))
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


def exchange_bytes(rows, width, expert_parallel, number_bytes=NUMBER_BYTES):
    """Bytes that a step's all-to-all sends, all workers together, where routing is even (common/expert_parallel.py).

    rows: (token, expert) pairs in all layers, which is tokens times the sum of k; width: numbers in each; number_bytes:
    bytes of one, in the activations' dtype. A row goes to its expert and back, and so do the two gradients; activations
    that are computed twice add half as much. One in expert_parallel rows stays at home. With it, a step's gradients are
    step_bytes of all else among the workers, and of the experts among workers / expert_parallel.
    """
    return 4 * rows * width * number_bytes * (expert_parallel - 1) / expert_parallel


def bytes_sent(runs, workers=WORKERS):
    """Bytes that data-parallel training on `workers` machines would have sent, all of them together.

    Gradients of all of a mixture's experts are among them, those of frozen parts are not. Runs that can go side by side
    share the workers evenly, so each of N branches has w = workers / N and nothing passes between branches.
    """
    trained = {folder: run for folder, run in runs.items() if run.steps}
    total = 0
    for folder, run in trained.items():
        beside = [f for f, other in trained.items() if f not in run.before and folder not in other.before]
        total += run.steps * step_bytes(run.parameters, workers / len(beside))
    return total
