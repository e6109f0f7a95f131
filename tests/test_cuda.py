"""What differs on a GPU: bfloat16, torch.compile, the fast path of grouped_mm. Skipped where there is none."""

import os

import pytest
import torch
from helpers import SHAPE, SHORT, must, read_log, run, run_process
from test_model import random_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# the last of two equal flags counts
GPU = [*SHAPE, *SHORT, "--device=cuda", "--hidden_size=64", "--intermediate_size=128"]


@pytest.mark.parametrize("shape", [{}, {"num_local_experts": 4}])
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


def test_compiled_equals_plain():
    model = random_model(num_local_experts=4).cuda()
    ids = torch.randint(80, (4, 40), device="cuda")
    model.compute_dtype = torch.bfloat16  # torch.compile takes grouped_mm in bfloat16 only
    plain, compiled = model(ids, ids), torch.compile(model)(ids, ids)
    assert compiled.loss.item() == pytest.approx(plain.loss.item(), rel=0.02)
    assert compiled.aux_loss.item() == pytest.approx(plain.aux_loss.item(), rel=0.05)
