"""The benchmark at toy size: every subject runs, and the report holds what it promises."""

import pytest
import torch
from helpers import must, read_json, run

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
    flags += (f"--compile={compile}",)
    done = must(run("study/bench.py", *flags, f"--out_dir={tmp_path}/out"))
    row = read_json(tmp_path / "out" / "bench.json")["rows"][0]
    names = {"dense", "dense, 2x wide", "mixture", "HF Llama", "HF Mixtral, eager", "HF Mixtral, grouped_mm", "nanoGPT"}
    twins = {f"{name}, compiled" for name in ("dense", "dense, 2x wide", "mixture", "nanoGPT") if compile == "on"}
    assert row["times"]["train"].keys() == names | twins and row["times"]["evaluate"].keys() == names
    assert row["times"]["generate 32"].keys() == names - {"nanoGPT"}
    assert row["matmul_flops"] > 0 and row["flops"]["mixture"] > row["flops"]["dense"]
    assert row["cuda"] == {}  # memory is a GPU's
    text = (tmp_path / "out" / "bench.md").read_text()
    assert done.out.strip() in text and all(f"| {name} |" in text for name in names | twins)
