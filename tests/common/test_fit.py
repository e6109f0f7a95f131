"""Memory counted before a run, against what autograd really keeps, and activations computed twice."""

import os

import pytest
import torch
from common.fit import count_memory, kept_bytes
from helpers import ROOT, SHAPE, SHORT, must, run, same_bits
from test_routing import random_model

import train
from common.config import parse
from common.errors import command
from finetune import FinetuneConfig, build_model
from model import ROUTERS

ACTIVATIONS = "activations of a micro-batch"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", [{"num_local_experts": 0}, {"router": "topk"}, {"router": "sample"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_without_numbers_as_with_them(dtype, shape, recompute):
    """The traced model keeps what the real one keeps."""
    model = random_model(**shape)
    model.compute_dtype, model.recompute = dtype, recompute
    counted = count_memory(model, 6, 48)[ACTIVATIONS]
    assert counted == pytest.approx(kept_bytes(model, 6, 48), rel=0.1)  # weights that are cast, and padding


def test_parts_by_hand():
    model = random_model(num_local_experts=0)
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = list(count_memory(model, 2, 30).values())
    assert parts[:4] == [4 * total, 4 * total, 8 * total, 0] and parts[5] == 2 * 30 * 80 * 12
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers]
    spread = list(count_memory(model, 2, 30, shards=4).values())  # three layers, of which two are there at a time
    assert spread[:4] == [total, total, 2 * total, 4 * (total - layers[0])] and spread[4:] == parts[4:]
    model.lm_head.weight.requires_grad = False
    assert list(count_memory(model, 2, 30).values())[1] == 4 * (total - 80 * 16)


@pytest.mark.parametrize("router", ROUTERS)
def test_computing_activations_twice_changes_no_bit_and_keeps_less(router):
    found, ids = [], torch.randint(80, (2, 30))
    for recompute in (False, True):
        model = random_model(router=router)
        model.recompute = recompute
        torch.manual_seed(3)
        output = model(ids, ids, step=torch.tensor(7))
        (output.loss + output.aux_loss).backward()
        found.append([output.loss, *(parameter.grad for parameter in model.parameters())])
        found.append(kept_bytes(model, 2, 30))
    assert all(ours.equal(theirs) for ours, theirs in zip(found[0], found[2], strict=True))
    assert found[3] < found[1] / 4


def test_dry_run_prints_and_leaves_nothing(data, tmp_path):
    done = must(run("train.py", *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/run", "--dry_run=True"))
    assert "parameters" in done.out and "together" in done.out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["gpu", "gpu80"])
def test_what_the_gpu_sizes_need_is_counted_on_a_cpu(size, data, seed, mixed, tmp_path, capsys):
    """The seed at its full size; the stages after it from this suite's small models."""
    here = f"--data_dir={data}", f"--out_dir={tmp_path}/run", "--device=cpu", "--domain=all", "--dry_run=True"
    stages = {"seed": (train.TrainConfig, train.build_model, [])}
    stages["expert"] = train.TrainConfig, train.build_model, [f"--init_from={seed}", "--sequence_length=32"]
    stages["finetune"] = FinetuneConfig, build_model, [f"--init_from={mixed}", "--sequence_length=32"]
    for stage, (kind, make_model, flags) in stages.items():
        config = parse(kind, [os.path.join(ROOT, "config", size, f"{stage}.py"), *flags, *here])
        train.train(config, make_model)
        said = capsys.readouterr().out
        assert "together" in said and "hours on an H100" in said and not (tmp_path / "run").exists()


def test_a_run_that_computes_twice_ends_with_the_same_bits(seed, data, tmp_path):
    flags = *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/run", "--checkpoint_activations=True"
    must(run("train.py", *flags))
    same_bits(seed, tmp_path / "run")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory_names_the_knobs(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as leave:
        command(main)
    said = capsys.readouterr().err
    assert leave.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert all(knob in said for knob in ("--micro_batch_size", "--checkpoint_activations=True", "--dry_run=True"))
