"""The benchmark at toy size: every subject runs, and the report holds what it promises."""

import pytest
import torch
from helpers import must, read_json, run

from study import bench

TINY = "--widths=32", "--layers=1", "--vocab_size=64", "--batch_size=2", "--sequence_length=16", "--turns=1"
PEER = """
import dataclasses, torch
@dataclasses.dataclass
class GPTConfig:
    block_size: int = 0
    vocab_size: int = 0
    n_layer: int = 0
    n_head: int = 0
    n_embd: int = 0
    dropout: float = 0.0
    bias: bool = True
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, ids, targets):
        logits = self.table(ids)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.mark.parametrize(("dtype", "compile"), [("float32", "on"), ("bfloat16", "off")])
def test_bench_measures_everyone(dtype, compile, tmp_path, monkeypatch):
    """Compiled models at no compiler's expense: what it makes is in test_device.py and test_routing.py."""
    monkeypatch.setattr(torch, "compile", lambda part: part)
    (tmp_path / "model.py").write_text(PEER)
    flags = *TINY, f"--dtypes={dtype}", "--new_tokens=2", f"--nanogpt={tmp_path}", "--clock=cpu", "--device=cpu"
    flags += (f"--compile={compile}", "--head_size=16", "--prompts=1,3")
    done = must(run("study/bench.py", *flags, f"--out_dir={tmp_path}/out"))
    row = read_json(tmp_path / "out" / "bench.json")["rows"][0]
    names = {"dense", "dense, 2x wide", "mixture", "HF Llama", "HF Mixtral, eager", "HF Mixtral, grouped_mm", "nanoGPT"}
    twins = {f"{name}, compiled" for name in ("dense", "dense, 2x wide", "mixture", "nanoGPT") if compile == "on"}
    assert row["times"]["train"].keys() == names | twins and row["times"]["evaluate"].keys() == names
    assert row["times"]["generate 3"].keys() == names - {"nanoGPT"}
    assert row["matmul_flops"] > 0 and row["flops"]["mixture"] > row["flops"]["dense"]
    assert row["first_step"].keys() == names | twins and row["cuda"] == {}  # memory is a GPU's
    text = (tmp_path / "out" / "bench.md").read_text()
    assert done.out.strip() in text and all(f"| {name} |" in text for name in names | twins)
    assert text.count("for its first step") == len(twins) and "| generate 1 | generate 3 |" in text


@pytest.mark.parametrize("flag", ["--widths=64,x", "--widths=", "--dtypes=float16", "--prompts=0"])
def test_lists_that_make_no_sense(flag, tmp_path):
    done = run("study/bench.py", flag, f"--out_dir={tmp_path}")
    assert done.code == 2 and done.err.count("\n") == 1 and flag.split("=")[0] in done.err


def test_memory_between_steps_is_weights_and_two_moments():
    subject = bench.ours(bench.model_config_of(bench.BenchConfig(), 32, experts=4), torch.device("cpu"), torch.float32)
    weights = sum(parameter.numel() for parameter in subject.model.parameters())
    tables = sum(buffer.nbytes for buffer in subject.model.buffers())
    assert bench.resident_bytes(subject) == 4 * weights + tables
    ids = torch.zeros(1, 8, dtype=torch.long)
    bench.one_step(subject, ids, ids)
    steps = 4 * sum(1 for _ in subject.model.parameters())  # AdamW counts them for each tensor
    assert bench.resident_bytes(subject) == 12 * weights + tables + steps
