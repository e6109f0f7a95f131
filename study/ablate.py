"""Ask the paper's questions again: one row per variant of mixing, routing and finetuning, from the same experts.

    bash run.sh cpu ablate        # or, after the main pipeline: python -m study.ablate config/cpu/ablate.py

Each row is a mix.py and a finetune.py command, run for several random seeds and evaluated like the main table.
It can be stopped and continued like every other stage. Writes ablations.json, ablations.md and ablations.png.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.checkpoint import read_run
from common.config import UserError, command, key, parse, read_json, write_atomically
from study.report import markdown_table, mean_and_std, plus_minus, short

BASE = "top-2"  # what every other row is held against


@dataclasses.dataclass
class AblateConfig:
    """Run and compare all variants of mixing, routing and finetuning."""

    experts: str = key("", "the trained experts, separated by commas, the seed last")
    out_dir: str = key("out/cpu/ablate", "where the variants' checkpoints go")
    report: str = key("out/cpu/report", "where ablations.json, .md and .png go")
    finetune: str = key("config/cpu/finetune.py", "the config of finetune.py that every row starts from")
    eval: str = key("config/cpu/eval.py", "the config of eval.py")
    data_dir: str = key("out/cpu/data", "the folder that data/prepare.py wrote")
    steps: int = key(300, "finetuning steps of every row", minimum=1)
    long_steps: int = key(1200, "steps of the routing rows' second, larger budget", minimum=1)
    seeds: int = key(2, "random seeds of each row", minimum=1)


class Variant(NamedTuple):
    """A row: what it changes, and the paper's score for it (average over five tasks, its tables 4 and 5), if any."""

    name: str
    mix: str = ""
    finetune: str = ""
    paper: float | None = None
    long: bool = False  # the larger budget
    leave_out_seed: bool = False
    from_seed: bool = False  # copies of the seed instead of the trained experts


VARIANTS = [
    # the paper's routing table: two budgets
    Variant(BASE, paper=34.6),
    Variant("switch", finetune="--router=switch", paper=24.7),
    Variant("sample top-1", finetune="--router=sample", paper=33.0),
    Variant("soft", finetune="--router=soft", paper=35.8),
    Variant("top-2, longer", paper=35.9, long=True),
    Variant("switch, longer", finetune="--router=switch", long=True),
    Variant("sample top-1, longer", finetune="--router=sample", paper=35.3, long=True),
    Variant("soft, longer", finetune="--router=soft", paper=37.3, long=True),
    # the paper's strategy table
    Variant("no balancing", finetune="--router_aux_loss_coef=0.0", paper=34.6),
    Variant("no balancing, experts frozen", finetune="--router_aux_loss_coef=0.0 --freeze=experts", paper=34.7),
    Variant("blend", mix="--blend=True", paper=22.2),
    Variant("split, top-2 of 2N", mix="--split=2", paper=28.0),
    Variant("split, top-4 of 2N", mix="--split=2", finetune="--num_experts_per_tok=4", paper=34.5),
    # what the paper does not ask
    Variant("split, top-4 of 2N, rescaled", mix="--split=2 --rescale=True", finetune="--num_experts_per_tok=4"),
    Variant("router starts at zero", mix="--router_init=zero"),
    Variant("router starts at domains", mix="--router_init=domain"),
    Variant("router starts at contrasts", mix="--router_init=contrast"),
    Variant("balancing counts tokens", finetune="--balance=tokens"),
    Variant("attention frozen", finetune="--freeze=attention"),
    Variant("only routers trained", finetune="--freeze=all-but-router"),
    Variant("seed left out", leave_out_seed=True),
    Variant("sparse upcycling", mix="--method=upcycle", from_seed=True),
    Variant("Drop-Upcycling, r = 0.5", mix="--method=drop-upcycle --drop=0.5", from_seed=True),
]


def run(script, *arguments):
    """Run one of our scripts; its progress shows, and an error ends this script too."""
    done = subprocess.run([sys.executable, script, *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


def slug(text):
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def run_variant(config, variant, seed):
    """Mix, finetune and evaluate one row with one seed; returns its row of results.json and its run.json."""
    folders = config.experts.split(",")
    chosen = folders[-1:] if variant.from_seed else folders[:-1] if variant.leave_out_seed else folders
    experts = ",".join(chosen)
    mixed = os.path.join(config.out_dir, slug(f"mixed {variant.mix} {len(chosen)} seed{seed}"))
    out_dir = os.path.join(config.out_dir, slug(f"{variant.name} seed{seed}"))
    copies = [f"--num_experts={len(folders)}"] if variant.from_seed else []
    run(
        "mix.py",
        f"--experts={experts}",
        f"--out_dir={mixed}",
        f"--seed={seed}",
        *copies,
        *variant.mix.split(),
        f"--data_dir={config.data_dir}",
    )
    steps = config.long_steps if variant.long else config.steps
    run(
        "finetune.py",
        config.finetune,
        f"--init_from={mixed}",
        f"--out_dir={out_dir}",
        f"--seed={seed}",
        f"--max_steps={steps}",
        f"--eval_interval={steps}",
        *variant.finetune.split(),
    )
    run("eval.py", config.eval, f"--model={out_dir}", f"--out_dir={config.out_dir}/scores")
    results = read_json(os.path.join(config.out_dir, "scores", "results.json"), "run again")
    row = next(row for row in results["rows"] if row["name"] == os.path.basename(out_dir))
    return row, read_run(out_dir)


def dead_experts(row):
    """How many (layer, expert) pairs get under 1 % of a layer's (token, expert) choices, averaged over domains."""
    domains = list(row["load"].values())  # each L x E
    shares = [[statistics.mean(layer) for layer in zip(*layers, strict=True)] for layers in zip(*domains, strict=True)]
    return sum(share < 0.01 for layer in shares for share in layer)


def summarize(variant, runs):
    """One row of ablations.json from [(row of results.json, run.json)], one for each random seed."""
    rows = [row for row, _ in runs]
    costs = [list(run["history"].values())[-1] for _, run in runs]  # of the finetuning alone
    return {
        "name": variant.name,
        **mean_and_std(rows),
        "active_params": rows[0]["active_params"],
        "total_params": rows[0]["total_params"],
        "train_tokens": costs[0]["tokens"],
        "train_flops": costs[0]["flops"],
        "seconds": statistics.mean(cost["seconds"] for cost in costs),
        "tokens_per_second": statistics.median(cost["tokens"] / cost["seconds"] for cost in costs),
        "dead_experts": [dead_experts(row) for row in rows],
        "paper": variant.paper,
        "long": variant.long,
    }


def spread(rows):
    """Twice the standard deviation over seeds of the average bits per byte, pooled over all rows: with two or three
    seeds a single row's own deviation is too uncertain. Smaller differences count as ties."""
    return 2 * statistics.mean(row["std"]["bpb"]["avg"] ** 2 for row in rows) ** 0.5


def verdict(row, base, tie):
    """Does our order of a row and the base agree with the paper's? Differences up to `tie` are none."""
    if row["paper"] is None or row["name"] == base["name"]:
        return ""
    ours = base["bpb"]["avg"] - row["bpb"]["avg"]  # positive: the row is better
    paper = row["paper"] - base["paper"]
    if abs(paper) <= 0.3:  # the paper calls differences this small equal
        return "yes, equal" if abs(ours) <= tie else "**no**, the paper has them equal"
    if abs(ours) <= tie:
        return "**no**, a tie here"
    return "yes" if (ours > 0) == (paper > 0) else "**no**"


def base_of(row, rows):
    """The top-2 row of the same budget."""
    name = f"{BASE}, longer" if row["long"] else BASE
    return next(one for one in rows if one["name"] == name)


def table(rows):
    domains, tasks = list(rows[0]["bpb"]), list(rows[0]["accuracy"])
    header = ["variant", *(f"{d} bpb" for d in domains), *(f"{t} accuracy" for t in tasks)]
    header += ["active params", "tokens/s", "dead experts", "paper", "order as in the paper"]
    body = []
    for row in rows:
        cells = [row["name"]]
        cells += [plus_minus(row, "bpb", d) for d in domains] + [plus_minus(row, "accuracy", t) for t in tasks]
        cells += [short(row["active_params"]), short(row["tokens_per_second"])]
        cells += [
            " / ".join(map(str, row["dead_experts"])),
            str(row["paper"] or ""),
            verdict(row, base_of(row, rows), spread(rows)),
        ]
        body.append(cells)
    return markdown_table(header, body)


def plot(rows, path):
    """Average bits per byte of every row, with the spread over seeds; the line is the base of the same budget."""
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(rows) + 1))
    for y, row in enumerate(rows):
        colour = "#D55E00" if row["long"] else "#0072B2"
        style = {"color": colour, "marker": "s" if row["long"] else "o", "capsize": 3}
        axis.errorbar(row["bpb"]["avg"], y, xerr=row["std"]["bpb"]["avg"], **style)
    for name, style in ((BASE, "-"), (f"{BASE}, longer", "--")):
        base = next(row for row in rows if row["name"] == name)
        axis.axvline(base["bpb"]["avg"], color="#999999", linestyle=style, zorder=0)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("average bits per byte (lower is better); lines: top-2 at the two budgets")
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(folder, found):
    """Write ablations.json, ablations.md and ablations.png."""
    rows, seeds = found["rows"], found["config"]["ablate"]["seeds"]
    os.makedirs(folder, exist_ok=True)
    write_atomically(os.path.join(folder, "ablations.json"), json.dumps(found, indent=1) + "\n")
    plot(rows, os.path.join(folder, "ablations.png"))
    text = f"# Ablations\n\n{table(rows)}\n\nMean ± standard deviation over {seeds} random seeds of router, batches "
    text += "and noise; the experts are the same throughout. Dead experts: (layer, expert) pairs that get under 1 % of "
    text += "the choices, by seed. Paper: its average over five tasks; the order is that against top-2 at the same "
    text += f"budget, and differences up to {spread(rows):.3f} count as ties (twice the pooled deviation).\n\n"
    text += "![ablations](ablations.png)\n"
    write_atomically(os.path.join(folder, "ablations.md"), text)


def main():
    config = parse(AblateConfig)
    if len(config.experts.split(",")) < 2:
        raise UserError("--experts must name the trained experts and, last, the seed: --experts=DIR,DIR,...")
    rows = []
    for variant in VARIANTS:
        rows.append(summarize(variant, [run_variant(config, variant, seed) for seed in range(1, config.seeds + 1)]))
    results = read_json(os.path.join(config.out_dir, "scores", "results.json"), "run again")
    settings = {**results["config"], "ablate": dataclasses.asdict(config)}
    found = {"rows": rows, "config": settings, "data": results["data"], "versions": results["versions"]}
    write_report(config.report, found)
    print(table(rows))


if __name__ == "__main__":
    command(main)
