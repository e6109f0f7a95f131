"""What averaging costs over how far branches go: points by their real commands, and by hand."""

import json
import os
import shutil

import pytest
from helpers import must, read, read_json, run

from common.errors import UserError
from study import draw, drift
from study.damage import MIXING, SOUP
from study.drift import DriftConfig, drift_table, point_of, read_points

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_points_by_their_real_commands(chain_configs, seed, tmp_path, monkeypatch):
    """Longer branches go further; the seed's score is the same in all points; a second call trains nothing."""
    shutil.copytree(seed, tmp_path / "seed")
    flags = f"--configs={chain_configs}", f"--out_dir={tmp_path}", "--domains=math,rain", "--eval_windows=4"
    flags += "--steps=2,8", "--rates=1e-3"
    must(run("study/drift.py", *flags))
    found = read_json(tmp_path / "drift" / "drift.json")
    short, long = found["points"]
    assert (short["steps"], long["steps"]) == (2, 8) and 0 < short["drift"] < long["drift"]
    assert {*short["groups"]} == {"nothing", MIXING, SOUP}  # no kind or layer by itself
    assert short["seed"] == pytest.approx(long["seed"]) and found["size"].endswith("parameters")
    for steps in (2, 8):
        recipe = read_json(tmp_path / "drift" / f"0.001-{steps}" / "math" / "run.json")["recipe"]["config"]
        assert (recipe["max_steps"], recipe["learning_rate"], recipe["freeze"]) == (steps, 1e-3, "none")
    assert read(tmp_path / "drift" / "drift.md").decode().count("\n| 0.001 |") == 2
    before = os.stat(tmp_path / "drift" / "0.001-8" / "math" / "model.safetensors").st_mtime_ns
    must(run("study/drift.py", *flags))
    assert os.stat(tmp_path / "drift" / "0.001-8" / "math" / "model.safetensors").st_mtime_ns == before
    must(run("study/drift.py", f"--draw={tmp_path}/drift", f"--out_dir={tmp_path}"))
    assert read(tmp_path / "drift" / "drift.png").startswith(b"\x89PNG")


def test_folders_of_one_size_share_a_colour(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(draw, "plot_drift", lambda found, path: drawn.update(found))
    for folder, size in {"a": "1 M", "b": "2 M", "c": "1 M"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "drift.json").write_text(json.dumps({"size": size, "points": [folder]}))
    folders = ",".join(f"{tmp_path}/{folder}" for folder in "abc")
    must(run("study/drift.py", f"--draw={folders}", f"--out_dir={tmp_path}"))
    assert drawn == {"1 M": ["a", "c"], "2 M": ["b"]}


def test_what_is_lost_is_a_share_of_the_gain(monkeypatch):
    """The seed at 1.5, a branch at 1.1, with averages at 1.2: a quarter of its gain is lost."""
    groups = {
        SOUP: {"averaged": {"avg": 1.4}, "seed": {"avg": 1.5}, "drift": 0.3},
        "nothing": {"averaged": {"avg": 1.1}, "seed": {"avg": 1.1}, "drift": 0.0},
        MIXING: {"averaged": {"avg": 1.2}, "seed": {"avg": 1.3}, "drift": 0.05},
    }
    monkeypatch.setattr(drift, "read_json", lambda *arguments: {"groups": groups})
    point = point_of("folder", 20, 3e-4)
    assert point["lost"] == pytest.approx(0.25) and point["drift"] == 0.05
    assert drift_table([point]).splitlines()[-1] == "| 0.0003 | 20 | 5.0% | 1.500 | 1.100 | 1.200 | 25% |"


def test_a_branch_worse_than_the_seed_has_no_gain_to_lose(tmp_path, monkeypatch):
    groups = {SOUP: {"seed": {"avg": 1.5}}, "nothing": {"averaged": {"avg": 1.6}}}
    groups[MIXING] = {"averaged": {"avg": 1.55}, "drift": 0.05}
    monkeypatch.setattr(drift, "read_json", lambda *arguments: {"groups": groups})
    point = point_of("folder", 20, 3e-4)
    assert point["lost"] is None and drift_table([point]).endswith("| no gain |")
    draw.plot_drift({"1 M": [point, {**point, "rate": 1e-3, "lost": 0.1}]}, str(tmp_path / "drift.png"))
    assert read(tmp_path / "drift.png").startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [{"steps": "0"}, {"steps": "1.5"}, {"rates": "-1"}, {"rates": ""}])
def test_points_that_make_no_sense(flags):
    with pytest.raises(UserError, match="--steps must be whole numbers"):
        read_points(DriftConfig(**flags))
