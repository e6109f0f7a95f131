"""The three parts of the check that a GPU is waiting for, on a CPU and at toy size."""

import pytest
import torch
from helpers import must, read_json, run

from common.config import parse
from study import gpu_check

TINY = "--widths=16", "--layers=1", "--vocab_size=64", "--sequence_length=16", "--micro_batches=2", "--turns=1"
TINY += ("--square=16", "--tests=False", "--device=cpu", "--batches=1,3", "--tenth=0.05", "--config=config/smoke")


@pytest.fixture
def plain_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # a compiler takes a minute; test_routing.py has it


def test_three_parts_make_one_page(plain_compile, data, tmp_path):
    flags = *TINY, f"--out_dir={tmp_path}/out", f"--run_dir={tmp_path}/runs", f"--data_dir={data}"
    for part in ("correct", "fast"):
        must(run("study/gpu_check.py", *flags, f"--part={part}"))
    found = read_json(tmp_path / "out" / "check.json")
    assert found["correct"]["topk: compiled over plain loss, minus 1"] == 0
    assert found["correct"]["switch: gradients are finite"] is True
    assert len(found["fast"]) == 6 and all(row["tokens/s"] > 0 for row in found["fast"].values())
    assert all(len(row["kernels"]) == 25 for row in found["fast"].values())
    text = (tmp_path / "out" / "check.md").read_text()
    assert "## Correct" in text and "## Fast" in text and "| mixture | 16 | 2 | compiled |" in text


def test_the_whole_pipeline_is_stopped_and_resumed(data, tmp_path, monkeypatch):
    started = []

    def script(*arguments, stop_at=None):  # without a process of its own, and without the signal
        started.append((arguments, stop_at))
        must(run(*arguments))
        return 1.0

    monkeypatch.setattr(gpu_check, "script", script)
    flags = *TINY, f"--run_dir={tmp_path}", f"--data_dir={data}", "--domain=math"
    found = gpu_check.whole(parse(gpu_check.CheckConfig, flags), torch.device("cpu"))
    assert [arguments[0] for arguments, _ in started] == [
        "train.py",
        "train.py",
        "mix.py",
        "finetune.py",
        "finetune.py",
    ]
    assert [stop for _, stop in started] == [None] * 3 + [f"{tmp_path}/btx/log.jsonl", None]
    assert "--overwrite=True" in started[3][0] and "--overwrite=True" not in started[4][0]
    assert found["generation, 3 at once, tokens/s"] > 0 and len(found["bits per byte"]) == 2
