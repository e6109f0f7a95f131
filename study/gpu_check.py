"""Everything that only a GPU can tell, in three parts of at most ten minutes, each useful alone:

    python -m study.gpu_check --part=correct    ceilings, the tests on CUDA, compiled = plain for every router
    python -m study.gpu_check --part=fast       speed, memory, waits and heaviest kernels of dense models and mixtures
    python -m study.gpu_check --part=whole      config/gpu at a tenth of its steps, stopped and resumed; generation

`bash run.sh gpu check` runs all three. Each adds its findings to results/gpu/check.json and draws check.md anew. Goals:
a dense model at 48 % of an H100's bf16 peak, a mixture at most 1.15 times as slow as a dense model of its active FLOPs.
"""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings

import torch
from common.fit import count_memory

from common.config import key, parse, split_list
from common.device import device_key, pick_device
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.run import versions
from model import ROUTERS, ModelConfig, Transformer, generate
from study.bench import CHOSEN, EXPERTS, optimizer_of

PARTS = ("correct", "fast", "whole")
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}  # dense bf16 FLOP/s


@dataclasses.dataclass
class CheckConfig:
    """One part of what is to be measured on a GPU."""

    part: str = key("correct", "what to do", PARTS)
    out_dir: str = key("results/gpu", "where check.json and check.md go")
    widths: str = key("384,768", "widths of the models whose speed is measured")
    layers: int = key(6, "their layers", within="[1, inf)")
    vocab_size: int = key(4096, "their vocabulary", within="[8, inf)")
    sequence_length: int = key(1024, "tokens a sequence", within="[8, inf)")
    micro_batches: str = key("16,64", "sequences in a forward pass, each measured")
    turns: int = key(10, "steps measured of each model", within="[1, inf)")
    square: int = key(8192, "side of the matmul that measures the ceiling", within="[8, inf)")
    tests: bool = key(True, "run tests/test_cuda.py in the part `correct`")
    config: str = key("config/gpu", "the pipeline that the part `whole` runs")
    run_dir: str = key("out/gpu/check", "where it leaves its runs")
    data_dir: str = key("out/gpu/data", "the prepared data")
    domain: str = key("code", "the domain of the branch in the part `whole`")
    tenth: float = key(0.1, "the share of its steps to run", within="(0, 1]")
    batches: str = key("1,32,100,500", "how many texts to generate at once, each measured")
    device: str = device_key()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device, turns, warm=2):
    """Median seconds of a function, the device's work included; the slowest over the median, too."""
    times = []
    for turn in range(warm + turns):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times += [time.perf_counter() - start] if turn >= warm else []
    return statistics.median(times), max(times) / statistics.median(times)


def shape(config, width, wide=1, experts=0, router="topk"):
    """A model's shape: heads of 64, feed-forward sublayers 8/3 as wide."""
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=wide * (width * 8 // 3 // 64 * 64 or 64),
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=config.sequence_length,
        num_local_experts=experts,
        num_experts_per_tok=ROUTERS[router].experts_per_token(CHOSEN, EXPERTS),
        router=router,
    )


def build(model_config, device):
    torch.manual_seed(1)
    model = Transformer(model_config).to(device)
    model.compute_dtype = torch.bfloat16
    return model


def tokens_for(config, rows, device):
    return torch.randint(config.vocab_size, (rows, config.sequence_length), device=device)


# ---- correct ----


def correct(config, device):
    """{name: value}: ceilings, whether the tests pass, and how far compiled models are from plain ones."""
    n = config.square
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    found = {"copy, GB/s": 4 * n * n / seconds_of(a.clone, device, config.turns)[0] / 1e9}
    found["matmul, TFLOP/s"] = 2 * n**3 / seconds_of(lambda: a @ a, device, config.turns)[0] / 1e12
    if config.tests:
        done = subprocess.run([sys.executable, "-m", "pytest", "tests/test_cuda.py"], capture_output=True, text=True)
        found["tests"] = done.stdout.strip().splitlines()[-1]
    width = int(split_list(config.widths)[0])
    for router in ROUTERS:
        model = build(shape(config, width, experts=EXPERTS, router=router), device)
        ids, losses = tokens_for(config, 2, device), []
        for run in (model, torch.compile(model)):
            torch.manual_seed(1)
            output = run(ids, ids, step=torch.zeros((), device=device))
            (output.loss + output.aux_loss).backward()
            losses.append(output.loss.item())
        gradients = all(parameter.grad.isfinite().all().item() for parameter in model.parameters())
        found[f"{router}: compiled over plain loss, minus 1"] = losses[1] / losses[0] - 1
        found[f"{router}: gradients are finite"] = gradients
    return found


# ---- fast ----


def count_waits(step, device):
    """How often the host waits for the device in a step that should not wait at all."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def heaviest(step, device, count=25):
    """[(kernel, microseconds)] of one step."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        synchronize(device)
    cost = {
        one.key: one.self_device_time_total if on_gpu else one.self_cpu_time_total for one in profile.key_averages()
    }
    return sorted(cost.items(), key=lambda pair: -pair[1])[:count]


def speed(config, device, model_config, rows, compile):
    """One row of the table: tokens/s, FLOP/s, memory counted and used, compile seconds, waits, kernels."""
    model = build(model_config, device)
    run, optimizer, ids = (
        torch.compile(model) if compile else model,
        optimizer_of(model),
        tokens_for(config, rows, device),
    )

    def step():
        output = run(ids, ids, step=number)
        (output.loss + output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    number, start = torch.zeros((), device=device), time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, slowest = seconds_of(step, device, config.turns)
    rate = ids.numel() / seconds
    return {
        "tokens/s": rate,
        "FLOP/s": rate * model.flops_per_token(config.sequence_length),
        "memory counted": sum(count_memory(model, rows, config.sequence_length).values()),
        "memory used": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "first step, s": first,
        "slowest over median": slowest,
        "waits": count_waits(step, device),
        "kernels": heaviest(step, device),
    }


def fast(config, device):
    """{width, model, compiled or plain, rows: what `speed` says, or the error}; out of memory ends only its own row."""
    found = {}
    for width in map(int, split_list(config.widths)):
        models = {"dense": shape(config, width), f"dense, {CHOSEN}x wide": shape(config, width, wide=CHOSEN)}
        models["mixture"] = shape(config, width, experts=EXPERTS)
        for rows in map(int, split_list(config.micro_batches)):
            for name, model_config in models.items():
                for way in ("plain", "compiled"):
                    try:
                        row = speed(config, device, model_config, rows, way == "compiled")
                    except torch.OutOfMemoryError:
                        row = {"error": "out of memory"}
                    found[f"{name} | {width} | {rows} | {way}"] = row
                    print(
                        f"{name}, width {width}, {rows} rows, {way}: {row.get('tokens/s', 0):,.0f} tokens/s", flush=True
                    )
    return found


# ---- whole ----


def lines_in(path):
    """How many lines a file has; none if it is not there."""
    if not os.path.exists(path):
        return 0
    with open(path, encoding="utf-8") as file:
        return len(file.readlines())


def script(*arguments, stop_at=None):
    """Run a script of ours and return its seconds. stop_at: a log.jsonl; SIGTERM comes soon after its second line, the
    first evaluation in training."""
    if stop_at and os.path.exists(stop_at):
        os.remove(stop_at)  # of an earlier check
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments])
    while stop_at and process.poll() is None:
        if lines_in(stop_at) > 1:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    process.wait()
    if process.returncode not in (0, 128 + signal.SIGTERM if stop_at else 0):
        raise UserError(f"{' '.join(arguments)} failed; its message stands above")
    return time.monotonic() - start


def tenth(config, stage):
    """The steps that a stage runs here."""
    with open(f"{config.config}/{stage}.py", encoding="utf-8") as file:
        steps = next(int(line.split("=")[1].split("#")[0]) for line in file if line.startswith("max_steps"))
    return max(2, round(steps * config.tenth))


def whole(config, device):
    """{stage: seconds} of the pipeline at a tenth, finetuning stopped by SIGTERM and resumed, then generation."""
    folder, found = config.run_dir, {}
    common = [f"--data_dir={config.data_dir}", f"--device={device.type}", "--domain=all"]
    train = {
        stage: [f"{config.config}/{stage}.py", *common, f"--max_steps={tenth(config, stage)}", "--overwrite=True"]
        for stage in ("seed", "expert", "finetune")
    }
    found["seed"] = script("train.py", *train["seed"], f"--out_dir={folder}/seed")
    branch = [f"--init_from={folder}/seed", f"--domain={config.domain}", f"--out_dir={folder}/expert"]
    found["expert"] = script("train.py", *train["expert"], *branch)
    experts = ",".join([f"{folder}/expert", *[f"{folder}/seed"] * (EXPERTS - 1)])
    found["mix"] = script("mix.py", f"--experts={experts}", f"--out_dir={folder}/mixed", "--overwrite=True")
    finetune = ["finetune.py", *train["finetune"], f"--init_from={folder}/mixed", f"--out_dir={folder}/btx"]
    found["finetune, until stopped"] = script(*finetune, stop_at=f"{folder}/btx/log.jsonl")
    found["it stopped at step"] = read_json(f"{folder}/btx/run.json", "run the part again")["step"]
    finetune.remove("--overwrite=True")
    found["finetune, to its end"] = script(*finetune)
    with open(f"{folder}/btx/log.jsonl", encoding="utf-8") as file:
        found["bits per byte"] = [json.loads(line)["bpb"]["avg"] for line in file]
    model = Transformer.from_pretrained(f"{folder}/btx").to(device)
    model.compute_dtype, new = torch.bfloat16, 64
    for count in map(int, split_list(config.batches)):
        prompts = torch.randint(model.config.vocab_size, (count, 16)).tolist()
        seconds, _ = seconds_of(lambda prompts=prompts: generate(model, prompts, new), device, 1, warm=1)
        found[f"generation, {count} at once, tokens/s"] = count * new / seconds
    return found


# ---- the report ----


def page(result):
    """check.json as Markdown."""
    lines = [f"# On {result['device']}\n", f"torch {result['versions']['torch']}"]
    peak = next((rate for name, rate in DATASHEET.items() if name in result["device"]), None)
    for part in ("correct", "whole"):
        if part in result:
            lines += [f"\n## {part.capitalize()}\n", "| | |", "|---|---|"]
            lines += [f"| {name} | {f'{v:,.4g}' if isinstance(v, float) else v} |" for name, v in result[part].items()]
    if "fast" in result:
        names = ("tokens/s", "FLOP/s", "memory counted", "memory used", "first step, s", "slowest over median", "waits")
        lines += ["\n## Fast\n", f"| model | width | rows | | {' | '.join(names)} | MFU |", "|---" * 12 + "|"]
        for name, row in result["fast"].items():
            cells = [f"{row[one]:,.4g}" if row.get(one) is not None else row.get("error", "") for one in names]
            cells.append(f"{row['FLOP/s'] / peak:.0%}" if peak and "FLOP/s" in row else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        kernels = next(
            (row["kernels"] for name, row in result["fast"].items() if "mixture" in name and "kernels" in row), []
        )
        lines += [
            "\nHeaviest kernels of a mixture's step, microseconds:\n",
            *(f"- {us:,.0f} {name}" for name, us in kernels),
        ]
    return "\n".join(lines) + "\n"


def main():
    config = parse(CheckConfig)
    device = pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    path = os.path.join(config.out_dir, "check.json")
    found = read_json(path, "delete it and run again") if os.path.exists(path) else {}
    if found.get("device") != name:  # findings of another card do not mix with this one's
        found = {"device": name}
    found["versions"] = versions()
    found[config.part] = {"correct": correct, "fast": fast, "whole": whole}[config.part](config, device)
    os.makedirs(config.out_dir, exist_ok=True)
    write_json(path, found)
    write_atomically(os.path.join(config.out_dir, "check.md"), page(found))
    print(page(found))


if __name__ == "__main__":
    command(main)
