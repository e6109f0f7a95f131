"""The pipeline at toy size, from an empty folder to the report, in a copy of the repository; without the rivals, whose
jobs tests/study/test_chain.py knows, and which CI trains in a comparison."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, read, read_json

NAMES = "seed expert-code expert-wiki expert-math soup mixed btx btm-top1 btm-top2 btm-posterior btm-posterior-prefix"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files without what runs have left there."""
    leave_out = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("pipeline") / "copy", ignore=leave_out)


def pipeline(copy):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", "run.sh", "smoke", "quick"]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def test_smoke_pipeline(copy):
    out = copy / "out" / "smoke"
    done = pipeline(copy)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "**Branch-Train-MiX**" in done.stdout

    results = read_json(out / "report" / "results.json")
    rows = {row["name"]: row for row in results["rows"]}
    assert sorted(rows) == sorted(NAMES.split())
    for row in rows.values():
        assert set(row["bpb"]) == {"code", "math", "wiki", "avg"} and 0.5 < row["bpb"]["avg"] < 8
    steps = {name: row["train_tokens"] / (8 * 128) for name, row in rows.items()}
    assert steps["seed"] == 40 and steps["expert-code"] == 70 and steps["mixed"] == 130 and steps["btx"] == 160
    assert rows["btx"]["bpb"]["avg"] < rows["mixed"]["bpb"]["avg"]  # finetuning does something

    report = (out / "report" / "report.md").read_text()
    assert all(name in report for name in rows)
    pictures = [name for name in os.listdir(out / "report") if name.endswith(".png")]
    assert len(pictures) >= 3
    for name in pictures:
        assert name in report and read(out / "report" / name).startswith(b"\x89PNG")
