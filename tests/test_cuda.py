"""What differs on a GPU: bfloat16, torch.compile, the fast path of grouped_mm. Skipped where there is none."""

import os

import pytest
import torch
from helpers import SHAPE, SHORT, must, read_log, run, run_process
from test_routing import random_model

from model import ROUTERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# the last of two equal flags counts
GPU = [*SHAPE, *SHORT, "--device=cuda", "--hidden_size=64", "--intermediate_size=128"]


@pytest.mark.parametrize("shape", [{}, {"num_local_experts": 0}])
def test_cuda_equals_cpu(shape):
    model = random_model(**shape)
    ids = torch.randint(80, (2, 40))
    with torch.no_grad():
        expected = model(ids).logits
        model = model.cuda()
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
        model.compute_dtype = torch.bfloat16
        loss = model(ids.cuda(), ids.cuda()).loss.item()
    reference = torch.nn.functional.cross_entropy(expected.flatten(0, 1), ids.flatten()).item()
    assert loss == pytest.approx(reference, rel=0.05)


def test_gradients_of_a_mixture_in_bfloat16():
    model = random_model(num_local_experts=4).cuda()
    ids = torch.randint(80, (4, 40), device="cuda")
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        model.zero_grad()
        output = model(ids, ids)
        (output.loss + output.aux_loss).backward()
        gradients[dtype] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert torch.cosine_similarity(*gradients.values(), dim=0) > 0.98


def test_a_step_of_a_mixture_never_waits():
    """The whole step is queued: a wait for a number from the device would leave it idle."""
    model = random_model(num_local_experts=4).cuda()
    model.compute_dtype = torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids, step = torch.randint(80, (4, 40), device="cuda"), torch.zeros((), device="cuda")
    for mode in ("default", "error"):  # the first step may wait: it sets things up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            output = model(ids, ids, step=step)
            (output.loss + output.aux_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("router", ROUTERS)
def test_compiled_equals_plain_in_every_router(router):
    model = random_model(num_local_experts=4, router=router).cuda()
    model.compute_dtype = torch.bfloat16  # torch.compile takes grouped_mm in bfloat16 only
    ids, step, found = torch.randint(80, (4, 40), device="cuda"), torch.zeros((), device="cuda"), []
    for one in (model, torch.compile(model, fullgraph=True)):
        torch.manual_seed(1)
        found.append(one(ids, ids, step=None if router == "sample" else step))  # noise differs in a graph
    assert found[1].loss.item() == pytest.approx(found[0].loss.item(), rel=0.02)
    assert found[1].aux_loss.item() == pytest.approx(found[0].aux_loss.item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dead_expert_gets_zero_gradients_from_poisoned_memory(dtype):
    """grouped_mm must write the gradients of an expert without a row, not leave what was in memory before."""
    model = random_model(num_local_experts=4).cuda()
    model.compute_dtype = dtype
    for layer in model.model.layers:
        layer.block_sparse_moe.gate.weight.data[0] = 0  # with the norms' output positive on average, it loses
        layer.block_sparse_moe.gate.weight.data[1:] = 1
        layer.post_attention_layernorm.weight.data[:] = 1
        layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, output: output.abs() + 0.1)
    ids = torch.randint(80, (4, 40), device="cuda")
    for _ in range(3):
        poison = [
            torch.full_like(parameter, float("nan"), dtype=one)
            for parameter in model.parameters()
            for one in (dtype, torch.float32)
        ]
        del poison
        model.zero_grad(set_to_none=True)
        output = model(ids, ids)
        assert (output.gates[..., 0] == 0).all()
        (output.loss + output.aux_loss).backward()
        for layer in model.model.layers:
            for weight in layer.block_sparse_moe.experts.parameters():
                assert (weight.grad[0] == 0).all() and weight.grad.isfinite().all()


def test_a_mixture_killed_off_an_evaluation_step_goes_on(data, tmp_path):
    """Its running sums are in state.pt then. Equal within rounding: on CUDA some sums have no fixed order."""
    flags = [*GPU, "--dtype=bfloat16", "--compile=off", f"--data_dir={data}"]
    seed, mixed = f"{tmp_path}/seed", f"{tmp_path}/mixed"
    must(run_process("train.py", *flags, f"--out_dir={seed}"))
    must(run("mix.py", f"--experts={seed},{seed}", f"--out_dir={mixed}"))
    flags += [f"--init_from={mixed}", "--save_interval=5"]  # evaluations are at 4, 8 and 12
    kill = """
import os, common.corpus
fetch = common.corpus.Batches.__call__
def fetch_or_die(self, step, start, stop):
    if step == 6:
        os.kill(os.getpid(), 9)
    return fetch(self, step, start, stop)
common.corpus.Batches.__call__ = fetch_or_die
"""
    must(run_process("finetune.py", *flags, f"--out_dir={tmp_path}/whole"))
    assert run_process("finetune.py", *flags, f"--out_dir={tmp_path}/killed", hook=kill).code != 0
    must(run_process("finetune.py", *flags, f"--out_dir={tmp_path}/killed"))
    ours, theirs = (read_log(tmp_path / name)[-1] for name in ("whole", "killed"))
    assert ours["bpb"]["avg"] == pytest.approx(theirs["bpb"]["avg"], rel=0.01)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_seed_branch_mix_and_finetuning(compiled, data, tmp_path):
    """Every stage in bfloat16, plain and compiled."""
    flags = [*GPU, "--dtype=bfloat16", f"--compile={compiled}", f"--data_dir={data}"]
    seed, expert, mixed, btx = (f"{tmp_path}/{name}" for name in ("seed", "expert", "mixed", "btx"))
    must(run_process("train.py", *flags, f"--out_dir={seed}"))
    must(run_process("train.py", *flags, "--domain=rain", f"--init_from={seed}", f"--out_dir={expert}"))
    must(run("mix.py", f"--experts={expert},{seed}", f"--out_dir={mixed}"))
    must(run_process("finetune.py", *flags, f"--init_from={mixed}", f"--out_dir={btx}"))
    logs = [read_log(folder) for folder in (seed, btx)]
    assert logs[0][-1]["bpb"]["avg"] < logs[0][0]["bpb"]["avg"]
    assert logs[1][-1]["bpb"]["avg"] < logs[0][-1]["bpb"]["avg"]
    assert "load" in logs[1][-1]
    must(run("sample.py", f"--model={btx}", "--max_new_tokens=5"))
    assert os.path.exists(os.path.join(btx, "model.safetensors"))
