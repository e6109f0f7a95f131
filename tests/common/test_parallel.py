"""Several processes against one: the same curves, states that move between them, a process that dies, and messages
counted; the model in shards, and its experts on different processes."""

import json
import os
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from helpers import (
    SHAPE,
    SHORT,
    SIGNAL_AT_STEP,
    error_line,
    must,
    read_json,
    read_log,
    run,
    run_process,
    run_ranks,
    weights,
)

from common.device import compiled
from common.parallel import Processes, place_in_launch
from common.run import SHARDS
from model import ROUTERS, ModelConfig, Transformer

STEPS = 6  # of each run here

# the hooks are Python code that a process runs before the script
NO_FILES = """
import os
def refuse(*names):
    raise AssertionError(f"only the first process may write {names}")
os.replace = refuse
"""
QUICK_COMPILER = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
"""
KILL_AT_STEP = SIGNAL_AT_STEP.format(step=5, signal=int(signal.SIGKILL))
KILL_AT_SWITCH = """
import os, signal
replace, switches = os.replace, 0
def replace_or_die(source, target):
    global switches
    switches += target.endswith("state.pt")
    if switches == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
"""


@pytest.fixture(scope="module")
def flags(seed, mixed, data):
    """{script: its flags}: a branch of the seed and the mixture's finetuning, in several micro-batches a process."""
    shared = [*SHORT, f"--data_dir={data}", f"--max_steps={STEPS}", "--micro_batch_size=1", "--save_interval=2"]
    return {"train.py": [*shared, f"--init_from={seed}"], "finetune.py": [*shared, f"--init_from={mixed}"]}


@pytest.fixture(scope="module")
def alone(flags, work):
    """{script: the folder of the run that one process made}."""
    folders = {}
    for script in flags:
        folders[script] = os.path.join(work, f"alone-{script}")
        must(run(script, *flags[script], f"--out_dir={folders[script]}"))
    return folders


def agree(folder, other):
    """Assert that two finished runs have the same weights and curves but for rounding."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=2e-6, err_msg=name)
    for a, b in zip(read_log(folder), read_log(other), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] and a["tokens"] == b["tokens"]
        assert a["flops"] == b["flops"] and a["bpb"] == pytest.approx(b["bpb"], rel=1e-4)
        for name in ({"loss", "aux_loss", "grad_norm"} & a.keys()) if a["step"] else ():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert read_json(os.path.join(folder, "run.json"))["finished"]


def all_must(results):
    """The first one's result, where all have succeeded and the others said nothing."""
    assert [result.code for result in results] == [0] * len(results), [result.err for result in results]
    assert not any(result.out + result.err for result in results[1:]), results[1]
    return results[0]


@pytest.mark.parametrize(
    ("script", "world", "shard_size", "hook"),
    [("train.py", 2, 0, QUICK_COMPILER), ("finetune.py", 2, 1, ""), ("finetune.py", 4, 2, "")],
)
def test_several_processes_equal_one(script, world, shard_size, hook, flags, alone, tmp_path):
    """Shards, copies, and both, three experts on two shards: every process takes its part of the batch in the same
    micro-batches that a single one takes. The first one is compiled, layer by layer."""
    command = script, *flags[script], f"--out_dir={tmp_path}/run"
    options = f"--shard_size={shard_size}", f"--compile={'on' if hook else 'off'}"
    assert "finished" in all_must(run_ranks(world, *command, *options, hook=hook)).out
    agree(tmp_path / "run", alone[script])
    assert "nothing to do" in must(run(*command)).out  # by one process: how many there were is not in the recipe


def test_a_state_moves_between_numbers_of_processes(flags, alone, tmp_path):
    """Two processes are stopped by a signal that only one of them gets, a single one goes on, then four."""
    folder = tmp_path / "run"
    command = "finetune.py", *flags["finetune.py"], f"--out_dir={folder}"
    hook = SIGNAL_AT_STEP.format(step=1, signal=int(signal.SIGTERM))
    done = run_ranks(2, *command, "--shard_size=2", hook=hook, hook_rank=1)
    assert [result.code for result in done] == [143, 143] and "stopped and saved" in done[0].out
    assert read_json(folder / "run.json")["step"] == 2 and len({*SHARDS} & {*os.listdir(folder)}) == 1

    (part,) = folder.glob("shards.*/__1_0.distcp")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    message = error_line(run(*command))
    assert "state.pt is damaged (shards." in message and "has changed since it was written" in message
    part.write_bytes(whole)

    done = run_process(*command, hook=SIGNAL_AT_STEP.format(step=3, signal=int(signal.SIGTERM)))
    assert done.code == 143 and read_json(folder / "run.json")["step"] == 4
    assert not {*SHARDS} & {*os.listdir(folder)}  # all is in state.pt again
    all_must(run_ranks(4, *command, "--shard_size=2"))
    agree(folder, alone["finetune.py"])


def test_a_process_that_dies_leaves_a_message_and_a_run_to_resume(flags, alone, tmp_path):
    """First the one that writes, when the shards are there and state.pt does not speak of them yet; then the other."""
    folder = tmp_path / "run"
    command = "train.py", *flags["train.py"], f"--out_dir={folder}", "--shard_size=2"
    for hook, dead, step in ((KILL_AT_SWITCH, 0, 2), (KILL_AT_STEP, 1, 4)):
        done = run_ranks(2, *command, hook=hook, hook_rank=dead)
        assert done[dead].code == -signal.SIGKILL
        message = error_line(done[1 - dead])
        assert f"process {1 - dead} lost touch with the others" in message and "the same command to resume" in message
        assert read_json(folder / "run.json")["step"] == step
    all_must(run_ranks(2, *command))
    agree(folder, alone["train.py"])


def test_only_the_first_process_looks_and_writes(flags, alone, tmp_path):
    """A run of another recipe ends both, a run of other source neither; it is said once."""
    folder = tmp_path / "run"
    shutil.copytree(alone["train.py"], folder)
    command = "train.py", *flags["train.py"], f"--out_dir={folder}"
    refused = run_ranks(2, *command)
    assert "holds another run (config.out_dir" in error_line(refused[0]) and "lost touch" in error_line(refused[1])

    made = read_json(folder / "run.json")
    made["recipe"]["config"]["out_dir"] = str(folder)
    made["source"][0]["files"]["train.py"] = "another hash"
    (folder / "run.json").write_text(json.dumps(made))
    used = all_must(run_ranks(2, *command, hook=NO_FILES, hook_rank=1))
    assert used.out.count("made before train.py changed") == used.out.count("nothing to do") == 1


NOTE_STEPS = """
import json, os, signal, train
train_step = train.train_step
def noted(*arguments):
    metrics = train_step(*arguments)
    values = {{name: value.tolist() for name, value in metrics.items()}}
    with open(f"{folder}/{{os.environ['RANK']}}.jsonl", "a") as file:
        file.write(json.dumps(values) + "\\n")
    if arguments[1] == {step} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return metrics
train.train_step = noted
"""


def test_the_log_has_the_means_over_processes_and_steps(flags, tmp_path):
    """Four steps to a line. A stop lies in between, after two of them."""
    command = "finetune.py", *flags["finetune.py"], f"--out_dir={tmp_path}/run"
    done = run_ranks(2, *command, hook=NOTE_STEPS.format(folder=tmp_path, step=1))
    assert [result.code for result in done] == [143, 143], done
    all_must(run_ranks(2, *command, hook=NOTE_STEPS.format(folder=tmp_path, step=-1)))
    ranks = [[json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    assert [len(steps) for steps in ranks] == [STEPS, STEPS]
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log] == [0, 4, 6]
    for line, steps in zip(log[1:], (slice(0, 4), slice(4, 6)), strict=True):
        for name in ("loss", "aux_loss", "balance_loss", "z_loss", "grad_norm"):
            expected = np.mean([step[name] for rank in ranks for step in rank[steps]], axis=0)
            np.testing.assert_allclose(line[name], expected, rtol=1e-9)
    assert ranks[0][0]["loss"] != ranks[1][0]["loss"]  # each has its part of the batch


def test_shards_must_divide_the_processes(flags, tmp_path):
    message = error_line(run("train.py", *flags["train.py"], f"--out_dir={tmp_path}/run", "--shard_size=2"))
    assert "--shard_size=2" in message and "1 process(es)" in message and not (tmp_path / "run").exists()


# ---- messages ----

# What this process sends in the collectives of its training steps, as rings do them
COUNT = """
import json, torch, torch.distributed as dist, train
from torch.utils._python_dispatch import TorchDispatchMode

class Count(TorchDispatchMode):
    sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            size = max(tensor.nbytes for tensor in tensors)
            objects = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
            (group,) = [one for one in objects if "ProcessGroup" in str(one._type())]
            world = dist.ProcessGroup.unbox(group).size()
            passes = {{"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}}
            self.sent += passes[func.overloadpacket.__name__] * size * (world - 1) / world
        return func(*args, **(kwargs or {{}}))

count, train_step = Count(), train.train_step
def counted(*args):
    with count:
        result = train_step(*args)
    with open(f"{folder}/{{os.environ['RANK']}}.json", "w") as file:
        json.dump(count.sent, file)
    return result
train.train_step = counted
"""


def step_bytes(numbers, world, shard_size=1, micro_batches=1):
    """Bytes that one step sends in fp32, all processes together.

    Rings: an all-reduce of P numbers over w sends 2 (w - 1) P, a gather or a reduce-scatter (w - 1) P. With shard_size
    s there are w / s copies: each micro-batch gathers weights twice and reduces gradients once within each of them,
    and once a step the s rings across the copies average the pieces.
    """
    copies = world / shard_size
    return (micro_batches * 3 * copies * (shard_size - 1) + 2 * (copies - 1)) * 4 * numbers


@pytest.mark.parametrize(("world", "shard_size"), [(1, 1), (2, 1), (2, 2)])
def test_bytes_sent_are_those_of_the_formula(world, shard_size, flags, mixed, tmp_path):
    """Four micro-batches a step for two processes. A branch on one worker sends nothing; with copies a step's gradients
    pass once; shards are gathered twice a micro-batch, but for what no layer holds, which stays until the backward
    pass ends."""
    command = "finetune.py", *flags["finetune.py"], f"--out_dir={tmp_path}/run", f"--shard_size={shard_size}"
    all_must(run_ranks(world, *command, "--max_steps=2", hook=COUNT.format(folder=tmp_path)))
    sent = sum(read_json(tmp_path / f"{rank}.json") for rank in range(world))
    sizes = {name: tensor.size for name, tensor in weights(mixed).items()}
    formula = 2 * step_bytes(sum(sizes.values()), world, shard_size, micro_batches=4)
    if shard_size > 1:
        formula -= 2 * 4 * (world - 1) * 4 * sum(size for name, size in sizes.items() if ".layers." not in name)
    assert sent == pytest.approx(formula, rel=0.01)  # statistics and norms are some bytes more


# ---- experts on different processes: gradients, in processes that run this file ----


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
    processes.shard(model, shard_size=1, expert_parallel=2)
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
        same_gradients(processes, in_bfloat16, tolerance=0.01, router="topk")
        same_gradients(processes, in_bfloat16, "on", tolerance=0.1, router="topk")  # against one that is not compiled


def test_gradients_are_those_of_one_process():
    """Four routers; activations computed twice; experts frozen or dead; bfloat16; layers compiled."""
    all_must(run_ranks(2, os.path.abspath(__file__)))


# ---- experts on different processes: whole runs ----


@pytest.fixture(scope="module")
def four(work, experts, seed, data):
    """The finetuning of a mixture of four experts, in several micro-batches a process."""
    folder = os.path.join(work, "four")
    must(run("mix.py", f"--experts={','.join([*experts, seed, seed])}", "--router_std=0.5", f"--out_dir={folder}"))
    steps = f"--max_steps={STEPS}", "--micro_batch_size=1", "--save_interval=2"
    return [*SHORT, f"--data_dir={data}", f"--init_from={folder}", *steps]


def test_a_run_equals_one_process_and_sends_what_the_formula_says(four, tmp_path):
    """With the soft router, which sends as many rows to each expert. Of gradients, only those of the rest travel."""
    command = "finetune.py", *four, "--router=soft"
    must(run(*command, f"--out_dir={tmp_path}/alone"))
    hook = COUNT.format(folder=tmp_path)
    all_must(run_ranks(2, *command, f"--out_dir={tmp_path}/run", "--expert_parallel=2", hook=hook))
    agree(tmp_path / "run", tmp_path / "alone")

    model = Transformer.from_pretrained(str(tmp_path / "run"))
    rest = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." not in name)
    rows = 8 * 32 * 2 * 4  # of a step: tokens, layers, experts
    # a row goes to its expert and back, and so do the two gradients; every second one stays at home
    formula = step_bytes(rest, 2) + 4 * rows * model.config.hidden_size * 4 / 2
    sent = sum(read_json(tmp_path / f"{rank}.json") for rank in range(2))
    assert sent == pytest.approx(STEPS * formula, rel=0.01)  # counts of rows, statistics and norms are some bytes more


def test_a_state_moves_between_ways_to_spread_it(four, tmp_path):
    """Two processes with two experts each, then one, then four: two experts on each, halved, everything else in four
    pieces."""
    command = "finetune.py", *four, f"--out_dir={tmp_path}/run"
    must(run("finetune.py", *four, f"--out_dir={tmp_path}/alone"))
    hooks = [SIGNAL_AT_STEP.format(step=step, signal=int(signal.SIGTERM)) for step in (1, 3)]
    done = run_ranks(2, *command, "--expert_parallel=2", hook=hooks[0], hook_rank=1)
    assert [result.code for result in done] == [143, 143], done
    done = run_process(*command, hook=hooks[1])
    assert done.code == 143 and read_json(tmp_path / "run" / "run.json")["step"] == 4
    all_must(run_ranks(4, *command, "--expert_parallel=2", "--shard_size=0"))
    agree(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert_parallel=3"], "does not divide the model's 4 experts"),
        (["--expert_parallel=2"], "does not divide torchrun's 1 process(es)"),
        (["--expert_parallel=2", "--shard_size=3"], "--shard_size=3: one must be a multiple of the other"),
        (["--expert_parallel=0"], "must lie in [1, inf)"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, four, tmp_path):
    said = error_line(run("finetune.py", *four, *options, f"--out_dir={tmp_path}/run"))
    assert options[0] in said and message in said and not (tmp_path / "run").exists()


def test_a_dense_model_has_no_experts_to_divide(seed, data, tmp_path):
    command = "train.py", *SHORT, f"--data_dir={data}", f"--init_from={seed}", f"--out_dir={tmp_path}/run"
    assert "this model is dense" in error_line(run(*command, "--expert_parallel=2"))


if __name__ == "__main__":
    check_gradients()


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "abc"}, {"RANK": "-1"}],
)
def test_half_a_launch_is_said(variables, data, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    message = error_line(run("train.py", *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/run"))
    assert "start with torchrun, or unset these" in message and all(f"{n}={v}" in message for n, v in variables.items())


def test_empty_variables_are_no_launch(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert place_in_launch() == (0, 1)


def test_a_port_that_is_taken_is_one_line(data, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        hook = f"import os; os.environ.update({ {name: str(value) for name, value in place.items()} })"
        flags = *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/run"
        message = error_line(run_process("train.py", *flags, hook=hook))
    assert f"processes cannot connect at 127.0.0.1:{port}" in message and "--master_port" in message


@pytest.mark.parametrize("size", ["", "abc", "2"])
def test_a_script_of_one_process_takes_no_notice_of_half_a_launch(size, seed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    must(run("sample.py", f"--model={seed}", "--prompt=Question: Tom", "--max_new_tokens=2"))
