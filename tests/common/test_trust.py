"""A run never lies: changed code, damaged weights and states, doubled processes and poisoned numbers are all named."""

import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SHAPE, SHORT, error_line, must, read, read_json, run, same_bits, weights
from safetensors.torch import load_file, save_file

from common import run as runs
from common.config import parse
from common.errors import UserError
from train import TrainConfig, build_model, train


@pytest.fixture
def flags(data):
    return [*SHAPE, *SHORT, f"--data_dir={data}"]


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


# ---- source code is part of a recipe ----


def test_bare_source_is_what_the_program_does():
    text = 'def f(x):\n    """Doc."""\n\n    return x + 1  # why\n\n\n'
    text += 'class A:\n    """Doc\n    ument."""\n    y = "# no comment"\n'
    same = 'def f(x):\n    # other\n    return x + 1\nclass A:\n    "Doc"\n    y = "# no comment"'
    assert runs.bare(text) == runs.bare(same) == 'def f(x):\n    return x + 1\nclass A:\n    y = "# no comment"'
    assert runs.bare(text) != runs.bare(text.replace("x + 1", "x + 2"))
    assert runs.bare(text) != runs.bare(text.replace("# no comment", "no comment"))


def test_a_changed_method_is_noticed_at_every_stage(data, tmp_path):
    """In a copy of the repository: a finished run, then a loss of zero."""
    for name in ("common", "data"):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name)
    for name in ("model.py", "train.py", "eval.py", "mix.py", "finetune.py"):
        shutil.copy(os.path.join(ROOT, name), tmp_path)

    def do(script, *arguments):
        command = [sys.executable, script, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    train = "train.py", *SHAPE, *SHORT, "--max_steps=2", f"--data_dir={data}", "--out_dir=seed"
    mix = "mix.py", "--experts=seed,seed", "--out_dir=mixed"
    evaluate = "eval.py", "--model=seed", f"--data_dir={data}", "--sequence_length=32", "--eval_windows=2"
    evaluate += "--task_problems=2", "--max_new_tokens=4", "--out_dir=report"
    for command in (train, mix, evaluate):
        done = do(*command)
        assert done.returncode == 0, done.stderr
    model, source = tmp_path / "model.py", (tmp_path / "model.py").read_text()
    model.write_text(source + "\n# a comment changes nothing\n")
    assert "nothing to do" in do(*train).stdout
    model.write_text(source.replace("loss = total / (targets", "loss = 0 * total / (targets"))
    for command in (train, evaluate):
        done = do(*command)
        assert done.returncode == 2 and done.stderr.startswith("error: model.py changed since"), done.stderr
        assert "--overwrite=True" in done.stderr and "--same_code=True" in done.stderr
    before = read(tmp_path / "seed" / "model.safetensors")
    assert "nothing to do" in do(*train, "--same_code=True").stdout and "nothing to do" in do(*train).stdout
    assert do(*train, "--overwrite=True").returncode == 0
    assert read(tmp_path / "seed" / "model.safetensors") != before
    assert "another run (parents.seed" in do(*mix).stderr  # what was made of the old weights is stale, too


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


def test_two_fresh_starts_into_one_folder(data, tmp_path):
    """The second finds no folder, and the first has made and locked it before the second begins to write."""
    config = parse(TrainConfig, [*SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/run"])
    taken = []

    def build_while_another_starts(*arguments):
        os.mkdir(tmp_path / "run")
        taken.append(os.open(tmp_path / "run", os.O_RDONLY))
        fcntl.flock(taken[0], fcntl.LOCK_EX)
        return build_model(*arguments)

    with pytest.raises(UserError, match="another process is writing into"):
        train(config, build_while_another_starts)
    assert os.listdir(tmp_path / "run") == []
    os.close(taken[0])


def test_routers_from_text_depend_on_the_forward_pass(seed, experts, data, tmp_path):
    """They are computed with the model, so a mixture with them is stale when the model's source changes."""
    for start, stale in (("normal", False), ("contrast", True)):
        flags = f"--experts={experts[0]},{seed}", f"--router_init={start}", f"--data_dir={data}"
        must(run("mix.py", *flags, f"--out_dir={tmp_path}/{start}"))
        path = tmp_path / start / "run.json"
        found = read_json(path)
        assert ("model.py" in found["recipe"]["code"]) == stale
        if stale:
            found["recipe"]["code"]["model.py"] = "another hash"
            path.write_text(json.dumps(found))
            message = error_line(run("mix.py", *flags, f"--out_dir={tmp_path}/{start}"))
            assert f"model.py changed since {tmp_path}/{start} was made" in message


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
        assert "state.pt is damaged" in message and "delete it to start the run anew" in message


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


# ---- weights and shapes that nobody should compute with ----


def readers(folder, data, tmp_path):
    """The commands that read a checkpoint, each given this one."""
    yield run("train.py", *SHORT, f"--data_dir={data}", f"--init_from={folder}", f"--out_dir={tmp_path}/out")
    yield run("mix.py", f"--experts={folder},{folder}", f"--out_dir={tmp_path}/out")
    size = "--sequence_length=32", "--max_new_tokens=8"
    yield run("eval.py", f"--model={folder}", f"--data_dir={data}", *size, f"--out_dir={tmp_path}/out")
    yield run("sample.py", f"--model={folder}", "--device=cpu")


@pytest.fixture
def foreign(seed, tmp_path):
    """The seed's weights, shape and tokenizer alone, as from elsewhere."""
    leave_out = shutil.ignore_patterns("run.json", "state.pt", "log.jsonl")
    return shutil.copytree(seed, tmp_path / "foreign", ignore=leave_out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_weights_are_named(value, foreign, data, tmp_path):
    tensors = load_file(foreign / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] = value
    save_file(tensors, foreign / "model.safetensors")
    for done in readers(foreign, data, tmp_path):
        assert "model.layers.1.self_attn.q_proj.weight holds NaN or infinity" in error_line(done)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_weights_of_another_kind_are_refused(dtype, foreign, data, tmp_path):
    tensors = load_file(foreign / "model.safetensors")
    name = "model.norm.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, foreign / "model.safetensors")
    for done in readers(foreign, data, tmp_path):
        assert f"{name} is stored as" in error_line(done)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
        ({"hidden_size": -32}, "hidden_size must be a whole number"),
        ({"intermediate_size": 48.5}, "intermediate_size must be a whole number"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"max_position_embeddings": None}, "max_position_embeddings must be a whole number"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"rope_theta": None, "rope_parameters": None}, None),  # transformers' default
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts must be a whole number"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_a_shape_that_cannot_be(change, words, foreign, data, tmp_path):
    (foreign / "config.json").write_text(json.dumps({**read_json(foreign / "config.json"), **change}))
    for done in readers(foreign, data, tmp_path):
        if words:
            assert words in error_line(done) and str(foreign / "config.json") in error_line(done)
        else:
            must(done)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_model_whose_vocabulary_is_not_the_datas(data, tmp_path):
    from model import ModelConfig, Transformer

    Transformer(ModelConfig(64, 16, 16, 1, 2, 2, 128)).save_pretrained(tmp_path / "small")
    flags = f"--data_dir={data}", "--sequence_length=32", f"--out_dir={tmp_path}/out"
    assert "64 entries" in error_line(run("eval.py", f"--model={tmp_path}/small", *flags))
    message = error_line(run("train.py", *SHORT, f"--init_from={tmp_path}/small", *flags))
    assert "the model's vocab_size is only 64" in message


# ---- keys have ranges, files have encodings ----

RANGES = {
    "train.py": {
        "learning_rate": "0 -1e-3 nan inf",
        "min_learning_rate": "-0.1 1.5 nan",
        "weight_decay": "-0.1 nan inf",
        "adam_beta1": "1.0 -0.1 nan",
        "adam_beta2": "1.0 nan",
        "max_grad_norm": "0 nan inf",
        "threads": "-1 100000",
        "seed": "-1 99999999999999999999",
        "max_steps": "0",
        "hidden_size": "0 -8",
        "batch_size": "0",
        "sequence_length": "0",
        "eval_windows": "0",
        "domain": "math:nan math:inf math,math math:-1 math:0 snow",
        "freeze": "tail",
    },
    "finetune.py": {
        "router_aux_loss_coef": "-1 nan inf",
        "router_z_loss_coef": "-1 nan",
        "num_experts_per_tok": "-1",
    },
    "mix.py": {"router_std": "-1 nan inf", "split": "0", "drop": "1.5 nan", "num_experts_per_tok": "0"},
    "eval.py": {"sequence_length": "0", "eval_windows": "0", "task_problems": "0", "max_new_tokens": "0"},
    "sample.py": {
        "temperature": "-1 nan inf",
        "top_k": "-1",
        "num_samples": "0 -2",
        "max_new_tokens": "0 -5",
        "seed": "-1",
        "threads": "-1",
    },
    "data/prepare.py": {"max_bytes": "-1", "vocab_size": "0 100 99999999"},
}


@pytest.mark.parametrize("script", RANGES)
def test_keys_have_ranges(script, data, mixed, seed, tmp_path):
    flags = [f"--out_dir={tmp_path}/out"]
    flags += {"mix.py": [f"--experts={seed},{seed}"], "sample.py": [f"--model={seed}"]}.get(script, [])
    flags += [f"--data_dir={data}"] if script in ("train.py", "finetune.py", "eval.py") else []
    flags += [f"--init_from={mixed}"] if script == "finetune.py" else []
    flags += [f"--model={seed}"] if script == "eval.py" else []
    flags = [flag for flag in flags if not (script == "sample.py" and "out_dir" in flag)]
    for name, values in RANGES[script].items():
        for value in values.split():
            message = error_line(run(script, *flags, f"--{name}={value}"))
            assert name in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"max_steps = 3  # caf\xe9\n", "is not UTF-8"),
        (b"max_steps = 3\0\n", "config.py"),
        (b"max_steps = {[]: 1}\n", "must be a plain number"),
        (b"max_steps = {{}}\n", "must be a plain number"),
        (b"max_steps = " + 5000 * b"(" + 5000 * b")" + b"\n", "config.py"),
        (b"max_steps = " + 3000 * b"-" + b"1\n", "config.py"),
        (b"max_steps = 9" + 4999 * b"9" + b"\n", "config.py"),
        (b"out_dir = 'a\\x1b[31mb'\n", "holds a control character"),
    ],
)
def test_config_files_of_every_kind(text, words, tmp_path):
    (tmp_path / "config.py").write_bytes(text)
    assert words in error_line(run("train.py", tmp_path / "config.py"))


def test_a_byte_order_mark_is_no_matter(flags, tmp_path):
    (tmp_path / "config.py").write_bytes(b"\xef\xbb\xbfmax_steps = 1\n")
    must(run("train.py", tmp_path / "config.py", *flags, "--max_steps=1", f"--out_dir={tmp_path}/run"))


def test_names_cannot_reach_the_terminal(seed, tmp_path):
    assert "holds a control character" in error_line(run("sample.py", "--model=\x1b[31mred"))
    assert "\x1b" not in error_line(run("sample.py", "--modell\x1b[31m=x"))


def test_a_prompt_that_is_not_utf8(seed):
    command = [sys.executable, "sample.py", f"--model={seed}", b"--prompt=caf\xe9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and b"prompt is not UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_sizes_that_no_machine_has(data, tmp_path):
    flags = *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--hidden_size=4194304"
    assert "out of memory; lower --micro_batch_size" in error_line(run("train.py", *flags))


def test_results_of_another_form_are_kept(seed, data, tmp_path):
    flags = f"--model={seed}", f"--data_dir={data}", "--sequence_length=32", f"--out_dir={tmp_path}"
    for text in ("[1, 2]", "{}", '{"rows": 3}', '{"rows": [1]}', "half"):
        (tmp_path / "results.json").write_text(text)
        assert "results.json" in error_line(run("eval.py", *flags))
        assert (tmp_path / "results.json").read_text() == text
