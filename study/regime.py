"""When does branching pay? BTX minus dense training of the same tokens, over tokens per parameter and width.

    python -m study.regime config/cpu/regime.py

For each width and each scale: a seed model, its branches, the mixture and its finetuning, all with the pipeline's
configs but their steps multiplied by the scale, and the data-matched dense model of compare.py. Writes regime.json and
regime.png. It can be stopped and continued like every other stage.
"""

import dataclasses
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.config import UserError, command, key, parse, read_json, write_atomically
from common.loader import list_domains
from eval import versions
from finetune import FinetuneConfig
from study.ablate import run
from study.compare import Chain, train_dense
from study.report import COLOURS, STYLES, markdown_table, short


@dataclasses.dataclass
class RegimeConfig:
    """Run BTX and dense training at several widths and budgets."""

    widths: str = key("32,64,96", "values of hidden_size, separated by commas; heads stay 16 wide")
    scales: str = key("0.125,0.25,0.5,1", "what all steps of the configs are multiplied by")
    largest: float = key(64.0, "leave out runs with width times scale above this: they take longest")
    out_dir: str = key("out/cpu/regime", "where the checkpoints go")
    report: str = key("out/cpu/report", "where regime.json and regime.png go")
    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    seed: str = key("config/cpu/seed.py", "the config of the seed model's training")
    expert: str = key("config/cpu/expert.py", "the config of the branches and of the dense runs")
    mix: str = key("config/cpu/mix.py", "the config of mix.py")
    finetune: str = key("config/cpu/finetune.py", "the config of the finetuning")
    eval: str = key("config/cpu/eval.py", "the config of eval.py")
    dense_learning_rate: float = key(6e-3, "peak learning rate of the dense runs")


def train_chain(config, folder, width, scale):
    """The pipeline of run.sh at one width and budget, into `folder`."""

    def steps(path):
        return f"--max_steps={max(1, round(scale * parse(FinetuneConfig, [path]).max_steps))}"

    seed, domains = f"{folder}/seed", list_domains(config.data_dir)
    shape = f"--hidden_size={width}", f"--intermediate_size={round(width * 8 / 3 / 16) * 16}"
    heads = f"--num_attention_heads={width // 16}", f"--num_key_value_heads={width // 16}"
    run("train.py", config.seed, f"--out_dir={seed}", *shape, *heads, steps(config.seed))
    experts = [f"{folder}/expert-{domain}" for domain in domains]
    for domain, expert in zip(domains, experts, strict=True):
        branch = f"--init_from={seed}", f"--out_dir={expert}", f"--domain={domain}"
        run("train.py", config.expert, *branch, steps(config.expert))
    data = f"--data_dir={config.data_dir}"
    run("mix.py", config.mix, f"--experts={','.join([*experts, seed])}", f"--out_dir={folder}/mixed", data)
    run(
        "finetune.py",
        config.finetune,
        f"--init_from={folder}/mixed",
        f"--out_dir={folder}/btx",
        steps(config.finetune),
    )


def point(width, scale, rows):
    """One point of the curves: both models' scores, and the tokens that each had per parameter of the dense model.

    rows: of results.json or compare.json, two of them named btx and dense-dm.
    """
    named = {row["name"]: row for row in rows}
    btx, dense = named["btx"], named["dense-dm"]
    tasks = [task for task in btx["accuracy"] if task != "avg"]
    return {
        "width": width,
        "scale": scale,
        "parameters": dense["total_params"],
        "tokens_per_parameter": dense["train_tokens"] / dense["total_params"],
        "bpb": {name: named[name]["bpb"] for name in ("btx", "dense-dm")},
        "accuracy": {name: {t: named[name]["accuracy"][t] for t in tasks} for name in ("btx", "dense-dm")},
        "difference": btx["bpb"]["avg"] - dense["bpb"]["avg"],
    }


def measure(config, width, scale):
    """Train and evaluate one point."""
    folder = os.path.join(config.out_dir, f"width-{width}-scale-{scale}")
    train_chain(config, folder, width, scale)
    chain = Chain(folder, config.data_dir)
    train_dense(config, chain, "dense-dm", config.dense_learning_rate, tokens=chain.tokens)
    run("eval.py", config.eval, f"--model={folder}/btx,{folder}/dense-dm", f"--out_dir={folder}/scores")
    return point(width, scale, read_json(f"{folder}/scores/results.json", "run again")["rows"])


def table(points):
    """The points in Markdown, by width and scale."""
    header = ["width", "scale", "parameters", "tokens per parameter", "BTX", "dense", "BTX minus dense"]
    tasks = list(points[0]["accuracy"]["btx"])
    header += [f"{task} accuracy, BTX and dense" for task in tasks]
    body = []
    for one in sorted(points, key=lambda one: (one["width"], one["scale"])):
        btx, dense = (one["bpb"][name]["avg"] for name in ("btx", "dense-dm"))
        cells = [str(one["width"]), f"{one['scale']:g}", short(one["parameters"]), f"{one['tokens_per_parameter']:.0f}"]
        cells += [f"{btx:.3f}", f"{dense:.3f}", f"{one['difference']:+.3f}"]
        cells += [" / ".join(f"{one['accuracy'][name][task]:.1%}" for name in ("btx", "dense-dm")) for task in tasks]
        body.append(cells)
    return markdown_table(header, body)


def plot(points, path):
    """The difference over tokens per parameter, a line a width; below zero BTX is ahead."""
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for i, width in enumerate(dict.fromkeys(point["width"] for point in points)):
        line = sorted((p["tokens_per_parameter"], p["difference"]) for p in points if p["width"] == width)
        parameters = next(p["parameters"] for p in points if p["width"] == width)
        label = f"width {width}, {parameters / 1000:.0f} k parameters"
        axis.plot(*zip(*line, strict=True), color=COLOURS[i], linestyle=STYLES[i], marker="os^Dvx"[i % 6], label=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("training tokens per parameter, the seed's included")
    axis.set_ylabel("BTX minus dense, average bits per byte\n(below zero BTX is ahead)")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    config = parse(RegimeConfig)
    try:
        widths = [int(width) for width in config.widths.split(",")]
        scales = [float(scale) for scale in config.scales.split(",")]
    except ValueError as error:
        raise UserError(f"--widths and --scales are numbers separated by commas: {error}") from None
    points = [measure(config, width, scale) for width in widths for scale in scales if width * scale <= config.largest]
    if not points:
        raise UserError(f"--largest={config.largest} leaves no run; raise it")
    os.makedirs(config.report, exist_ok=True)
    comparison = os.path.join(config.report, "compare.json")
    width = parse(FinetuneConfig, [config.seed]).hidden_size
    if os.path.exists(comparison) and not any((p["width"], p["scale"]) == (width, 1) for p in points):
        # the comparison is one point more: the configs as they are, the mean of several random seeds
        points.append(point(width, 1.0, read_json(comparison, "make it again: bash run.sh cpu compare")["rows"]))
    found = {"points": points, "config": dataclasses.asdict(config), "versions": versions()}
    write_atomically(os.path.join(config.report, "regime.json"), json.dumps(found, indent=1) + "\n")
    plot(points, os.path.join(config.report, "regime.png"))
    print(table(points))


if __name__ == "__main__":
    command(main)
