"""A run that is killed, stopped, out of disk or out of range of numbers loses nothing, and says so."""

import json
import os
import shutil
import signal

import pytest
from helpers import SHAPE, SHORT, error_line, must, read_json, read_log, run, run_process, same_bits, weights
from transformers import AutoModelForCausalLM

from model import Transformer

# Python code that ends the process at the n-th time that a file takes its name, just before or just after
KILL_AT_RENAME = """
import os, signal
replace, count = os.replace, 0
def replace_or_die(*names):
    global count
    count += 1
    if count == {n} and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
    if count == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_or_die
"""

# Python code that sends the process a signal while it fetches the batch of a step
SIGNAL_AT_STEP = """
import os, common.corpus
fetch = common.corpus.Batches.__call__
def fetch_or_signal(self, step, start, stop):
    if step == {step} and start == 0:
        os.kill(os.getpid(), {signal})
    return fetch(self, step, start, stop)
common.corpus.Batches.__call__ = fetch_or_signal
"""


@pytest.fixture(scope="module")
def flags(data):
    return [*SHAPE, *SHORT, f"--data_dir={data}"]


def killed(result):
    assert result.code == -signal.SIGKILL, result


def test_killed_at_many_points_ends_with_the_same_bits(flags, seed, tmp_path):
    """`seed` is the same run, never interrupted. The one folder here is killed again and again."""
    folder = tmp_path / "run"
    command = ["train.py", *flags, f"--out_dir={folder}"]
    # renames: run.json; then at steps 0, 5, 10 and the end state, model, two files of the tokenizer, config, run.json
    for n, before in ((1, True), (1, False), (3, True), (7, True)):
        killed(run_process(*command, hook=KILL_AT_RENAME.format(n=n, before=before)))
    killed(run_process(*command, hook=SIGNAL_AT_STEP.format(step=9, signal=signal.SIGKILL)))
    assert read_json(folder / "run.json")["step"] == 5
    killed(run_process(*command, hook=KILL_AT_RENAME.format(n=1, before=True)))  # step 10's state half there
    killed(run_process(*command, hook=KILL_AT_RENAME.format(n=1, before=False)))  # step 10's state, 5's weights
    assert read_json(folder / "run.json")["step"] == 5
    killed(run_process(*command, hook=SIGNAL_AT_STEP.format(step=11, signal=signal.SIGKILL)))
    killed(run_process(*command, hook=KILL_AT_RENAME.format(n=6, before=True)))  # all there but "finished"
    must(run_process(*command))
    same_bits(folder, seed)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    assert "nothing to do" in must(run(*command)).out


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 7), ("SIGINT", 3)])
def test_a_signal_saves_and_the_rest_is_the_same(name, step, btx, mixed, data, tmp_path):
    folder, number = tmp_path / "run", getattr(signal, name)
    command = ["finetune.py", *SHORT, f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={folder}"]
    done = run_process(*command, hook=SIGNAL_AT_STEP.format(step=step, signal=int(number)))
    assert done.code == 128 + number
    assert "Traceback" not in done.err and "stopped and saved" in done.out
    assert read_json(folder / "run.json")["step"] == step + 1 and not read_json(folder / "run.json")["finished"]
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "mixtral"
    message = error_line(run("mix.py", f"--experts={folder}", f"--out_dir={tmp_path}/mixed"))
    assert "not finished" in message and f"step {step + 1}" in message
    must(run(*command))
    same_bits(folder, btx)


def test_overwriting_survives_a_kill_too(flags, seed, data, tmp_path):
    """At no moment is there a folder that neither the old command nor the new one takes."""
    folder = tmp_path / "run"
    must(run("train.py", *flags, "--max_steps=2", f"--out_dir={folder}"))
    command = ["train.py", *flags, "--overwrite=True", f"--out_dir={folder}"]
    for n, before in ((1, True), (1, False)):
        killed(run_process(*command, hook=KILL_AT_RENAME.format(n=n, before=before)))
    must(run(*command))
    same_bits(folder, seed)


def test_another_config_is_refused(flags, data, tmp_path):
    folder = tmp_path / "run"
    command = ["train.py", *flags, "--max_steps=2", f"--out_dir={folder}"]
    must(run(*command))
    before = weights(folder)["model.norm.weight"].tobytes()
    message = error_line(run(*command, "--learning_rate=1e-3"))
    assert "learning_rate 0.003 -> 0.001" in message and "--overwrite" in message
    assert weights(folder)["model.norm.weight"].tobytes() == before
    assert "nothing to do" in must(run(*command, "--save_interval=1")).out  # does not shape the result
    must(run(*command, "--learning_rate=1e-3", "--overwrite=True"))
    assert weights(folder)["model.norm.weight"].tobytes() != before

    os.mkdir(tmp_path / "photos")
    (tmp_path / "photos" / "cat.jpg").write_text("a cat")
    message = error_line(run("train.py", *flags, "--overwrite=True", f"--out_dir={tmp_path}/photos"))
    assert "not of a run" in message and os.listdir(tmp_path / "photos") == ["cat.jpg"]


def test_other_data_is_another_run(flags, data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    command = ["train.py", *SHAPE, *SHORT, f"--data_dir={copy}", "--max_steps=1", f"--out_dir={tmp_path}/run"]
    must(run(*command))
    meta = read_json(copy / "rain" / "meta.json")
    (copy / "rain" / "meta.json").write_text(json.dumps({**meta, "content_hash": "other text"}))
    assert "data.rain" in error_line(run(*command))


def test_nan_stops_and_keeps_the_last_good_checkpoint(flags, tmp_path):
    folder = tmp_path / "run"
    command = ["train.py", *flags, f"--out_dir={folder}"]
    poison = """
import model, torch
forward, steps = model.Transformer.forward, 0
def forward_or_nan(self, *inputs, **options):
    global steps
    steps += torch.is_grad_enabled()  # two micro-batches a step
    output = forward(self, *inputs, **options)
    return output._replace(loss=output.loss * float("nan")) if steps > 14 else output
model.Transformer.forward = forward_or_nan
"""
    message = error_line(run_process(*command, hook=poison))
    assert "step 7" in message and "nan" in message and "--learning_rate" in message
    assert read_json(folder / "run.json")["step"] == 5
    model = Transformer.from_pretrained(str(folder))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    must(run(*command))


def test_a_learning_rate_beyond_reason_stops_too(flags, tmp_path):
    message = error_line(run("train.py", *flags, "--learning_rate=1e30", f"--out_dir={tmp_path}/run"))
    assert "step " in message and "last good checkpoint" in message
    assert all(parameter.isfinite().all() for parameter in Transformer.from_pretrained(f"{tmp_path}/run").parameters())


def test_a_full_disk_keeps_the_previous_checkpoint(flags, seed, tmp_path):
    """A limit on the size of files stands in for the full disk: first for the training state, then for the log."""
    folder = tmp_path / "run"
    command = ["train.py", *flags, f"--out_dir={folder}"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
    done = run_process(*command, hook=SIGNAL_AT_STEP.format(step=5, signal=int(signal.SIGTERM)))
    assert done.code == 143 and read_json(folder / "run.json")["step"] == 6
    half, more = os.path.getsize(folder / "state.pt") // 2, os.path.getsize(folder / "log.jsonl") + 10
    for name, size in (("state.pt", half), ("log.jsonl", more)):
        message = error_line(run_process(*command, hook=limit.format(size)))
        assert str(folder / name) in message and "free some space" in message
        assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
        assert read_json(folder / "run.json")["step"] == 6
        Transformer.from_pretrained(str(folder))
    must(run(*command))
    same_bits(folder, seed)


def test_a_full_disk_while_mixing(seed, experts, tmp_path):
    command = ["mix.py", f"--experts={','.join([*experts, seed])}", f"--out_dir={tmp_path}/mixed"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    assert "model.safetensors could not be written" in error_line(run_process(*command, hook=limit))
    assert sorted(os.listdir(tmp_path / "mixed")) == ["run.json"]
    must(run(*command))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_damaged_training_state(keep, flags, tmp_path):
    folder = tmp_path / "run"
    command = ["train.py", *flags, "--max_steps=4", "--save_interval=2", f"--out_dir={folder}"]
    must(run(*command))
    unfinished = {**read_json(folder / "run.json"), "finished": False, "step": 2}
    (folder / "run.json").write_text(json.dumps(unfinished))
    size = os.path.getsize(folder / "state.pt")
    os.truncate(folder / "state.pt", int(size * keep))
    message = error_line(run(*command))
    assert "state.pt is damaged" in message and "delete it" in message
    os.remove(folder / "state.pt")
    must(run(*command))
    assert [line["step"] for line in read_log(folder)] == [0, 4]
