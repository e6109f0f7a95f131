"""A run on disk: what is killed, stopped or out of disk goes on to the bit; what has changed is said or refused."""

import fcntl
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import (
    KILL_AT_RENAME,
    ROOT,
    SHAPE,
    SHORT,
    SIGNAL_AT_STEP,
    error_line,
    must,
    read,
    read_json,
    read_log,
    run,
    run_process,
    same_bits,
    weights,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train as train_file
from common import run as runs
from common.config import parse
from common.errors import UserError
from common.hf import weights_hash
from finetune import FinetuneConfig, load_mixture
from model import Transformer
from train import TrainConfig, build_model, train


@pytest.fixture(scope="module")
def flags(data):
    return [*SHAPE, *SHORT, f"--data_dir={data}"]


def killed(result):
    assert result.code == -signal.SIGKILL, result


def test_killed_at_many_points_ends_with_the_same_bits(flags, seed, tmp_path):
    """`seed` is the same run, never interrupted. The one folder here is killed again and again."""
    folder = tmp_path / "run"
    command = ["train.py", *flags, f"--out_dir={folder}"]
    # renames: run.json; lines of the log at steps 0 and 4; at step 5 state, model, config.json, the tokenizer, run.json
    for n, before in ((1, True), (1, False), (2, True), (3, False), (4, True)):
        killed(run_process(*command, hook=KILL_AT_RENAME.format(n=n, before=before)))
    assert not os.path.exists(folder / "state.pt")
    killed(run_process(*command, hook=SIGNAL_AT_STEP.format(step=9, signal=signal.SIGKILL)))
    assert read_json(folder / "run.json")["step"] == 5
    # from here on the log as the state has it comes first
    killed(run_process(*command, hook=KILL_AT_RENAME.format(n=3, before=True)))  # step 10's state half there
    killed(run_process(*command, hook=KILL_AT_RENAME.format(n=3, before=False)))  # step 10's state, 5's weights
    assert read_json(folder / "run.json")["step"] == 5
    killed(run_process(*command, hook=SIGNAL_AT_STEP.format(step=11, signal=signal.SIGKILL)))
    killed(run_process(*command, hook=KILL_AT_RENAME.format(n=4, before=True)))  # the last state, 5's weights
    killed(run_process(*command, hook=KILL_AT_RENAME.format(n=9, before=True)))  # all there but "finished"
    assert os.path.exists(folder / "run.json.tmp") and not read_json(folder / "run.json")["finished"]
    must(run_process(*command))
    same_bits(folder, seed)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    assert "nothing to do" in must(run(*command)).out


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 7), ("SIGINT", 3), ("SIGHUP", 3)])
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
    assert "do not belong to a run" in message and os.listdir(tmp_path / "photos") == ["cat.jpg"]


def test_a_finished_run_can_be_trained_further(flags, data, mixed, tmp_path):
    """More steps are another run; what the refusal offers first keeps the weights, from which the new run starts."""
    for script, given in (("train.py", flags), ("finetune.py", [*flags[len(SHAPE) :], f"--init_from={mixed}"])):
        folder, longer = tmp_path / script, tmp_path / f"longer-{script}"
        command = [script, *given, "--max_steps=4"]
        must(run(*command, f"--out_dir={folder}"))
        before = read(folder / "model.safetensors")
        message = error_line(run(*command, f"--out_dir={folder}", "--max_steps=8"))
        assert "config.max_steps 4 -> 8" in message
        offered = re.search(r"use (--init_from=\S+) with another --out_dir; --overwrite=True discards", message)[1]
        must(run(*command, "--max_steps=8", offered, f"--out_dir={longer}"))
        assert read(folder / "model.safetensors") == before
        assert read_log(longer)[0]["bpb"] == read_log(folder)[-1]["bpb"]
        assert read_json(longer / "run.json")["history"].keys() >= {str(folder), str(longer)}


def test_an_unfinished_run_is_finished_with_its_own_settings(flags, data, tmp_path):
    command = ["train.py", *flags, f"--out_dir={tmp_path}/run"]
    run_process(*command, hook=SIGNAL_AT_STEP.format(step=3, signal=int(signal.SIGTERM)))
    message = error_line(run(*command, "--max_steps=40"))
    assert "config.max_steps 12 -> 40" in message and "--init_from" not in message
    assert message.endswith("to finish it, use the settings it began with; --overwrite=True discards it")
    must(run(*command))


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
    beyond_reason = "--learning_rate=1e30", "--save_interval=1"
    message = error_line(run("train.py", *flags, *beyond_reason, f"--out_dir={tmp_path}/run"))
    assert "step " in message and "if any, is still good" in message
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


@pytest.fixture
def copy(seed, tmp_path):
    """A copy of the finished seed, made as by its own command, and that command."""
    folder = tmp_path / "copy"
    shutil.copytree(seed, folder)
    found = read_json(folder / "run.json")
    recipe = {**found["recipe"], "config": {**found["recipe"]["config"], "out_dir": str(folder)}}
    history = {str(folder): found["history"][seed]}
    found |= {"id": runs.hash_of(recipe), "recipe": recipe, "history": history}
    (folder / "run.json").write_text(json.dumps(found))
    return folder


def unfinish(folder, step):
    found = {**read_json(folder / "run.json"), "finished": False, "step": step}
    (folder / "run.json").write_text(json.dumps(found))


# ---- source code: said, not refused ----


@pytest.fixture
def handlers():
    """train() changes what signals do; they are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def said_of_source(result, folder):
    """The lines about changed source, which may stand nowhere but in the output."""
    lines = [line for line in result.out.splitlines() if "changed" in line]
    assert all(line.startswith(f"{folder}: made before ") for line in lines) and "changed" not in result.err
    return lines


def change_source(folder, *names):
    """As if these files had been others when the run was made; returns what stood there."""
    path = os.path.join(folder, "run.json")
    found = read_json(path)
    files = found["source"][0]["files"]
    before = dict(files)
    files.update(dict.fromkeys(names, "another hash"))
    with open(path, "w") as file:
        json.dump(found, file)
    return before


def test_the_hash_of_a_file_is_that_of_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", str(tmp_path))
    text = 'def f(x):\n    """Doc."""\n\n    return x + 1  # why\n\n\n'
    text += 'class A:\n    """Doc\n    ument."""\n    y = "# no comment"\n'
    same = 'def f(x):\n    # other\n    "Other"\n    return (x + 1)\nclass A:\n    "Doc"\n    y = "# no comment"'
    others = text.replace("x + 1", "x + 2"), text.replace("# no comment", "no comment"), text + "f(1)\n"
    hashes = []
    for content in (text, same, *others):
        (tmp_path / "f.py").write_text(content)
        runs.source_hash.cache_clear()  # a process looks at each file once
        hashes.append(runs.source_hash("f.py"))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 1 + len(others)
    assert runs.source_hash("gone.py") is None
    (tmp_path / "f.py").write_text(text)
    runs.source_hash.cache_clear()
    assert runs.changed_files({"f.py": hashes[0], "gone.py": hashes[0]}) == ["gone.py"]


def test_run_json_knows_the_source_of_its_run(seed, mixed):
    for folder, script in ((seed, "train.py"), (mixed, "mix.py")):
        (leg,) = read_json(os.path.join(folder, "run.json"))["source"]
        files = leg["files"]
        assert leg["step"] == 0 and {script, "model.py", "common/run.py", "common/hf.py"} <= files.keys()
        assert not [name for name in files if not os.path.exists(os.path.join(ROOT, name)) or "tests" in name]


def test_a_finished_run_is_used_with_one_line_when_source_has_changed(flags, copy, seed):
    command = "train.py", *flags, f"--out_dir={copy}"
    assert said_of_source(must(run(*command)), copy) == []
    change_source(copy, "model.py")
    before = os.stat(copy / "model.safetensors").st_mtime_ns, read(copy / "run.json")
    for _ in range(2):
        done = must(run(*command))
        line = f"{copy}: made before model.py changed; --overwrite=True makes it again"
        assert said_of_source(done, copy) == [line] and "nothing to do" in done.out
    assert before == (os.stat(copy / "model.safetensors").st_mtime_ns, read(copy / "run.json"))
    change_source(copy, "common/corpus.py")
    line = f"{copy}: made before common/corpus.py and model.py changed; --overwrite=True makes it again"
    assert said_of_source(must(run(*command)), copy) == [line]
    assert said_of_source(must(run(*command, "--overwrite=True")), copy) == []
    assert said_of_source(must(run(*command)), copy) == []
    same_bits(copy, seed)


def test_a_resumed_run_has_a_leg_for_each_source(flags, seed, tmp_path):
    folder = tmp_path / "run"
    command = "train.py", *flags, f"--out_dir={folder}"
    assert run_process(*command, hook=SIGNAL_AT_STEP.format(step=6, signal=int(signal.SIGTERM))).code == 143
    before = change_source(folder, "model.py")
    done = must(run_process(*command))
    line = f"{folder}: made before model.py changed; --overwrite=True makes it again"
    assert said_of_source(done, folder) == [line] and "finished" in done.out
    legs = read_json(folder / "run.json")["source"]
    assert [leg["step"] for leg in legs] == [0, 7] and legs[0]["files"]["model.py"] == "another hash"
    assert legs[1]["files"] == before
    done = must(run_process(*command))
    assert said_of_source(done, folder) == [line] and "nothing to do" in done.out
    assert read_json(folder / "run.json")["source"] == legs
    same_bits(folder, seed)


def test_a_run_that_is_resumed_unchanged_has_one_leg(flags, tmp_path):
    command = "train.py", *flags, f"--out_dir={tmp_path}/run"
    assert run_process(*command, hook=SIGNAL_AT_STEP.format(step=6, signal=int(signal.SIGTERM))).code == 143
    assert said_of_source(must(run_process(*command)), tmp_path / "run") == []
    assert len(read_json(tmp_path / "run" / "run.json")["source"]) == 1


def test_a_run_from_before_source_was_kept_is_used(flags, copy):
    found = read_json(copy / "run.json")
    found["recipe"]["code"] = {"model.py": "a hash"}
    del found["source"]
    (copy / "run.json").write_text(json.dumps(found))
    assert "nothing to do" in must(run("train.py", *flags, f"--out_dir={copy}")).out


def test_edits_of_the_method_are_said_at_every_stage(data, tmp_path, monkeypatch):
    """In a copy of the repository: a comment, then a loss of zero, then the same runs anew."""
    for name in ("common", "data"):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name)
    for name in ("model.py", "train.py", "eval.py", "mix.py", "finetune.py"):
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    monkeypatch.chdir(tmp_path)

    def do(script, *arguments, code=0):
        """What a script of the copy says, with modules of its own."""
        own = {"common", "data", "study", *(name[:-3] for name in os.listdir(ROOT) if name.endswith(".py"))}
        kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}
        sys.path.insert(0, str(tmp_path))
        try:
            done = run(tmp_path / script, *arguments)
        finally:
            sys.path.remove(str(tmp_path))
            for name in [name for name in sys.modules if name.partition(".")[0] in own]:
                del sys.modules[name]
            sys.modules.update(kept)
        assert done.code == code, done.err
        return done.err if code else done.out

    train = "train.py", *SHAPE, *SHORT, "--max_steps=2", f"--data_dir={data}", "--out_dir=seed"
    mix = "mix.py", "--experts=seed,seed", "--out_dir=mixed"
    evaluate = "eval.py", "--model=seed", f"--data_dir={data}", "--sequence_length=32", "--eval_windows=2"
    evaluate += "--task_problems=2", "--max_new_tokens=4", "--out_dir=report"
    for command in (train, mix, evaluate):
        assert "changed" not in do(*command)
    path = tmp_path / "model.py"
    text = path.read_text()
    path.write_text(text + "\n# a comment changes nothing\n")
    for command in (train, evaluate):
        assert "changed" not in do(*command)

    assert text.count("loss = head_loss(") == 1
    path.write_text(text.replace("loss = head_loss(", "loss = 0 * head_loss("))
    weights, row = read(tmp_path / "seed" / "model.safetensors"), read_json(tmp_path / "report" / "results.json")
    for command, folder in ((train, "seed"), (mix, "mixed")):
        said = do(*command)
        assert said.count("changed") == 1 and "nothing to do" in said
        assert f"{folder}: made before model.py changed; --overwrite=True makes it again\n" in said
    said = do(*evaluate)
    assert said.count("changed") == 1 and "seed was scored before model.py changed; --overwrite=True" in said
    assert read_json(tmp_path / "report" / "results.json") == row

    do(*train, "--overwrite=True")
    assert read(tmp_path / "seed" / "model.safetensors") != weights
    assert "another run (parents.seed" in do(*mix, code=2)  # what was made of the old weights
    assert "changed" not in do(*evaluate)
    assert read_json(tmp_path / "report" / "results.json")["rows"][0]["id"] != row["rows"][0]["id"]


def test_a_parent_made_anew_with_other_weights_is_another_parent(data, copy, tmp_path):
    """Its recipe is the same, since source is not in it; its weights are not."""
    branch = "train.py", *SHORT, "--max_steps=1", f"--data_dir={data}", f"--init_from={copy}"
    branch += (f"--out_dir={tmp_path}/branch",)
    mix = "mix.py", f"--experts={copy},{copy}", f"--out_dir={tmp_path}/mixed"
    for command in (branch, mix):
        must(run(*command))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = read_json(copy / "run.json")
    (copy / "run.json").write_text(json.dumps({**found, "weights": weights_hash(copy)}))
    for command, folder in ((branch, tmp_path / "branch"), (mix, tmp_path / "mixed")):
        message = error_line(run(*command))
        assert f"{folder} holds another run (parents.{copy} " in message and "--overwrite=True" in message


# ---- what a run has measured ----


def test_the_log_has_the_means_of_the_steps_since_its_last_line(mixed, data, tmp_path, monkeypatch, handlers):
    """Also of those before a stop in between, off an evaluation step."""
    config = [*SHORT, f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={tmp_path}/run"]
    config, train_step, steps = parse(FinetuneConfig, config), train_file.train_step, []

    def noted(*arguments):
        metrics = train_step(*arguments)
        steps.append({name: np.array(value.tolist()) for name, value in metrics.items()})
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    monkeypatch.setattr(train_file, "train_step", noted)
    with pytest.raises(SystemExit) as leave:
        train(config, load_mixture)
    assert leave.value.code == 143 and len(steps) == 6
    train(config, load_mixture)
    assert len(steps) == 12
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log] == [0, 4, 8, 12] and not steps[0].keys() & log[0].keys()
    for line in log[1:]:
        part = steps[line["step"] - 4 : line["step"]]
        assert {"loss", "aux_loss", "grad_norm", "balance_loss", "z_loss"} <= part[0].keys()
        for name in part[0]:
            expected = np.mean([step[name] for step in part], axis=0)
            np.testing.assert_allclose(line[name], expected, rtol=1e-12)
    assert len({line["loss"] for line in log[1:]}) == 3


# ---- locks, and folders that stay empty ----


def test_a_refused_run_leaves_no_folder(flags, seed, tmp_path):
    config = parse(TrainConfig, [*flags, f"--out_dir={tmp_path}/run"])
    seen = []

    def refuse(*arguments):
        seen.append(os.listdir(tmp_path / "run"))
        raise UserError("no model today")

    with pytest.raises(UserError, match="no model today"):
        train(config, refuse)
    assert seen == [[]] and not (tmp_path / "run").exists()
    error_line(run("mix.py", f"--experts={seed}", f"--out_dir={tmp_path}/mixed"))
    assert not (tmp_path / "mixed").exists()


def test_who_is_refused_leaves_the_folder_of_the_other(flags, tmp_path):
    """Of two fresh starts, the second finds an empty folder, which the first has locked and not written into yet."""
    config = parse(TrainConfig, [*flags, f"--out_dir={tmp_path}/run"])
    seen = []

    def start_another(*arguments):
        before = os.stat(tmp_path / "run").st_ino
        seen.append(error_line(run_process("train.py", *flags, f"--out_dir={tmp_path}/run")))
        assert os.stat(tmp_path / "run").st_ino == before and os.listdir(tmp_path / "run") == []
        return build_model(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *arguments: None)
        train(config, start_another)
    assert "another process is writing into" in seen[0] and "choose another --out_dir" in seen[0]
    assert read_json(tmp_path / "run" / "run.json")["finished"]


def test_overwrite_always_starts_anew(flags, copy, seed):
    before = os.stat(copy / "model.safetensors").st_mtime_ns
    must(run("train.py", *flags, f"--out_dir={copy}", "--overwrite=True"))
    assert os.stat(copy / "model.safetensors").st_mtime_ns > before
    same_bits(copy, seed)


# ---- finished means that the weights are there ----


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "missing, and no state"])
def test_a_finished_run_without_its_weights_is_not_finished(damage, flags, copy, seed):
    path = copy / "model.safetensors"
    whole = read(path)
    if "missing" in damage:
        os.remove(path)
    elif damage == "cut":
        os.truncate(path, 1000)
    else:
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    if "no state" in damage:
        os.remove(copy / "state.pt")
    done = must(run("train.py", *flags, f"--out_dir={copy}"))
    assert "missing or damaged; making it again" in done.out
    assert read(path) == whole
    same_bits(copy, seed)


def test_a_damaged_mixture_is_made_again(seed, tmp_path):
    command = "mix.py", f"--experts={seed},{seed}", f"--out_dir={tmp_path}/mixed"
    must(run(*command))
    whole = read(tmp_path / "mixed" / "model.safetensors")
    os.truncate(tmp_path / "mixed" / "model.safetensors", 5000)
    assert "making it again" in must(run(*command)).out
    assert read(tmp_path / "mixed" / "model.safetensors") == whole


# ---- nothing is destroyed ----


def test_a_parent_is_never_overwritten(data, seed, mixed, experts, tmp_path):
    os.symlink(seed, tmp_path / "link")
    before = {folder: weights(folder)["model.norm.weight"].tobytes() for folder in (seed, mixed)}
    train = "train.py", *SHORT, f"--data_dir={data}", f"--init_from={seed}", "--overwrite=True"
    finetune = "finetune.py", *SHORT, f"--data_dir={data}", f"--init_from={mixed}", "--overwrite=True"
    mix = "mix.py", f"--experts={experts[0]},{seed}", "--overwrite=True"
    for command, folder in (
        (train, seed),
        (train, f"{seed}/"),
        (train, tmp_path / "link"),
        (mix, experts[0]),
        (mix, tmp_path / "link"),
        (finetune, mixed),
        (finetune, seed),  # an expert of the mixture, further back
    ):
        assert "holds weights that this run starts from" in error_line(run(*command, f"--out_dir={folder}"))
    assert before == {folder: weights(folder)["model.norm.weight"].tobytes() for folder in (seed, mixed)}


def test_two_processes_in_one_folder(flags, copy, mixed, seed, experts):
    for folder, command in (
        (copy, ["train.py", *flags, f"--out_dir={copy}", "--overwrite=True"]),
        (mixed, ["mix.py", f"--experts={','.join([*experts, seed])}", f"--out_dir={mixed}", "--overwrite=True"]),
    ):
        other = os.open(folder, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)
        before = sorted(os.listdir(folder))
        assert f"another process is writing into {folder}" in error_line(run(*command))
        assert sorted(os.listdir(folder)) == before
        os.close(other)  # as when its process ends, however it ends
    must(run("train.py", *flags, f"--out_dir={copy}"))


# ---- state.pt and log.jsonl ----


def resume(flags, copy, step=10):
    unfinish(copy, step)
    return run("train.py", *flags, f"--out_dir={copy}")


def test_a_flipped_bit_in_the_state_is_noticed(flags, copy):
    path = copy / "state.pt"
    whole = read(path)
    for place in (len(whole) // 3, len(whole) // 2, 2 * len(whole) // 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        message = error_line(resume(flags, copy))
        assert "state.pt is damaged" in message and "delete it to start the run again" in message


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1000},
        {"step": -1},
        {"step": "seven"},
        {"step": None},
        {"seconds": "long"},
        {"sums": []},
        {"log": 7},
        {"model": {}},
        {"model": 3},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
    ],
)
def test_a_state_of_another_form_is_refused(change, flags, copy):
    state = torch.load(copy / "state.pt")
    torch.save({**state, **change}, copy / "state.pt")
    assert "state.pt is damaged" in error_line(resume(flags, copy))
    for name in change:
        torch.save({key: value for key, value in state.items() if key != name}, copy / "state.pt")
        assert "state.pt is damaged" in error_line(resume(flags, copy))


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_the_log_comes_back_whole(damage, flags, copy, seed):
    os.remove(copy / "log.jsonl") if damage == "deleted" else os.truncate(copy / "log.jsonl", 30)
    must(resume(flags, copy))
    same_bits(copy, seed)


def test_a_run_json_of_another_form(flags, copy, seed):
    for text in ("[]", '{"id": 1}', "{", "nul"):
        (copy / "run.json").write_text(text)
        assert "run.json" in error_line(run("train.py", *flags, f"--out_dir={copy}"))


@pytest.mark.parametrize("change", [{"history": {"seed": 3}}, {"recipe": []}, {"step": "12"}])
def test_a_run_json_of_another_form_is_named(change, seed, data, tmp_path):
    copy = shutil.copytree(seed, tmp_path / "copy")
    (copy / "run.json").write_text(json.dumps({**read_json(copy / "run.json"), **change}))
    done = run("train.py", *SHORT, f"--data_dir={data}", f"--init_from={copy}", f"--out_dir={tmp_path}/run")
    assert "run.json is not a run.json of this project" in error_line(done)
