"""Measure what routing costs: the step time of a mixture against a dense model, and mix.py's memory.

    python -m study.bench --threads=2

The dense model is as wide in its feed-forward sublayers as the experts that a token visits together, so both
do the same matmul FLOPs. Both take turns in one process, and the median of their ratios counts.
"""

import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from common.config import key, parse
from common.device import device_key, dtype_key, pick_device, place, threads_key
from common.errors import UserError, command
from common.weights import WEIGHTS
from model import ModelConfig, Transformer


@dataclasses.dataclass
class BenchConfig:
    """Time training steps of a mixture and of its dense equal, and weigh mix.py. Defaults: the shape of config/cpu."""

    vocab_size: int = key(1024, "vocabulary", within="[1, inf)")
    hidden_size: int = key(64, "width of the residual stream", within="[8, inf)")
    intermediate_size: int = key(176, "width of one expert", within="[8, inf)")
    num_hidden_layers: int = key(4, "layers", within="[1, inf)")
    num_attention_heads: int = key(4, "attention heads", within="[1, inf)")
    num_local_experts: int = key(4, "experts of the mixture", within="[1, inf)")
    num_experts_per_tok: int = key(2, "experts a token visits", within="[1, inf)")
    sequence_length: int = key(256, "tokens per sequence", within="[1, inf)")
    batch_size: int = key(8, "sequences per step", within="[1, inf)")
    steps: int = key(20, "timed steps of each model", within="[1, inf)")
    mix_hidden_size: int = key(2048, "width of the models to weigh mix.py on; 0 leaves that out", within="[0, inf)")
    compile: bool = key(True, "torch.compile on CUDA")
    device: str = device_key()
    dtype: str = dtype_key()
    threads: int = threads_key()


def build(config, hidden_size, intermediate_size, experts=0, layers=None):
    shape = dict(
        vocab_size=config.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers or config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=config.sequence_length,
        tie_word_embeddings=True,
        num_local_experts=experts,
        num_experts_per_tok=config.num_experts_per_tok,
    )
    try:
        return Transformer(ModelConfig(**shape))
    except ValueError as error:
        raise UserError(f"the model's shape does not fit: {error}") from None


def step_times(config, device):
    """Seconds of forward, backward and AdamW, a list for each model, measured in turn."""
    width, k = config.intermediate_size, config.num_experts_per_tok
    models = {
        "dense": build(config, config.hidden_size, width),
        f"dense, {k}x wide": build(config, config.hidden_size, k * width),
        "mixture": build(config, config.hidden_size, width, experts=config.num_local_experts),
    }
    steps, times = {}, {name: [] for name in models}
    for name, model in models.items():
        place(model, device, config.dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        compiled = torch.compile(model) if config.compile and device.type == "cuda" else model
        steps[name] = (compiled, optimizer)
    size = (config.batch_size, config.sequence_length)
    for i in range(config.steps + 5):  # the first five warm up
        ids = torch.randint(config.vocab_size, size, device=device)  # new tokens, new loads of the experts
        for name, (compiled, optimizer) in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            output = compiled(ids, ids)
            (output.loss + output.aux_loss).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 5:
                times[name].append(time.perf_counter() - start)
    return times


def peak_memory(arguments):
    """Peak bytes of `python mix.py` with these arguments, as Linux counts them for the process itself."""
    code = """if True:
        import atexit, runpy, sys
        sys.argv[0] = "mix.py"
        atexit.register(lambda: print(open("/proc/self/status").read()))
        runpy.run_path("mix.py", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout).group(1)) * 1024


def mix_memory(config):
    """Bytes of (the mixed checkpoint of four experts, mix.py's peak memory, the same when it only prints its help)."""
    with tempfile.TemporaryDirectory() as folder:
        experts = [os.path.join(folder, f"expert-{e}") for e in range(4)]
        for expert in experts:
            model = build(config, config.mix_hidden_size, 3 * config.mix_hidden_size, layers=4)
            model.save_pretrained(expert)
        mixed = os.path.join(folder, "mixed")
        peaks = [
            peak_memory(arguments)
            for arguments in (["--help"], [f"--experts={','.join(experts)}", f"--out_dir={mixed}"])
        ]
        return os.path.getsize(os.path.join(mixed, WEIGHTS)), peaks[1], peaks[0]


def main():
    config = parse(BenchConfig)
    device = pick_device(config.device, config.threads)
    times = step_times(config, device)
    tokens = config.batch_size * config.sequence_length
    dense = times[f"dense, {config.num_experts_per_tok}x wide"]
    print("| model | tokens/s | time of a step, over the dense model of equal active FLOPs |\n| --- | --- | --- |")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, dense, strict=True))
        print(f"| {name} | {tokens / statistics.median(seconds):,.0f} | {ratio:.2f} |")
    if config.mix_hidden_size:
        size, peak, idle = (number / 2**20 for number in mix_memory(config))
        print(
            f"\nmix.py: {size:.0f} MiB written with {peak:.0f} MiB of memory, {idle:.0f} MiB of them Python and torch"
        )


if __name__ == "__main__":
    command(main)
