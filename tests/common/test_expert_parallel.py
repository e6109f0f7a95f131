"""Experts on different processes against one process: gradients, curves, states that move, bytes, refusals."""

import os
import signal

import pytest
import torch
from common.fit import count_memory
from helpers import SHORT, error_line, must, read_json, run, run_process, run_ranks
from test_parallel import COUNT, agree, all_must
from test_resume import SIGNAL_AT_STEP

from common import fused
from common.device import compiled
from common.parallel import Processes
from model import ROUTERS, ModelConfig, Transformer
from study.cost import exchange_bytes, step_bytes

# ---- gradients, in processes that run this file ----


def random_model(router, k=None):
    """Four experts, two layers, the same numbers in every process."""
    k = ROUTERS[router].experts_per_token(k or 2, 4)
    torch.manual_seed(1)
    model = Transformer(ModelConfig(80, 16, 24, 2, 2, 1, 64, num_local_experts=4, router=router, num_experts_per_tok=k))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def backward(model, rank, parts):
    """The loss of a part of the batch, with gradients, as train_step takes them."""
    torch.manual_seed(rank)
    ids = torch.randint(80, (2, 30))
    output = model(ids, ids, step=torch.tensor(7))
    ((output.loss + output.aux_loss) / parts).backward()
    return output.loss.detach()


def same_gradients(processes, change=lambda model: None, choice="off", tolerance=1e-5, **shape):
    """Assert that this process, with its part of the batch and its half of the experts, has the loss and, together with
    the other one, the gradients and their norm of a single process. change: what to do to the model first."""
    model = random_model(**shape)
    change(model)
    losses = [backward(model, rank, parts=2) for rank in range(2)]
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.nn.utils.get_total_norm([gradient for gradient in wanted.values() if gradient is not None])

    model = random_model(**shape)
    change(model)
    processes.spread(model, shard_size=1, expert_parallel=2)
    assert {len(layer.block_sparse_moe.experts.w1.to_local()) for layer in model.model.layers} == {2}
    loss = backward(compiled(model, choice, processes.device), processes.rank, parts=1)
    assert loss.item() == pytest.approx(losses[processes.rank].item(), rel=tolerance)
    assert processes.clip_gradients(model, max_norm=1e-3).item() == pytest.approx(norm.item(), rel=tolerance)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (wanted[name] is None), name
        if parameter.grad is not None:
            difference = parameter.grad.full_tensor() * norm / 1e-3 - wanted[name]
            assert difference.norm() <= tolerance * wanted[name].norm(), name
    return wanted


def only(*experts):
    """Leave all tokens of a top-1 router to two of the experts."""

    def change(model):
        for layer in model.model.layers:
            gate = layer.block_sparse_moe.gate.weight.data
            gate[experts[1]] = -gate[experts[0]]
            gate[[e for e in range(4) if e not in experts]] = 0  # below one of the two, whatever its sign

    return change


def freeze_experts(model):
    for layer in model.model.layers:
        layer.block_sparse_moe.experts.requires_grad_(False)


def recompute(model):
    model.recompute = True


def in_bfloat16(model):
    model.compute_dtype = torch.bfloat16


def check_gradients():
    with Processes(torch.device("cpu")) as processes:
        for router in ROUTERS:
            same_gradients(processes, router=router)
        same_gradients(processes, recompute, router="sample")
        same_gradients(processes, freeze_experts, router="topk")
        for living in ((0, 2), (0, 1), (2, 3)):  # a dead expert on each process; a process whose experts get no row
            found = same_gradients(processes, only(*living), router="topk", k=1)
            w1 = found["model.layers.1.block_sparse_moe.experts.w1"]
            assert [e for e in range(4) if w1[e].any()] == list(living)
        torch.compile = lambda function, compile=torch.compile: compile(function, backend="aot_eager")
        same_gradients(processes, choice="on", router="topk")
        fused.row_multiple = lambda *sizes: 8  # experts' rows padded, by the sender and again by the receiver
        same_gradients(processes, router="topk")
        same_gradients(processes, in_bfloat16, tolerance=0.01, router="topk")
        same_gradients(processes, in_bfloat16, "on", tolerance=0.1, router="topk")  # against one that is not compiled


def test_gradients_are_those_of_one_process():
    """Four routers; activations computed twice; experts frozen or dead; padded rows; bfloat16; layers compiled."""
    all_must(run_ranks(2, os.path.abspath(__file__)))


# ---- whole runs ----

STEPS = 6


@pytest.fixture(scope="module")
def flags(work, experts, seed, data):
    """The finetuning of a mixture of four experts, in several micro-batches a process."""
    folder = os.path.join(work, "four")
    must(run("mix.py", f"--experts={','.join([*experts, seed, seed])}", "--router_std=0.5", f"--out_dir={folder}"))
    steps = f"--max_steps={STEPS}", "--micro_batch_size=1", "--save_interval=2"
    return [*SHORT, f"--data_dir={data}", f"--init_from={folder}", *steps]


def test_a_run_equals_one_process_and_sends_what_the_formula_says(flags, tmp_path):
    """With the soft router, which sends as many rows to each expert. Of gradients, only those of the rest travel."""
    command = "finetune.py", *flags, "--router=soft"
    must(run(*command, f"--out_dir={tmp_path}/alone"))
    hook = COUNT.format(folder=tmp_path)
    all_must(run_ranks(2, *command, f"--out_dir={tmp_path}/run", "--expert_parallel=2", hook=hook))
    agree(tmp_path / "run", tmp_path / "alone")

    model = Transformer.from_pretrained(str(tmp_path / "run"))
    rest = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." not in name)
    rows = 8 * 32 * 2 * 4  # of a step: tokens, layers, experts
    formula = step_bytes(rest, 2) + exchange_bytes(rows, model.config.hidden_size, 2)
    sent = sum(read_json(tmp_path / f"{rank}.json") for rank in range(2))
    assert sent == pytest.approx(STEPS * formula, rel=0.01)  # counts of rows, statistics and norms are some bytes more


def test_a_state_moves_between_ways_to_spread_it(flags, tmp_path):
    """Two processes with two experts each, then one, then four: two experts on each, halved, everything else in four
    pieces."""
    command = "finetune.py", *flags, f"--out_dir={tmp_path}/run"
    must(run("finetune.py", *flags, f"--out_dir={tmp_path}/alone"))
    stop = SIGNAL_AT_STEP.replace(" and start == 0", "")
    hooks = [stop.format(step=step, signal=int(signal.SIGTERM)) for step in (1, 3)]
    done = run_ranks(2, *command, "--expert_parallel=2", hook=hooks[0], hook_rank=1)
    assert [result.code for result in done] == [143, 143], done
    done = run_process(*command, hook=hooks[1])
    assert done.code == 143 and read_json(tmp_path / "run" / "run.json")["step"] == 4
    all_must(run_ranks(4, *command, "--expert_parallel=2", "--shard_size=0"))
    agree(tmp_path / "run", tmp_path / "alone")


# ---- refusals and memory ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert_parallel=3"], "does not divide the model's 4 experts"),
        (["--expert_parallel=2"], "does not divide torchrun's 1 process(es)"),
        (["--expert_parallel=2", "--shard_size=3"], "--shard_size=3: one must be a multiple of the other"),
        (["--expert_parallel=0"], "must lie in [1, inf)"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, flags, tmp_path):
    said = error_line(run("finetune.py", *flags, *options, f"--out_dir={tmp_path}/run"))
    assert options[0] in said and message in said and not (tmp_path / "run").exists()


def test_a_dense_model_has_no_experts_to_divide(seed, data, tmp_path):
    command = "train.py", *SHORT, f"--data_dir={data}", f"--init_from={seed}", f"--out_dir={tmp_path}/run"
    assert "this model is dense" in error_line(run(*command, "--expert_parallel=2"))


def test_memory_of_a_share_by_hand():
    model = random_model("topk")
    model.compute_dtype = torch.bfloat16
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    rest = sum(parameter.numel() for parameter in model.parameters()) - experts
    alone, halved = (list(count_memory(model, 2, 30, expert_parallel=n).values()) for n in (1, 2))
    own = rest + experts // 2
    assert halved[:4] == [4 * own, 4 * own, 8 * own, 0]
    assert alone[4] - halved[4] == 2 * experts // 2  # bfloat16 copies of the others
    spread = list(count_memory(model, 2, 30, shards=4, expert_parallel=2).values())  # both layers are there at once
    assert spread[:4] == [rest + experts, rest + experts, 2 * (rest + experts), 4 * own]  # a quarter of 4 bytes each


if __name__ == "__main__":
    check_gradients()
