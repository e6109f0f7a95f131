"""The whole pipeline at toy size, from an empty folder to the report, in a copy of the repository."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, read, read_json

NAMES = "dense-cm upcycle-cm "
NAMES += "seed expert-code expert-wiki expert-math soup mixed btx "
NAMES += "btm-top1 btm-top2 btm-posterior btm-posterior-prefix btm-share"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files without what runs have left there."""
    leave_out = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("pipeline") / "copy", ignore=leave_out)


def pipeline(copy):
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", "run.sh", "smoke"], cwd=copy, env=environment, capture_output=True, text=True)


def test_smoke_pipeline(copy):
    """First with a branch that cannot run: the others do. Then again: what is finished is skipped, the rest is made."""
    out = copy / "out" / "smoke"
    (out / "expert-wiki").mkdir(parents=True)
    (out / "expert-wiki" / "notes.txt").write_text("not of a run")
    done = pipeline(copy)
    assert done.returncode == 2
    assert "expert-wiki failed" in done.stderr and "Traceback" not in done.stderr
    finished = [out / name / "model.safetensors" for name in ("seed", "expert-code", "expert-math")]
    before = [path.stat().st_mtime_ns for path in finished]

    shutil.rmtree(out / "expert-wiki")
    done = pipeline(copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already there, kept") == 3 and done.stdout.count("nothing to do") == 6
    assert [path.stat().st_mtime_ns for path in finished] == before

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
