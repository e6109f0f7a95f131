"""study.benchmarks: a local task of lm-eval, scored into the rows that eval.py made."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import error_line, must, read_json, run

from common.tokenizer import load_tokenizer
from model import Transformer

WORDS = ["rain", "river", "sea", "never", "apples", "falls", "grey", "under"]
ROWS = [
    {"text": text, "choices": [f" {a}", f" {b}"], "label": number % 2}
    for text in ("The rain", "grey sea falls")
    for number, (a, b) in enumerate(zip(WORDS, WORDS[::-1], strict=True))
]


@pytest.fixture(scope="module")
def report(seed, data, eval_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    must(run("eval.py", eval_config, f"--model={seed}", f"--out_dir={folder}/report"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {"task": "next_word", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "target_delimiter": ""}
    task |= {"doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
    (folder / "next_word.yaml").write_text(json.dumps({**task, "metric_list": [{"metric": "acc"}]}))  # JSON is YAML
    return folder


def benchmarks(report, model, *flags):
    flags = f"--include={report}", f"--out_dir={report}/report", "--device=cpu", "--tasks=next_word", *flags
    return run("study/benchmarks.py", f"--model={model}", *flags)


def test_a_local_task_is_scored_into_the_row(report, seed, eval_config, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements-extra.txt)")
    pytest.importorskip("accelerate", reason="accelerate is not installed (requirements-extra.txt)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(report / "cache"))
    must(benchmarks(report, seed))
    (row,) = read_json(report / "report" / "results.json")["rows"]
    found = row["benchmarks"]["next_word"]

    model, encoding = Transformer.from_pretrained(seed), load_tokenizer(seed)

    @torch.no_grad()
    def log_p(text, choice):
        start, ids = len(encoding.encode_ordinary(text)), encoding.encode_ordinary(text + choice)
        logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)
        return sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids)))

    right = [np.argmax([log_p(row["text"], one) for one in row["choices"]]) == row["label"] for row in ROWS]
    assert found["acc,none"] == pytest.approx(np.mean(right)) and found["examples"] == 0 and found["limit"] == 0

    monkeypatch.setattr(lm_eval, "simple_evaluate", None)
    assert "next_word" in must(benchmarks(report, seed)).out  # what is there is not scored again
    must(run("eval.py", eval_config, f"--model={seed}", f"--out_dir={report}/report"))
    assert read_json(report / "report" / "results.json")["rows"] == [row]
    monkeypatch.undo()
    assert "has no task 'arc_easy'" in error_line(benchmarks(report, seed, "--tasks=arc_easy"))


def test_a_row_has_to_be_there(report, experts):
    assert f"has no row of {experts[0]}; make it first" in error_line(benchmarks(report, experts[0]))
    assert "nothing to score" in error_line(benchmarks(report, ""))


def test_without_the_package(report, seed, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install -r requirements-extra.txt" in error_line(benchmarks(report, seed))
