"""The configurator: files and flags are checked, files are never executed."""

import dataclasses
import os
import runpy

import pytest
from helpers import ROOT, error_line, run

from common.config import key, parse
from common.errors import UserError
from finetune import FinetuneConfig
from train import TrainConfig


@dataclasses.dataclass
class Config:
    """Some keys."""

    name: str = key("seed", "a name")
    learning_rate: float = key(1e-3, "a rate")
    steps: int = key(10, "a number")
    overwrite: bool = key(False, "a switch")
    mode: str = key("fast", "a choice", ("fast", "exact"))


def parse_text(tmp_path, text, *flags):
    (tmp_path / "config.py").write_text(text)
    return parse(Config, [str(tmp_path / "config.py"), *flags])


def test_file_then_flags(tmp_path):
    text = '"""What this is."""\n\nsteps = 1_000  # why\nlearning_rate = 3\nname = "a # b"\n'
    config = parse_text(tmp_path, text, "--steps=-5", "--overwrite=True", "--name=x=y", "--mode=exact")
    assert config == Config("x=y", 3.0, -5, True, "exact") and type(config.learning_rate) is float
    assert parse(Config, []) == Config()
    assert parse(Config, ["--name=1e5"]).name == "1e5"  # text stays text


def test_a_switch_needs_no_value_and_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse(Config, ["--overwrite", "--name=a=~/x,~/y,b~/z"])
    assert config.overwrite and config.name == "a=/home/me/x,/home/me/y,b~/z"
    assert parse_text(tmp_path, 'name = "~/poems"').name == "/home/me/poems"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("steps = 1\nlerning_rate = 1.0", 2, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("zzz = 1", 1, "unknown key 'zzz'; --help lists the keys"),
        ("\n\nsteps = 1.5", 3, "steps must be int, got 1.5 (float)"),
        ("steps = True", 1, "steps must be int, got True (bool)"),
        ("overwrite = 1", 1, "overwrite must be bool"),
        ("name = 3", 1, "name must be str"),
        ("mode = 'slow'", 1, "mode must be one of 'fast', 'exact', got 'slow'"),
        ("steps = 1\nname = 'a'\nsteps = 2", 3, "steps is set twice (first on line 1)"),
        ("steps = 1\nimport os", 2, "only lines of the form `key = value`"),
        ("steps = len('abc')", 1, "steps must be a plain number, string or True/False"),
        ("name = f'{1}'", 1, "name must be a plain number, string or True/False"),
        ("steps += 1", 1, "only lines"),
        ("steps = name = 1", 1, "only lines"),
        ("if True:\n    steps = 1", 1, "only lines"),
        ("print('hello')", 1, "only lines"),
        ("steps = 1\nsteps = = 2", 2, "invalid syntax"),
    ],
)
def test_a_wrong_file_names_its_line(text, line, words, tmp_path):
    with pytest.raises(UserError) as caught:
        parse_text(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path}/config.py:{line}: ") and words in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stepz=3"], "--stepz=3: unknown key 'stepz'; did you mean 'steps'?"),
        (["--steps=many"], "--steps=many: steps must be int, got 'many' (str)"),
        (["--steps=1.0"], "steps must be int"),
        (["--steps"], "write --steps=VALUE"),
        (["--overwrite=yes"], "overwrite must be bool"),
        (["--mode=slow"], "one of 'fast', 'exact'"),
        (["--steps=1", "file.py"], "give one config file first"),
    ],
)
def test_a_wrong_flag_is_named(flags, words):
    with pytest.raises(UserError) as caught:
        parse(Config, flags)
    assert words in str(caught.value)


def test_a_file_is_not_executed(tmp_path):
    """Nothing of it runs, not even what stands before the line that is refused."""
    trace = tmp_path / "trace"
    (tmp_path / "config.py").write_text(f"open({str(trace)!r}, 'w')\nmax_steps = 1\n")
    assert "config.py:1" in error_line(run("train.py", tmp_path / "config.py"))
    (tmp_path / "config.py").write_text(f"max_steps = open({str(trace)!r}, 'w').fileno()\n")
    assert "config.py:1" in error_line(run("train.py", tmp_path / "config.py"))
    assert not trace.exists()
    assert "missing.py: No such file" in error_line(run("train.py", tmp_path / "missing.py"))


@pytest.mark.parametrize(("script", "cls"), [("train.py", TrainConfig), ("finetune.py", FinetuneConfig)])
def test_help_lists_every_key(script, cls):
    done = run(script, "--help")
    assert done.code == 0 and not done.err
    lines = done.out.splitlines()
    for field in dataclasses.fields(cls):
        heading = f"  --{field.name} ({field.type.__name__}, default {field.default!r})"
        assert heading in lines
        assert field.metadata["help"] in lines[lines.index(heading) + 1]


STAGES = {"data": "data/prepare.py", "seed": "train.py", "expert": "train.py", "mix": "mix.py"}
STAGES |= {"finetune": "finetune.py", "eval": "eval.py"}
CONFIG_CLASSES = {"data/prepare.py": "DataConfig", "train.py": "TrainConfig", "mix.py": "MixConfig"}
CONFIG_CLASSES |= {"finetune.py": "FinetuneConfig", "eval.py": "EvalConfig"}


@pytest.mark.parametrize("size", ["smoke", "cpu", "gpu"])
def test_the_configs_in_the_repository_are_valid(size):
    files = {stage: os.path.join(ROOT, "config", size, f"{stage}.py") for stage in STAGES}
    for stage, script in STAGES.items():
        cls = runpy.run_path(os.path.join(ROOT, script))[CONFIG_CLASSES[script]]
        config = parse(cls, [files[stage]])
        assert f"out/{size}/" in config.out_dir
        if hasattr(config, "data_dir"):
            assert config.data_dir == f"out/{size}/data"
