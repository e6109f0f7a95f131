"""Every mistake a user can make gives one line that names the thing and the remedy, and exit code 2."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SHAPE, SHORT, error_line, must, read, read_json, run, run_process
from safetensors.torch import load_file, save_file

from common import errors
from common.corpus import Corpus
from model import ModelConfig, Transformer


@pytest.fixture
def flags(data):
    return [*SHAPE, *SHORT, f"--data_dir={data}"]


@pytest.fixture
def copy(seed, tmp_path):
    """A copy of the seed's folder, to damage."""
    return shutil.copytree(seed, tmp_path / "copy")


def all_readers(folder, data, tmp_path):
    """The commands that read a checkpoint, each given this one."""
    yield run("train.py", *SHORT, f"--data_dir={data}", f"--init_from={folder}", f"--out_dir={tmp_path}/out")
    yield run("mix.py", f"--experts={folder},{folder}", f"--out_dir={tmp_path}/out")
    size = "--sequence_length=32", "--max_new_tokens=8"
    yield run("eval.py", f"--model={folder}", f"--data_dir={data}", *size, f"--out_dir={tmp_path}/out")
    yield run("sample.py", f"--model={folder}", "--device=cpu")


def test_missing_data(tmp_path):
    nowhere = tmp_path / "nowhere"
    for script in ("train.py", "eval.py"):
        flags = [*SHAPE, *SHORT] if script == "train.py" else [f"--model={tmp_path}"]
        message = error_line(run(script, *flags, f"--data_dir={nowhere}", f"--out_dir={tmp_path}/out"))
        assert str(nowhere) in message and "python -m data.prepare" in message
    assert not os.path.exists(tmp_path / "out")


def test_missing_domain(data, tmp_path):
    flags = *SHAPE, *SHORT, f"--data_dir={data}", "--domain=poems", f"--out_dir={tmp_path}/out"
    message = error_line(run("train.py", *flags))
    assert "poems" in message and "python -m data.prepare" in message


def test_missing_checkpoint(data, tmp_path):
    for done in all_readers(tmp_path / "nowhere", data, tmp_path):
        message = error_line(done)
        assert str(tmp_path / "nowhere") in message and ";" in message  # the thing; the remedy


def test_missing_weights(copy, data, tmp_path):
    os.remove(copy / "model.safetensors")
    for done in all_readers(copy, data, tmp_path):
        assert f"{copy}/model.safetensors is missing" in error_line(done)


@pytest.mark.parametrize("keep", [0, 5, 400, 0.5, 0.999])
def test_truncated_weights(keep, copy, data, tmp_path):
    path = copy / "model.safetensors"
    os.truncate(path, int(keep * os.path.getsize(path)) if isinstance(keep, float) else keep)
    for done in all_readers(copy, data, tmp_path):
        assert f"{path} is damaged" in error_line(done)


def change_config(folder, **changes):
    path = os.path.join(folder, "config.json")
    found = read_json(path)
    with open(path, "w") as file:
        json.dump({**found, **changes}, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model.py does not read model_type 'gpt2'; it reads llama, "),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2}}, "needs a positive factor, not -2"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "needs a positive low_freq_factor, not None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"sliding_window": 16}, "sliding_window 16"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"quantization_config": {"quant_method": "gptq"}}, 'quantization_config {"quant_method": "gptq"}'),
        ({"head_dim": "wide"}, "head_dim must be a whole number of at least 1, not 'wide'"),
        ({"head_dim": 16}, "has shape"),
        ({"intermediate_size": 56}, "has shape"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2."),
        ({"num_hidden_layers": 1}, "has an unknown tensor model.layers.1."),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
    ],
)
def test_foreign_checkpoint(change, words, copy, data, tmp_path):
    change_config(copy, **change)
    for done in all_readers(copy, data, tmp_path):
        message = error_line(done)
        assert words in message and str(copy) in message


def test_config_that_is_no_json(copy, data, tmp_path):
    (copy / "config.json").write_text('{"model_type": "lla')
    for done in all_readers(copy, data, tmp_path):
        assert f"{copy}/config.json cannot be read" in error_line(done)


def test_a_tensor_that_is_missing_or_unknown(copy, data, tmp_path):
    path = copy / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: one for key, one in whole.items() if key != name}, path)
    for done in all_readers(copy, data, tmp_path):
        assert f"it lacks {name}" in error_line(done)
    save_file({**whole, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, path)
    for done in all_readers(copy, data, tmp_path):
        assert "unknown tensor model.layers.0.self_attn.q_proj.bias" in error_line(done)


# ---- mix.py ----


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 48},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"vocab_size": 328},
        {"rope_theta": 500.0},
        {"tie_word_embeddings": False},
    ],
)
def test_experts_of_different_shape(change, seed, tmp_path):
    model = Transformer(dataclasses.replace(ModelConfig.from_pretrained(seed), **change))
    model.save_pretrained(str(tmp_path / "other"))
    message = error_line(run("mix.py", f"--experts={seed},{tmp_path}/other", f"--out_dir={tmp_path}/mixed"))
    assert f"{tmp_path}/other has {next(iter(change))}" in message
    assert not os.path.exists(tmp_path / "mixed")


@pytest.fixture
def other_data(data, tmp_path):
    """Data of the same vocabulary size, but with another tokenizer."""
    (tmp_path / "text").mkdir()
    for n in range(30):
        (tmp_path / "text" / f"{n}.txt").write_text(
            f"{n} " + "".join(f"{a}{b} " for a in "qxzwvkjy" for b in "aeiouhlm" * 3)
        )
    folder = f"{tmp_path}/other-data"
    flags = f"--out_dir={folder}", f"--domains=noise={tmp_path}/text", "--vocab_size=320"
    must(run_process("data/prepare.py", *flags, hook="import sys; sys.path.insert(0, '.')"))
    return folder


def test_another_tokenizer(seed, other_data, tmp_path):
    must(run("train.py", *SHAPE, *SHORT, "--max_steps=1", f"--data_dir={other_data}", f"--out_dir={tmp_path}/other"))
    attempts = (
        run("mix.py", f"--experts={seed},{tmp_path}/other", f"--out_dir={tmp_path}/out"),
        run("train.py", *SHORT, f"--init_from={seed}", f"--data_dir={other_data}", f"--out_dir={tmp_path}/out"),
        run(
            "eval.py", f"--model={seed}", "--sequence_length=32", f"--data_dir={other_data}", f"--out_dir={tmp_path}/r"
        ),
    )
    for done in attempts:
        assert "another tokenizer" in error_line(done)


@pytest.mark.parametrize(
    ("names", "words"),
    [("", "nothing to mix"), ("{seed}", "there are only 1 experts"), ("{seed},{mixed}", "is already a mixture")],
)
def test_nothing_fit_to_mix(names, words, seed, mixed, tmp_path):
    names = names.format(seed=seed, mixed=mixed)
    assert words in error_line(run("mix.py", f"--experts={names}", f"--out_dir={tmp_path}/out"))


# ---- sizes ----


def test_a_sequence_longer_than_the_model(seed, data, tmp_path):
    flags = f"--data_dir={data}", "--sequence_length=256", f"--out_dir={tmp_path}/out"
    for start in (SHAPE, [f"--init_from={seed}"]):
        message = error_line(run("train.py", *start, *SHORT, *flags))
        assert "--sequence_length=256" in message and "128" in message and not os.path.exists(tmp_path / "out")
    message = error_line(run("eval.py", f"--model={seed}", *flags))
    assert "--sequence_length=256" in message and "128" in message


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


BROKEN_DATA = {  # the file: (what happens to it, what is said)
    "train.bin": (cut, "train.bin has"),
    "val.bin": (cut, "copy the folder again"),
    "meta.json": (lambda path: path.write_text("{}"), "meta.json is not a meta.json of this project"),
}


@pytest.mark.parametrize("name", BROKEN_DATA)
def test_a_data_folder_that_was_copied_in_part(name, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    change, words = BROKEN_DATA[name]
    change(tmp_path / "data" / "rain" / name)
    flags = *SHAPE, *SHORT, f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/run"
    assert words in error_line(run("train.py", *flags))


def test_a_task_that_lacks_its_questions(seed, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for content in ("", '{"prompt": "1 + 1?"}\n'):
        (tmp_path / "data" / "math" / "task-test.jsonl").write_text(content)
        flags = f"--model={seed}", f"--data_dir={tmp_path}/data", "--sequence_length=32", f"--out_dir={tmp_path}/report"
        done = run("eval.py", *flags)
        assert "lacks questions, or a question lacks answer, choices, prompt" in error_line(done)


def test_a_copy_of_a_domain_is_no_domain(data, tmp_path):
    for name in ("data", "data/rain copy", "data/.ipynb_checkpoints"):
        shutil.copytree(f"{data}/rain" if "/" in name else data, tmp_path / name)
    assert Corpus(str(tmp_path / "data")).domains == ["math", "rain"]


def test_a_domain_with_too_few_tokens(data, seed, tmp_path):
    few = shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        path = few / "rain" / f"{split}.bin"
        whole = read(path)
        path.write_bytes(whole[: 2 * 32])  # one token short of a window
        meta = read_json(few / "rain" / "meta.json")
        meta[split]["tokens"] = 32
        (few / "rain" / "meta.json").write_text(json.dumps(meta))
        flags = *SHORT, f"--data_dir={few}", f"--init_from={seed}", f"--out_dir={tmp_path}/out"
        message = error_line(run("train.py", *flags))
        assert f"rain/{split}.bin has 32 tokens" in message and "shorten --sequence_length" in message
        path.write_bytes(b"")
        assert f"rain/{split}.bin" in error_line(run("train.py", *flags))
        shutil.copytree(data, few, dirs_exist_ok=True)


def test_shapes_and_batches_that_do_not_fit(seed, mixed, data, tmp_path):
    train = "train.py", *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"
    finetune = "finetune.py", *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"
    for command, words in (
        ([*train, "--num_attention_heads=5"], "hidden_size must be"),
        ([*train, "--num_key_value_heads=3"], "multiple of num_key_value_heads"),
        ([*train, "--batch_size=6"], "--batch_size=6 is not a multiple of --micro_batch_size=4"),
        (finetune, "--init_from is empty"),
        ([*finetune, f"--init_from={seed}"], "is a dense model"),
        ([*finetune, f"--init_from={mixed}", "--num_experts_per_tok=4"], "between 1 and the model's 3"),
        ([*finetune, f"--init_from={mixed}", "--freeze=tail"], "is not a part of a model; choose from"),
        ([*finetune, f"--init_from={mixed}", "--freeze=head"], "this model has no separate head"),
        ([*train, "--freeze=embeddings,attention,norms,experts"], "leaves nothing to train"),
    ):
        assert words in error_line(run(*command))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the error says is missing")
def test_cuda_that_is_not_there(data, tmp_path):
    flags = *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--device=cuda"
    assert "--device=cpu" in error_line(run("train.py", *flags))


# ---- sample.py ----


def test_sampling(seed, mixed):
    flags = "--prompt=Question: Tom", "--max_new_tokens=5", "--device=cpu"
    for folder in (seed, mixed):
        first = must(run("sample.py", f"--model={folder}", *flags)).out
        assert first.startswith("Question: Tom") and first == must(run("sample.py", f"--model={folder}", *flags)).out
        assert first != must(run("sample.py", f"--model={folder}", *flags, "--seed=2", "--temperature=2.0")).out
    assert "--prompt is empty" in error_line(run("sample.py", f"--model={seed}", "--prompt="))
    assert "the model takes only 128" in error_line(run("sample.py", f"--model={seed}", f"--prompt={'x ' * 200}"))


# ---- weights and shapes that nobody should compute with ----


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
    for done in all_readers(foreign, data, tmp_path):
        assert "model.layers.1.self_attn.q_proj.weight contains NaN or infinity" in error_line(done)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_weights_of_another_kind_are_refused(dtype, foreign, data, tmp_path):
    tensors = load_file(foreign / "model.safetensors")
    name = "model.norm.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, foreign / "model.safetensors")
    for done in all_readers(foreign, data, tmp_path):
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
    for done in all_readers(foreign, data, tmp_path):
        if words:
            assert words in error_line(done) and str(foreign / "config.json") in error_line(done)
        else:
            must(done)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_model_whose_vocabulary_is_not_the_datas(data, tmp_path):
    Transformer(ModelConfig(64, 16, 16, 1, 2, 2, 128)).save_pretrained(tmp_path / "small")
    flags = f"--data_dir={data}", "--sequence_length=32", f"--out_dir={tmp_path}/out"
    assert "64 entries" in error_line(run("eval.py", f"--model={tmp_path}/small", *flags))
    message = error_line(run("train.py", *SHORT, f"--init_from={tmp_path}/small", *flags))
    assert "token 319, but the model has 64 entries" in message


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
        (b"max_steps = 3  # caf\xe9\n", "write `key = value` lines in UTF-8"),
        (b"max_steps = 3\0\n", "config.py"),
        (b"max_steps = {[]: 1}\n", "must be a plain number"),
        (b"max_steps = {{}}\n", "must be a plain number"),
        (b"max_steps = " + 5000 * b"(" + 5000 * b")" + b"\n", "config.py"),
        (b"max_steps = " + 3000 * b"-" + b"1\n", "config.py"),
        (b"max_steps = 9" + 4999 * b"9" + b"\n", "config.py"),
        (b"out_dir = 'a\\x1b[31mb'\n", "contains a control character"),
    ],
)
def test_config_files_of_every_kind(text, words, tmp_path):
    (tmp_path / "config.py").write_bytes(text)
    assert words in error_line(run("train.py", tmp_path / "config.py"))


def test_a_byte_order_mark_is_no_matter(flags, tmp_path):
    (tmp_path / "config.py").write_bytes(b"\xef\xbb\xbfmax_steps = 1\n")
    must(run("train.py", tmp_path / "config.py", *flags, "--max_steps=1", f"--out_dir={tmp_path}/run"))


def test_names_cannot_reach_the_terminal(seed, tmp_path):
    assert "contains a control character" in error_line(run("sample.py", "--model=\x1b[31mred"))
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


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory_names_the_knobs(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as leave:
        errors.command(main)
    said = capsys.readouterr().err
    assert leave.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert all(knob in said for knob in ("--micro_batch_size", "--checkpoint_activations=True"))


# ---- places and terminals ----

EVAL = "--sequence_length=32", "--max_new_tokens=8", "--eval_windows=2", "--task_problems=2"


def test_places_where_nothing_can_be_made(seed, mixed, data, tmp_path):
    """A file, a link to nowhere, no name; and nothing there is changed."""
    (tmp_path / "file").write_text("mine")
    os.symlink(tmp_path / "nothing", tmp_path / "link")
    for place in (tmp_path / "file", tmp_path / "link", tmp_path / "file" / "inside", ""):
        for command in (
            ("train.py", *SHAPE, *SHORT, f"--data_dir={data}"),
            ("mix.py", f"--experts={seed},{seed}"),
            ("eval.py", f"--model={seed}", f"--data_dir={data}", *EVAL),
        ):
            message = error_line(run(*command, f"--out_dir={place}"))
            assert message.endswith("choose another --out_dir") and str(place) in message
    message = error_line(
        run("study/tokens.py", f"--model={mixed}", "--device=cpu", f"--page={tmp_path}/nowhere/page.html")
    )
    assert message.endswith("(No such file or directory); nothing was written; choose another place")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_a_folder_that_may_not_be_written_to_is_told_before_the_work(seed, data, tmp_path, monkeypatch):
    """(A superuser may write anywhere, so the answer of the system is put in.)"""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("common.corpus.Corpus.windows", None)  # scoring would fail
    message = error_line(run("eval.py", f"--model={seed}", f"--data_dir={data}", *EVAL, f"--out_dir={tmp_path}/report"))
    assert message == f"error: {tmp_path}/report is read-only; choose another --out_dir"
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_the_remedy_is_space_only_where_space_is_lacking(number, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    remedy = "free some space and run again" if number == errno.ENOSPC else "choose another place"
    with pytest.raises(errors.UserError, match=f"{os.strerror(number)}.; nothing was written; {remedy}"):
        errors.write_atomically(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


def child(*words, **environment):
    """A script in a process of its own, without HOME, user or temporary folder."""
    without = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    environment = {**without, "TMPDIR": "/nowhere", **environment}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True)


def test_what_a_terminal_cannot_show_is_written_out(seed):
    """PYTHONIOENCODING=ascii, as on some servers."""
    flags = f"--model={seed}", "--device=cpu", "--temperature=0", "--max_new_tokens=3", "--prompt=Größe 漢字 🙂"
    expected = must(run("sample.py", *flags)).out
    done = child("sample.py", *flags, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert done.stdout == expected.encode("ascii", "backslashreplace")


def test_a_full_disk_behind_stdout_is_one_line(seed):
    with open("/dev/full", "wb") as full:
        words = [sys.executable, "sample.py", f"--model={seed}", "--device=cpu", "--max_new_tokens=3"]
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


def test_names_of_every_kind_train_mix_and_score(data, tmp_path):
    """A space, quotes, =, brackets and letters of other alphabets in a path."""
    place = tmp_path / "a 'b\" [c]=é 漢"
    must(run("train.py", *SHAPE, *SHORT, "--max_steps=1", f"--data_dir={data}", f"--out_dir={place}/seed"))
    must(run("mix.py", f"--experts={place}/seed,{place}/seed", f"--out_dir={place}/mixed"))
    flags = f"--model=row={place}/seed,{place}/mixed", f"--data_dir={data}", *EVAL
    must(run("eval.py", *flags, f"--out_dir={place}/report"))
    assert [row["name"] for row in read_json(place / "report" / "results.json")["rows"]] == ["row", "mixed"]


def test_a_domain_of_another_tokenizer_is_refused(data, other_data, tmp_path):
    """A folder that was prepared elsewhere and copied here: its ids mean other text."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(f"{other_data}/noise", tmp_path / "data" / "noise")
    done = run("train.py", *SHAPE, *SHORT, f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/run")
    assert "noise was prepared with another tokenizer" in error_line(done)


def test_a_drive_that_cannot_lock_is_named(data, tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    done = run("train.py", *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/run")
    assert f"{tmp_path}/run cannot be locked (No locks available); choose an --out_dir" in error_line(done)


def test_a_file_of_another_user_is_not_to_be_deleted(seed, tmp_path, monkeypatch):
    def denied(path, *arguments, **options):
        if str(path).endswith("run.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(errors, "open", denied, raising=False)
    with pytest.raises(PermissionError):
        errors.read_json(f"{seed}/run.json", "delete the folder")
