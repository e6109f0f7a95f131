"""Measure speed beside the code that others would use: training, evaluation and generation, in one process, in turns.

    python -m study.bench --threads=2
    python -m study.bench --threads=2 --nanogpt=DIR --nanomoe=DIR     # checkouts of karpathy's and wolfecameron's
    python -m study.bench --threads=1 --clock=cpu                     # on a machine that others use, too

All models have one shape: as many layers, about as many parameters in each, one vocabulary, the head tied. A
mixture has four experts, two for each token; "dense, 2x wide" does the same FLOPs a token. transformers' models and
the checkouts run as their authors run them in bfloat16, under autocast. --compile=on adds our models and nanoGPT as
torch.compile makes them. Subjects take turns step by step, a step's time is compared with that of the others in the
same turn, and medians of these ratios count. On CUDA the table also has each model's peak memory, how often a step of
it makes the host wait for the device (a step of ours should not), and MFU against the card's datasheet; elsewhere MFU
refers to a matmul measured in the same process.
"""

import dataclasses
import importlib.util
import math
import os
import statistics
import sys
import time
import warnings
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common.config import key, parse, split_list
from common.device import DEVICES, compiled, pick_device
from common.errors import UserError, command, write_atomically, write_json
from common.run import versions
from model import ModelConfig, Transformer, generate

EXPERTS, CHOSEN = 4, 2
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}  # dense bf16 FLOP/s
HEAD_SIZE = 32
COMPILED = ", compiled"  # behind a name


@dataclasses.dataclass
class BenchConfig:
    """Time our models and their peers. The defaults are the sizes of config/cpu."""

    out_dir: str = key("results/bench", "where bench.json and bench.md go")
    widths: str = key("64,128", "widths to measure, separated by commas")
    dtypes: str = key("float32,bfloat16", "precisions to measure, separated by commas")
    layers: int = key(4, "layers", within="[1, inf)")
    vocab_size: int = key(2048, "vocabulary", within="[8, inf)")
    batch_size: int = key(16, "sequences a step", within="[1, inf)")
    sequence_length: int = key(256, "tokens a sequence", within="[16, inf)")
    turns: int = key(8, "timed turns, after two that warm up", within="[1, inf)")
    new_tokens: int = key(64, "tokens to generate from a prompt of 16; 0 leaves generation out", within="[0, inf)")
    transformers: bool = key(True, "measure Hugging Face's Llama and Mixtral beside ours")
    nanogpt: str = key("", "a checkout of nanoGPT; empty leaves it out")
    nanomoe: str = key("", "a checkout of nanoMoE; empty leaves it out")
    clock: str = key("wall", "wall, or cpu: the processor's time for this process; use one thread", ("wall", "cpu"))
    compile: str = key("off", "whether to measure what torch.compile makes of the models, too", ("on", "off"))
    device: str = key("auto", "where to compute; auto is cuda where there is one", DEVICES)
    threads: int = key(0, "CPU threads; 0 leaves the choice to torch", within="[0, 1024]")


class Subject(NamedTuple):
    """Something to measure. loss: function(inputs, targets) -> a loss to differentiate. generate: function(prompts, n),
    which makes n greedy tokens for each prompt, or None."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: object
    generate: object


# ---- the subjects ----


def model_config_of(config, width, wide=1, experts=0):
    """Our shape for a width; `wide` times as wide in the feed-forward sublayers."""
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=wide * math.ceil(width / 3) * 8,  # 8/3 of the width, a multiple of 8
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, width // HEAD_SIZE),
        num_key_value_heads=max(1, width // HEAD_SIZE),
        max_position_embeddings=max(config.sequence_length, 16 + config.new_tokens),
        tie_word_embeddings=True,
        num_local_experts=experts,
        num_experts_per_tok=CHOSEN,
    )


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def ours(model_config, device, dtype, compile="off"):
    model = Transformer(model_config).to(device)
    model.compute_dtype = dtype
    run = compiled(model, compile, device)

    def loss(inputs, targets):
        output = run(inputs, targets, step=torch.zeros((), device=device) if model.training else None)
        return output.loss + output.aux_loss

    return Subject(model, optimizer_of(model), loss, lambda prompts, n: generate(model, prompts, n))


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def hugging_face(config, model_config, device, dtype, experts_implementation=None):
    """transformers' LlamaForCausalLM, or MixtralForCausalLM with one of its ways to run experts."""
    import transformers

    keys = {**dataclasses.asdict(model_config), "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": None}
    kind = "Mixtral" if experts_implementation else "Llama"
    settings = {"attn_implementation": "sdpa"}
    if experts_implementation:
        settings["experts_implementation"] = experts_implementation
    their_config = getattr(transformers, f"{kind}Config")(**keys)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(their_config, **settings).to(device)

    def loss(inputs, targets):
        with autocast(device, dtype):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def make(prompts, n):
        ids, precision = torch.tensor(prompts, device=device), autocast(device, dtype)
        with torch.no_grad(), precision:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )

    return Subject(model, optimizer_of(model), loss, make)


def checkout(folder, config, width, device, dtype, compile="off", **extra):
    """GPT of a nanoGPT-like checkout's model.py. It generates without a cache, so that is left out."""
    path = os.path.join(folder, "model.py")
    if not os.path.exists(path):
        raise UserError(f"{path} is missing; name a checkout of the repository")
    spec = importlib.util.spec_from_file_location(f"peer_{len(sys.modules)}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    sizes = {"block_size": config.sequence_length, "vocab_size": config.vocab_size, "n_layer": config.layers}
    sizes |= {"n_head": max(1, width // HEAD_SIZE), "n_embd": width, "dropout": 0.0, "bias": False}
    model = module.GPT(module.GPTConfig(**sizes, **extra)).to(device)
    run = torch.compile(model) if compile == "on" else model

    def loss(inputs, targets):
        with autocast(device, dtype):
            return run(inputs, targets)[1]

    return Subject(model, optimizer_of(model), loss, None)


def subjects(config, width, device, dtype):
    """{name: Subject} of everything that can be measured here."""
    dense, wide = model_config_of(config, width), model_config_of(config, width, wide=CHOSEN)
    mixture = model_config_of(config, width, experts=EXPERTS)
    found = {"dense": ours(dense, device, dtype)}
    found[f"dense, {CHOSEN}x wide"] = ours(wide, device, dtype)
    found["mixture"] = ours(mixture, device, dtype)
    if config.transformers:
        found["HF Llama"] = hugging_face(config, dense, device, dtype)
        for way in ("eager", "grouped_mm"):
            found[f"HF Mixtral, {way}"] = hugging_face(config, mixture, device, dtype, way)
    if config.nanogpt:
        found["nanoGPT"] = checkout(config.nanogpt, config, width, device, dtype)
    if config.nanomoe:
        extra = {"n_exp": EXPERTS, "top_k": CHOSEN, "stride": 1, "use_aux_loss": True}
        found["nanoMoE"] = checkout(config.nanomoe, config, width, device, dtype, **extra)
    if config.compile == "on":
        for name, one in {"dense": dense, f"dense, {CHOSEN}x wide": wide, "mixture": mixture}.items():
            found[name + COMPILED] = ours(one, device, dtype, "on")
        if config.nanogpt:
            found["nanoGPT" + COMPILED] = checkout(config.nanogpt, config, width, device, dtype, "on")
    return found


# ---- the clock ----


def timed(config, device, function):
    """Seconds that a function takes, the device's work included."""
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def in_turns(config, device, functions, warm=2):
    """{name: [seconds]} of functions that take turns; the first turns do not count."""
    times = {name: [] for name in functions}
    for turn in range(warm + config.turns):
        for name, function in functions.items():
            seconds = timed(config, device, function)
            if turn >= warm:
                times[name].append(seconds)
    return times


# ---- the tasks ----


def one_step(subject, inputs, targets):
    """Forward, backward and optimizer."""
    subject.model.train()
    subject.loss(inputs, targets).backward()
    subject.optimizer.step()
    subject.optimizer.zero_grad(set_to_none=True)


def time_tasks(config, found, device):
    """{task: {name: [seconds]}} for the tasks: train, evaluate, generate 1 and generate 32."""
    ids = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def train(subject):
        one_step(subject, inputs, targets)

    @torch.no_grad()
    def only_forward(subject):
        subject.model.eval()
        subject.loss(inputs, targets)

    def tasks(function, names):
        return {name: lambda name=name: function(found[name]) for name in names}

    result = {"train": in_turns(config, device, tasks(train, found))}
    plain = [name for name in found if not name.endswith(COMPILED)]  # in training alone does it pay
    result["evaluate"] = in_turns(config, device, tasks(only_forward, plain))
    speakers = [name for name in plain if found[name].generate and config.new_tokens]
    for count in (1, 32) if speakers else ():
        prompts = torch.randint(config.vocab_size, (count, 16)).tolist()
        result[f"generate {count}"] = in_turns(
            config, device, tasks(lambda subject, p=prompts: subject.generate(p, config.new_tokens), speakers), warm=1
        )
    return result


def on_cuda(config, found, device):
    """{name: (peak bytes of a training step, how often it makes the host wait)}; empty on a CPU."""
    result = {}
    ids = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length), device=device)
    for name, subject in found.items() if device.type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                one_step(subject, ids, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(one.message) for one in caught)
        result[name] = torch.cuda.max_memory_allocated(), waits
    return result


def peak_rate(config, device, dtype):
    """The FLOP/s that MFU refers to: the datasheet's for a card in bf16 that is known, else a measured matmul's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == torch.bfloat16 else ""
    return next((rate for card, rate in DATASHEET.items() if card in name), None) or matmul_rate(config, device, dtype)


def matmul_rate(config, device, dtype, size=1024):
    """Measured FLOP/s of a square matmul."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / statistics.median(in_turns(config, device, {"": lambda: a @ a})[""])


# ---- the report ----


def ratio(times, name, other):
    """How many times as fast `name` is as `other`: the median over turns."""
    return statistics.median(b / a for a, b in zip(times[name], times[other], strict=True))


def table(config, row):
    """One width and dtype as Markdown: speeds, and what they are of the peers'."""
    tokens = config.batch_size * config.sequence_length
    lines = [f"\n## Width {row['width']}, {row['dtype']}\n"]
    lines += ["| | train, tokens/s | over dense | MFU | evaluate | generate 1 | generate 32 |", "|---|" + "---|" * 6]
    for name, times in row["times"]["train"].items():
        speed = tokens / statistics.median(times)
        mfu = f"{speed * row['flops'][name] / row['matmul_flops']:.0%}" if name in row["flops"] else ""
        cells = [f"{speed:,.0f}", f"{ratio(row['times']['train'], name, 'dense'):.2f}", mfu]
        sizes = {"evaluate": tokens, "generate 1": config.new_tokens, "generate 32": 32 * config.new_tokens}
        for task, size in sizes.items():
            taken = row["times"].get(task, {}).get(name)
            cells.append(f"{size / statistics.median(taken):,.0f}" if taken else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    train = row["times"]["train"]
    lines.append("")
    for way in ("", COMPILED) if "mixture" + COMPILED in train else ("",):
        speed = ratio(train, "mixture" + way, f"dense, {CHOSEN}x wide{way}")
        lines.append(f"Mixture over dense of equal active FLOPs{way}: {speed:.2f}.")
    for name, (peak, waits) in row["cuda"].items():
        lines.append(f"{name}: {peak / 2**30:.2f} GiB at most, {waits} wait(s) in a step.")
    return "\n".join(lines)


def main():
    config = parse(BenchConfig)
    device, rows = pick_device(config.device, config.threads), []
    setting = {"torch_threads": torch.get_num_threads(), "device": str(device), "versions": versions()}
    text = (
        f"# Speed\n\n`python -m study.bench {' '.join(sys.argv[1:])}`: {setting['torch_threads']} thread(s), {device}, "
    )
    text += f"torch {setting['versions']['torch']}, {config.clock} clock, medians of {config.turns} turns."
    for width in map(int, split_list(config.widths)):
        for dtype in (getattr(torch, name) for name in split_list(config.dtypes)):
            torch.manual_seed(1)
            torch.compiler.reset()  # it keeps eight shapes of a function, and runs any more without compiling
            found = subjects(config, width, device, dtype)
            mine = {name: one for name, one in found.items() if isinstance(one.model, Transformer)}
            row = {"width": width, "dtype": str(dtype).removeprefix("torch.")}
            row["times"] = time_tasks(config, found, device)
            row["cuda"] = on_cuda(config, found, device)
            row["flops"] = {name: one.model.flops_per_token(config.sequence_length) for name, one in mine.items()}
            row["matmul_flops"] = peak_rate(config, device, dtype)
            rows.append(row)
            print(table(config, row), flush=True)
            text += "\n" + table(config, row)
            result = {"config": dataclasses.asdict(config), **setting, "rows": rows}
            os.makedirs(config.out_dir, exist_ok=True)
            write_json(os.path.join(config.out_dir, "bench.json"), result)
            write_atomically(os.path.join(config.out_dir, "bench.md"), text + "\n")


if __name__ == "__main__":
    command(main)
