"""Several processes against one: the same curves, states that move between them, a process that dies, and messages
counted."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from helpers import SHORT, error_line, must, read_json, read_log, run, run_process, run_ranks, weights
from test_resume import SIGNAL_AT_STEP

from common.run import SHARDS
from study.cost import step_bytes

STEPS = 6  # of each run here

# the hooks are Python code that a process runs before the script
NO_FILES = """
import common.files
def refuse(*names):
    raise AssertionError(f"only the first process may write {names}")
common.files.os.replace = refuse
"""
QUICK_COMPILER = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
"""
KILL_AT_STEP = SIGNAL_AT_STEP.replace(" and start == 0", "").format(step=5, signal=int(signal.SIGKILL))
KILL_AT_SWITCH = """
import os, signal
replace, switches = os.replace, 0
def replace_or_die(source, target):
    global switches
    switches += target.endswith("state.pt")
    if switches == 3:
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
    stop = SIGNAL_AT_STEP.replace(" and start == 0", "")
    hook = stop.format(step=1, signal=int(signal.SIGTERM))
    done = run_ranks(2, *command, "--shard_size=2", hook=hook, hook_rank=1)
    assert [result.code for result in done] == [143, 143] and "stopped and saved" in done[0].out
    assert read_json(folder / "run.json")["step"] == 2 and len({*SHARDS} & {*os.listdir(folder)}) == 1

    (part,) = folder.glob("shards.*/__1_0.distcp")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    message = error_line(run(*command))
    assert "state.pt is damaged (shards." in message and "not as it was written" in message
    part.write_bytes(whole)

    done = run_process(*command, hook=stop.format(step=3, signal=int(signal.SIGTERM)))
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
        assert f"process {1 - dead} lost touch with the others" in message and "the same command goes on" in message
        assert read_json(folder / "run.json")["step"] == step
    all_must(run_ranks(2, *command))
    agree(folder, alone["train.py"])


def test_only_the_first_process_looks_and_writes(flags, alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone["train.py"], folder)
    made = read_json(folder / "run.json")
    now, made["recipe"]["code"]["train.py"] = made["recipe"]["code"]["train.py"], "another"
    made["recipe"]["config"]["out_dir"] = str(folder)
    (folder / "run.json").write_text(json.dumps(made))
    command = "train.py", *flags["train.py"], f"--out_dir={folder}"
    refused = run_ranks(2, *command)
    assert "train.py changed since" in error_line(refused[0]) and "lost touch" in error_line(refused[1])
    kept = all_must(run_ranks(2, *command, "--same_code=True", hook=NO_FILES, hook_rank=1))
    assert "nothing to do" in kept.out and read_json(folder / "run.json")["recipe"]["code"]["train.py"] == now


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
