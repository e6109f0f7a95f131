"""Compare our speed with that of alternatives, in training, evaluation and generation: one process, models in turns.

    python -m study.bench --threads=2
    python -m study.bench --threads=2 --nanogpt=DIR --nanomoe=DIR     # checkouts of karpathy's and wolfecameron's
    python -m study.bench --threads=1 --clock=cpu                     # on a machine that others use too

All models have the same shape: the same number of layers, about as many parameters in each, the same vocabulary, a tied
head. A mixture has four experts, two per token; "dense, 2x wide" does the same FLOPs per token. In bfloat16,
transformers' models and the checkouts run under autocast, as their authors run them. --compile=on adds compiled
versions of our models and nanoGPT. Models take turns step by step; each step is compared with the others' steps in the
same turn, and the table shows medians of these ratios. MFU, how well a model uses the device, is relative to a large
matmul in the same process. Also measured: the time of a compiled model's first step and, on CUDA, each model's peak
memory. All models of a width are in memory at the same time.
"""

import dataclasses
import math
import operator
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common.config import key, parse, split_list
from common.device import DEVICES, DTYPES, compiled, pick_device
from common.errors import UserError, command, write_atomically, write_json
from common.run import versions
from model import ModelConfig, Transformer, generate
from study.tables import markdown_table

EXPERTS, CHOSEN = 4, 2
COMPILED = ", compiled"  # at the end of a name


@dataclasses.dataclass
class BenchConfig:
    """Time our models beside their peers. The default sizes are about config/cpu's."""

    out_dir: str = key("results/bench", "where bench.json and bench.md go")
    widths: str = key("64,128", "widths to measure, separated by commas")
    dtypes: str = key("float32,bfloat16", "precisions to measure, separated by commas")
    layers: int = key(4, "layers", within="[1, inf)")
    head_size: int = key(32, "width of an attention head", within="[1, inf)")
    vocab_size: int = key(2048, "vocabulary", within="[8, inf)")
    batch_size: int = key(16, "sequences per step", within="[1, inf)")
    sequence_length: int = key(256, "tokens per sequence", within="[16, inf)")
    turns: int = key(8, "timed turns, after two for warm-up", within="[1, inf)")
    new_tokens: int = key(64, "tokens to generate from a prompt of 16; 0 skips generation", within="[0, inf)")
    prompts: str = key("1,32", "numbers of prompts to continue at the same time, separated by commas")
    transformers: bool = key(True, "also measure Hugging Face's Llama and Mixtral")
    nanogpt: str = key("", "a checkout of nanoGPT; empty leaves it out")
    nanomoe: str = key("", "a checkout of nanoMoE; empty leaves it out")
    clock: str = key("wall", "cpu counts only this process's processor time; use it with one thread", ("wall", "cpu"))
    compile: str = key("off", "also measure the models compiled by torch.compile", ("on", "off"))
    device: str = key("auto", "where to compute; auto picks cuda or mps if available", DEVICES)
    threads: int = key(0, "CPU threads; 0 lets torch choose", within="[0, 1024]")

    def __post_init__(self):
        self.width_list, self.prompt_list = whole_numbers(self, "widths"), whole_numbers(self, "prompts")
        self.dtype_list = split_list(self.dtypes)
        known = DTYPES[1:]  # without auto
        if not self.dtype_list or {*self.dtype_list} - {*known}:
            raise UserError(f"--dtypes={self.dtypes}: choose from {', '.join(known)}, separated by commas")


def whole_numbers(config, name):
    """A key's list of whole numbers above 0."""
    found = split_list(getattr(config, name))
    if not found or not all(word.isdecimal() and int(word) for word in found):
        raise UserError(f"--{name}={getattr(config, name)} must be whole numbers above 0, separated by commas")
    return [int(word) for word in found]


class Subject(NamedTuple):
    """A model to measure. loss: function(inputs, targets) -> a loss to differentiate. generate: function(prompts, n)
    that makes n greedy tokens for each prompt, or None."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable
    generate: Callable | None = None


# ---- the subjects ----


def model_config_of(config, width, wide=1, experts=0):
    """Our shape at a width, with feed-forward sublayers `wide` times as wide."""
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=wide * math.ceil(width / 3) * 8,  # 8/3 of the width, a multiple of 8
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, width // config.head_size),
        num_key_value_heads=max(1, width // config.head_size),
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
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def hugging_face(model_config, device, dtype, **settings):
    """transformers' Llama or Mixtral. settings: for from_config, such as experts_implementation."""
    import transformers

    keys = {**dataclasses.asdict(model_config), "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": None}
    their_config = transformers.AutoConfig.for_model("mixtral" if model_config.num_local_experts else "llama", **keys)
    model = transformers.AutoModelForCausalLM.from_config(their_config, attn_implementation="sdpa", **settings)
    model.to(device)

    def loss(inputs, targets):
        with autocast(device, dtype):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def make(prompts, n):
        ids = torch.tensor(prompts, device=device)
        length = {"max_new_tokens": n, "min_new_tokens": n}
        with autocast(device, dtype):
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)

    return Subject(model, optimizer_of(model), loss, make)


def checkout(folder, config, width, device, dtype, compile="off", **extra):
    """The GPT of a nanoGPT-like checkout's model.py. It generates without a cache, so generation is not measured."""
    path = os.path.join(folder, "model.py")
    if not os.path.exists(path):
        raise UserError(f"{path} is missing; name a checkout of the repository")
    sys.path.insert(0, folder)  # for what it imports
    try:
        found = runpy.run_path(path)
    finally:
        sys.path.remove(folder)
    sizes = {"block_size": config.sequence_length, "vocab_size": config.vocab_size, "n_layer": config.layers}
    sizes |= {"n_head": max(1, width // config.head_size), "n_embd": width, "dropout": 0.0, "bias": False}
    model = found["GPT"](found["GPTConfig"](**sizes, **extra)).to(device)
    run = torch.compile(model) if compile == "on" else model

    def loss(inputs, targets):
        with autocast(device, dtype):
            return run(inputs, targets)[1]

    return Subject(model, optimizer_of(model), loss)


def subjects(config, width, device, dtype):
    """{name: Subject} of everything that can be measured here."""
    shapes = {
        "dense": model_config_of(config, width),
        f"dense, {CHOSEN}x wide": model_config_of(config, width, wide=CHOSEN),
        "mixture": model_config_of(config, width, experts=EXPERTS),
    }
    found = {name: ours(shape, device, dtype) for name, shape in shapes.items()}
    if config.transformers:
        found["HF Llama"] = hugging_face(shapes["dense"], device, dtype)
        for way in ("eager", "grouped_mm"):
            found[f"HF Mixtral, {way}"] = hugging_face(shapes["mixture"], device, dtype, experts_implementation=way)
    if config.nanogpt:
        found["nanoGPT"] = checkout(config.nanogpt, config, width, device, dtype)
    if config.nanomoe:
        extra = {"n_exp": EXPERTS, "top_k": CHOSEN, "stride": 1, "use_aux_loss": True}
        found["nanoMoE"] = checkout(config.nanomoe, config, width, device, dtype, **extra)
    if config.compile == "on":
        found |= {name + COMPILED: ours(shape, device, dtype, "on") for name, shape in shapes.items()}
        if config.nanogpt:
            found["nanoGPT" + COMPILED] = checkout(config.nanogpt, config, width, device, dtype, "on")
    return found


# ---- the tasks ----


def in_turns(config, device, found, function, *arguments):
    """{name: [seconds]} of function(subject, *arguments) for each of {name: subject}, in turns, the first two being
    warm-up. Waits until a GPU has finished."""
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    finish = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    times = {name: [] for name in found}
    for _ in range(2 + config.turns):
        for name, subject in found.items():
            finish()
            start = clock()
            function(subject, *arguments)
            finish()
            times[name].append(clock() - start)
    return times


def warm(times):
    """{name: [seconds]} without the warm-up turns."""
    return {name: seconds[2:] for name, seconds in times.items()}


def one_step(subject, inputs, targets):
    """Forward, backward and optimizer."""
    subject.model.train()
    subject.loss(inputs, targets).backward()
    subject.optimizer.step()
    subject.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def only_forward(subject, inputs, targets):
    subject.model.eval()
    subject.loss(inputs, targets)


def time_tasks(config, found, device):
    """{task: {name: [seconds]}} for the tasks train, evaluate and, for each number N of prompts, generate N; and
    {name: seconds} of the first training step, in which a compiled model is compiled."""
    ids = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    steps = in_turns(config, device, found, one_step, inputs, targets)
    result = {"train": warm(steps)}
    plain = {name: one for name, one in found.items() if not name.endswith(COMPILED)}  # compiling pays only in training
    result["evaluate"] = warm(in_turns(config, device, plain, only_forward, inputs, targets))
    speakers = {name: one for name, one in plain.items() if one.generate}
    for count in config.prompt_list if config.new_tokens else ():
        prompts = torch.randint(config.vocab_size, (count, 16)).tolist()
        answer = operator.methodcaller("generate", prompts, config.new_tokens)
        result[f"generate {count}"] = warm(in_turns(config, device, speakers, answer))
    return result, {name: seconds[0] for name, seconds in steps.items()}


def resident_bytes(subject):
    """The bytes of a subject's weights and optimizer state, which stay in memory between steps."""
    states = (value for state in subject.optimizer.state.values() for value in state.values())
    tensors = [*subject.model.parameters(), *subject.model.buffers(), *filter(torch.is_tensor, states)]
    return sum(tensor.nbytes for tensor in tensors)


def peak_memory(config, found, device):
    """{name: peak bytes of a training step, as if the model were alone in memory}; empty on a CPU."""
    result = {}
    ids = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length), device=device)
    for name, subject in found.items() if device.type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - resident_bytes(subject)
        one_step(subject, ids, ids)
        result[name] = torch.cuda.max_memory_allocated() - others
    return result


def matmul_rate(config, device, dtype):
    """The FLOP/s of a large matmul, to which MFU is relative."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = warm(in_turns(config, device, {"matmul": a}, torch.matmul, a))
    return 2 * size**3 / statistics.median(times["matmul"])


def measure(config, width, dtype, device):
    """Everything at one width and dtype: a row of bench.json."""
    torch.manual_seed(1)
    torch.compiler.reset()  # it keeps eight shapes of a function, and does not compile any more than that
    found = subjects(config, width, device, dtype)
    mine = {name: one.model for name, one in found.items() if isinstance(one.model, Transformer)}
    times, first = time_tasks(config, found, device)
    return {
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "times": times,
        "first_step": first,
        "cuda": peak_memory(config, found, device),
        "flops": {name: model.flops_per_token(config.sequence_length) for name, model in mine.items()},
        "matmul_flops": matmul_rate(config, device, dtype),
    }


# ---- the report ----


def ratio(times, name, other):
    """How many times faster `name` is than `other`: the median over turns."""
    return statistics.median(b / a for a, b in zip(times[name], times[other], strict=True))


def table(config, row):
    """One width and dtype as Markdown: speeds, and their ratios to dense."""
    batch = config.batch_size * config.sequence_length
    counts = {task: int(task.split()[1]) for task in row["times"] if task.startswith("generate")}
    tokens = {"train": batch, "evaluate": batch, **{task: n * config.new_tokens for task, n in counts.items()}}
    train = row["times"]["train"]
    header = ["", "train, tokens/s", "over dense", "MFU", "evaluate", *counts]
    body = []
    for name in train:
        taken = {task: times[name] for task, times in row["times"].items() if name in times}
        speeds = {task: tokens[task] / statistics.median(times) for task, times in taken.items()}
        train_speed, *others = (f"{speeds[task]:,.0f}" if task in speeds else "" for task in tokens)
        mfu = f"{speeds['train'] * row['flops'][name] / row['matmul_flops']:.0%}" if name in row["flops"] else ""
        body.append([name, train_speed, f"{ratio(train, name, 'dense'):.2f}", mfu, *others])
    lines = [f"\n## Width {row['width']}, {row['dtype']}\n", markdown_table(header, body), ""]
    for way in ("", COMPILED) if "mixture" + COMPILED in train else ("",):
        speed = ratio(train, "mixture" + way, f"dense, {CHOSEN}x wide{way}")
        lines.append(f"Mixture over dense of equal active FLOPs{way}: {speed:.2f}.")
    lines.append(f"A large matmul: {row['matmul_flops'] / 1e12:.2f} TFLOP/s.")
    for name, seconds in row["first_step"].items():
        if name.endswith(COMPILED):
            lines.append(f"{name}: {seconds:.1f} s for its first step.")
    lines += [f"{name}: {peak / 2**30:.2f} GiB at most in a step." for name, peak in row["cuda"].items()]
    return "\n".join(lines)


def main():
    config = parse(BenchConfig)
    device = pick_device(config.device, config.threads)
    setting = {"torch_threads": torch.get_num_threads(), "device": str(device), "versions": versions()}
    command_line = " ".join(["python -m study.bench", *sys.argv[1:]])
    text = f"# Speed\n\n`{command_line}`: {setting['torch_threads']} thread(s), {device}, "
    text += f"torch {setting['versions']['torch']}, {config.clock} clock, medians of {config.turns} turns."
    rows = []
    os.makedirs(config.out_dir, exist_ok=True)
    for width in config.width_list:
        for dtype in config.dtype_list:
            rows.append(measure(config, width, getattr(torch, dtype), device))
            print(table(config, rows[-1]), flush=True)
            text += "\n" + table(config, rows[-1])
            result = {"config": dataclasses.asdict(config), **setting, "rows": rows}
            write_json(os.path.join(config.out_dir, "bench.json"), result)
            write_atomically(os.path.join(config.out_dir, "bench.md"), text + "\n")


if __name__ == "__main__":
    command(main)
