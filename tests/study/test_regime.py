"""The study of width and budget: its chains' flags, and one small point beside the session's pipeline."""

import os
import shutil

import pytest
from helpers import error_line, read, read_json, run

from study import regime
from study.draw import plot_regime
from study.regime import RegimeConfig, chain_flags, measure, point


@pytest.fixture(scope="module")
def config(work, configs, tmp_path_factory):
    return RegimeConfig(configs=configs, out_dir=str(tmp_path_factory.mktemp("regime")), dense_learning_rate=3e-3)


@pytest.fixture(scope="module")
def measured(config, work, btx, experts, mixed, in_this_process):
    """A point whose chain is a copy of the session's."""

    def copy_chain(size, folder, **flags):
        for name in ("seed", "mixed", "btx", *map(os.path.basename, experts)):
            shutil.copytree(f"{work}/{name}", f"{folder}/{name}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regime, "run_chain", copy_chain)
        return measure(config, 32, 0.5)


def test_flags_of_a_chain(config):
    """Width 32 at half of SHORT's 12 steps."""
    flags = chain_flags(config, 32, 0.5)
    assert flags["SEED_FLAGS"].split() == [
        *("--hidden_size=32", "--intermediate_size=80", "--num_attention_heads=2", "--num_key_value_heads=2"),
        "--max_steps=6",
    ]
    assert flags["EXPERT_FLAGS"] == flags["FINETUNE_FLAGS"] == "--max_steps=6"


def test_both_models_had_the_same_tokens(measured, config, btx):
    folder = f"{config.out_dir}/regime/width-32-scale-0.5"
    dense, ours = read_json(f"{folder}/dense-dm/run.json"), read_json(f"{btx}/run.json")
    tokens = [sum(cost["tokens"] for cost in one["history"].values()) for one in (dense, ours)]
    assert tokens[0] == tokens[1] == measured["tokens_per_parameter"] * measured["parameters"]
    rows = {row["name"]: row for row in read_json(f"{folder}/scores/results.json")["rows"]}
    assert measured["difference"] == rows["btx"]["bpb"]["avg"] - rows["dense-dm"]["bpb"]["avg"] != 0


def test_a_point_by_hand():
    def row(name, bpb, tokens):
        return {"name": name, "bpb": {"avg": bpb}, "accuracy": {}, "total_params": 50, "train_tokens": tokens}

    found = point(8, 1.0, [row("seed", 9.0, 100), row("dense-dm", 0.75, 1000), row("btx", 0.5, 1000)])
    assert (found["difference"], found["tokens_per_parameter"], found["parameters"]) == (-0.25, 20, 50)


def test_the_picture_has_a_line_per_width(measured, tmp_path):
    plot_regime(
        [measured, {**measured, "tokens_per_parameter": 9.0}, {**measured, "width": 64}], tmp_path / "regime.png"
    )
    assert read(tmp_path / "regime.png").startswith(b"\x89PNG")


def test_bad_widths_and_limits_are_named(tmp_path):
    flags = f"--out_dir={tmp_path}/out", "--size=smoke"
    assert "numbers separated by commas" in error_line(run("study/regime.py", "--widths=32,wide", *flags))
    assert "multiples of 16" in error_line(run("study/regime.py", "--widths=30", *flags))
    assert "leaves no run" in error_line(run("study/regime.py", "--largest=1.0", *flags))
    assert not os.path.exists(tmp_path / "out")
