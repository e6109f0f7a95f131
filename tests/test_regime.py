"""The study of width and budget: one small point, and what it says of the runs behind it."""

import os

import pytest
from helpers import ROOT, error_line, read, read_json, run

from study.regime import RegimeConfig, measure, plot, point


@pytest.fixture(scope="module")
def measured(work, data, short_config, eval_config, in_this_process):
    """Width 32 at half of SHORT's 12 steps."""
    configs = dict.fromkeys(("seed", "expert", "finetune"), short_config)
    configs |= {"mix": f"{ROOT}/config/smoke/mix.py", "eval": eval_config}
    config = RegimeConfig(out_dir=f"{work}/regime", data_dir=data, dense_learning_rate=3e-3, **configs)
    return measure(config, 32, 0.5)


def test_both_models_had_the_same_tokens(measured, work):
    folder = f"{work}/regime/width-32-scale-0.5"
    steps = {
        name: read_json(f"{folder}/{name}/run.json")["step"] for name in ("seed", "expert-math", "btx", "dense-dm")
    }
    assert steps == {"seed": 6, "expert-math": 6, "btx": 6, "dense-dm": 18}
    shape = read_json(f"{folder}/dense-dm/config.json")
    assert (shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]) == (32, 80, 2)
    assert measured["tokens_per_parameter"] * measured["parameters"] == pytest.approx(24 * 8 * 32)
    rows = {row["name"]: row for row in read_json(f"{folder}/scores/results.json")["rows"]}
    assert measured["difference"] == rows["btx"]["bpb"]["avg"] - rows["dense-dm"]["bpb"]["avg"] != 0


def test_a_point_by_hand():
    def row(name, bpb, tokens):
        return {"name": name, "bpb": {"avg": bpb}, "accuracy": {}, "total_params": 50, "train_tokens": tokens}

    found = point(8, 1.0, [row("seed", 9.0, 100), row("dense-dm", 0.75, 1000), row("btx", 0.5, 1000)])
    assert (found["difference"], found["tokens_per_parameter"], found["parameters"]) == (-0.25, 20, 50)


def test_the_picture_has_a_line_a_width(measured, tmp_path):
    plot([measured, {**measured, "tokens_per_parameter": 9.0}, {**measured, "width": 64}], tmp_path / "regime.png")
    assert read(tmp_path / "regime.png").startswith(b"\x89PNG")


def test_bad_widths_and_limits_are_named(tmp_path):
    assert "numbers separated by commas" in error_line(run("study/regime.py", "--widths=32,wide"))
    assert "leaves no run" in error_line(run("study/regime.py", "--largest=1.0", f"--report={tmp_path}/report"))
    assert not os.path.exists(tmp_path / "report")
