"""Where the time of a step goes, and what a run costs beside its steps: data, checkpoints, start-up. See bench.py."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch

from common.corpus import Batches
from common.ops import collect, dispatch, head_loss, lay_out
from common.parallel import Processes
from common.run import new_state, save_state

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# a process from its first line to the end of its first step
START_UP = """
import time
times = [time.{clock}()]
import json, sys, torch, train
times.append(time.{clock}())
config, shape, dtype, device = json.loads(sys.argv[1])
device = train.pick_device(device, config["threads"])
model = train.Transformer(train.ModelConfig(**shape)).to(device)
model.compute_dtype = getattr(torch, dtype)
optimizer = train.make_optimizer(train.TrainConfig(), model)
times.append(time.{clock}())
ids = torch.zeros(config["batch_size"], config["sequence_length"], dtype=torch.long, device=device)
output = model(ids, ids, step=torch.zeros((), device=device))
(output.loss + output.aux_loss).backward()
optimizer.step()
output.loss.item()
times.append(time.{clock}())
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""


# ---- the clock ----


def timed(config, device, function):
    """Seconds that a function takes, the device's work included."""
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def in_turns(config, device, functions, warm=2):
    """{name: [seconds]} of functions that take turns; the first turns do not count."""
    times = {name: [] for name in functions}
    for turn in range(warm + config.turns):
        for name, function in functions.items():
            seconds = timed(config, device, function)
            if turn >= warm:
                times[name].append(seconds)
    return times


# ---- a step, and what is beside it ----


def shares(config, subject, device):
    """{part: share of a training step}: forward and backward of each part alone, over the whole step. The rest is
    norms, embeddings, residual additions and the router's losses."""
    model, size = subject.model, (config.batch_size, config.sequence_length)
    layer, count = model.model.layers[-1], config.layers
    x = torch.randn(*size, model.config.hidden_size, device=device, dtype=model.compute_dtype, requires_grad=True)
    ids = torch.randint(config.vocab_size, size, device=device)
    cos, sin = (table[: size[1]].to(x.dtype) for table in (model.cos, model.sin))
    moe = getattr(layer, "block_sparse_moe", None)

    def step():
        subject.loss(ids, ids).backward()

    def back(y):
        y.backward(torch.ones_like(y))

    functions = {
        "step": step,
        "attention": lambda: back(layer.self_attn(x, cos, sin)),
        "feed-forward" if moe is None else "mixture": lambda: back(layer.mlp(x) if moe is None else moe(x)[0]),
        "head and loss": lambda: head_loss(x.flatten(0, 1), model.lm_head.weight, ids.flatten()).backward(),
        "optimizer": subject.optimizer.step,
    }
    if moe is not None:
        flat = x.detach().flatten(0, 1).requires_grad_()  # (S, D)
        chosen = torch.rand(len(flat), len(moe.experts.w1), device=device).topk(moe.k).indices  # (S, k)
        places, tokens, ends = lay_out(chosen, len(moe.experts.w1), x.dtype)
        rows = dispatch(flat, tokens, places).detach().requires_grad_()

        def sort():
            places, tokens, _ = lay_out(chosen, len(moe.experts.w1), x.dtype)
            back(collect(dispatch(flat, tokens, places), places))

        functions["of these, routing"] = lambda: back(moe.router.choose(moe.gate(flat.float()), moe.k, None)[0])
        functions["sorting"] = sort
        functions["experts"] = lambda: back(moe.experts(rows, ends))
    times = {name: statistics.median(values) for name, values in in_turns(config, device, functions).items()}
    whole = times.pop("step") + times["optimizer"]
    return {name: (1 if name in ("head and loss", "optimizer") else count) * t / whole for name, t in times.items()}


def beside(config, subject, device):
    """{part: seconds} of a batch of data, half of it spliced, and of a checkpoint: weights and optimizer."""
    text = np.random.default_rng(1).integers(config.vocab_size, size=2**20, dtype=np.uint16)
    corpus = SimpleNamespace(tokens=lambda domain, split, length: text)
    batches = Batches(corpus, {"text": 1.0}, config.sequence_length, config.batch_size, seed=1, splice=0.5)

    def save():
        save_state(folder, new_state(), subject.model, subject.optimizer, Processes(device))
        subject.model.save_pretrained(folder)

    with tempfile.TemporaryDirectory() as folder:
        functions = {"a batch of data": lambda: batches(0, 0, config.batch_size), "a checkpoint": save}
        times = in_turns(config, device, functions)
    return {name: statistics.median(values) for name, values in times.items()}


def start_up(config, model, device):
    """{part: seconds} of a new process until it has made its first step: imports, model and optimizer, the step."""
    clock = "perf_counter" if config.clock == "wall" else "process_time"
    dtype = str(model.compute_dtype).removeprefix("torch.")
    arguments = json.dumps([dataclasses.asdict(config), dataclasses.asdict(model.config), dtype, device.type])
    command = [sys.executable, "-c", START_UP.format(clock=clock), arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(zip(("imports", "model", "first step"), json.loads(done.stdout), strict=True))
