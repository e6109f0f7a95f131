"""Several processes against one: the same curves, states that move between them, a process that dies, and messages
counted."""

import os
import signal

import numpy as np
import pytest
from helpers import SHORT, error_line, must, read_json, read_log, run, run_process, run_ranks, weights
from test_resume import SIGNAL_AT_STEP

STEPS = 6  # of each run here


@pytest.fixture(scope="module")
def stages(seed, mixed, data):
    """{script: its flags}: a branch of the seed and the mixture's finetuning, two micro-batches a process."""
    flags = [*SHORT, f"--data_dir={data}", f"--max_steps={STEPS}", "--micro_batch_size=1", "--save_interval=2"]
    return {"train.py": [*flags, f"--init_from={seed}"], "finetune.py": [*flags, f"--init_from={mixed}"]}


@pytest.fixture(scope="module")
def alone(stages, work):
    """{script: the folder of the run that one process made}."""
    folders = {}
    for script, flags in stages.items():
        folders[script] = os.path.join(work, f"alone-{script}")
        must(run(script, *flags, f"--out_dir={folders[script]}"))
    return folders


def agree(folder, other):
    """Assert that two runs have the same weights and curves but for rounding."""
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
    assert [result.code for result in results] == [0] * len(results), [result.err for result in results]
    assert not any(result.err for result in results[1:]), results[1].err  # no bar, no warning
    return results[0]


@pytest.mark.parametrize("script", ["train.py", "finetune.py"])
@pytest.mark.parametrize(("world", "shard_size"), [(2, 1), (2, 2), (4, 2), (4, 0)])
def test_several_processes_equal_one(script, world, shard_size, stages, alone, tmp_path):
    """Copies, shards, and both: each process takes its part of the batch in several micro-batches, the same ones that a
    single process takes. Three experts on two and four shards."""
    flags = *stages[script], f"--out_dir={tmp_path}/run", f"--shard_size={shard_size}"
    done = all_must(run_ranks(world, script, *flags))
    assert "finished" in done.out and "Traceback" not in done.err
    agree(tmp_path / "run", alone[script])
    assert "nothing to do" in must(run(script, *flags[:-1])).out
