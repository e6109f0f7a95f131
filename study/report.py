"""Turn results.json and the runs' logs into report.md and its pictures.

    python -m study.report --report=out/cpu/report

Nothing is computed on models here: every number comes from results.json, routing.json, run.json and log.jsonl.
"""

import dataclasses
import json
import os
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.checkpoint import LOG, read_run
from common.config import UserError, command, key, parse, read_json, write_atomically
from data.task import METRICS

# Okabe and Ito's colours, told apart by colour-blind readers; line styles and markers tell them apart in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]


@dataclasses.dataclass
class ReportConfig:
    """Write report.md, curves.png and bpb.png beside a results.json."""

    report: str = key("out/cpu/report", "the folder with results.json, from eval.py")


def short(number):
    """1234567 -> '1.23 M'; 3.1e15 -> '3.1e+15'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit <= number < 1e12:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def markdown_table(header, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def bold(text, best):
    return f"**{text}**" if best else text


def mean_and_std(rows):
    """{metric: {name: mean}} of several rows of results.json that differ in a random seed, and the same form of
    standard deviations (of a sample; 0 for a single row) under "std"."""

    def over(metric, name, of):
        values = [row[metric][name] for row in rows]
        return of(values) if of is statistics.mean or len(values) > 1 else 0.0

    def all_scores(of):
        return {m: {name: over(m, name, of) for name in rows[0][m]} for m in ("bpb", *METRICS) if m in rows[0]}

    return {**all_scores(statistics.mean), "std": all_scores(statistics.stdev)}


def plus_minus(row, metric, name):
    """'0.794 ± 0.005' or '17.6% ± 2.3%' from a row with "std"."""
    style = ".3f" if metric == "bpb" else ".1%"
    return f"{row[metric][name]:{style}} ± {row['std'][metric][name]:{style}}"


def score_table(results):
    """The main table: a row per model; the best of each score column in bold."""
    rows = results["rows"]
    domains = list(rows[0]["bpb"])
    tasks = [(metric, task) for metric in METRICS for task in rows[0][metric]]
    best_bpb = {d: min(row["bpb"][d] for row in rows) for d in domains}
    best_task = {(metric, t): max(row[metric][t] for row in rows) for metric, t in tasks}

    header = ["model", *(f"{d} bpb" for d in domains), *(f"{t} {metric.replace('_', ' ')}" for metric, t in tasks)]
    header += ["active params", "total params", "training tokens", "training FLOPs"]
    body = []
    for row in rows:
        cells = [row["name"]]
        cells += [bold(f"{row['bpb'][d]:.3f}", row["bpb"][d] == best_bpb[d]) for d in domains]
        cells += [bold(f"{row[metric][t]:.1%}", row[metric][t] == best_task[metric, t]) for metric, t in tasks]
        cells += [short(row[name]) for name in ("active_params", "total_params", "train_tokens", "train_flops")]
        body.append(cells)
    return markdown_table(header, body)


def baseline_lines(baselines):
    """What each task's score is without knowing anything: one line a task and metric."""
    return [
        f"- {domain} {metric.replace('_', ' ')}: " + ", ".join(f"{name} {score:.1%}" for name, score in scores.items())
        for domain, metrics in baselines.items()
        for metric, scores in metrics.items()
    ]


def cost_table(runs):
    """What each training run cost by itself."""
    body = []
    for folder, run in runs.items():
        cost = run["history"][folder]
        speed = f"{cost['tokens'] / cost['seconds'] / 1000:.1f} k" if cost["seconds"] else "-"
        body.append([folder, short(cost["tokens"]), short(cost["flops"]), f"{cost['seconds']:.0f}", speed])
    return markdown_table(["run", "tokens", "FLOPs", "seconds", "tokens/s"], body)


def claims(rows):
    """What the BTX paper would lead one to expect, each with the numbers and whether they bear it out."""
    named = {row["name"]: row for row in rows}
    experts = {name.removeprefix("expert-"): row for name, row in named.items() if name.startswith("expert-")}
    seed, btx = named.get("seed"), named.get("btx")
    found = []
    for domain, row in experts.items() if seed else ():
        home = row["bpb"][domain] < seed["bpb"][domain]
        found.append((home, f"expert-{domain} beats the seed at home", row["bpb"][domain], seed["bpb"][domain]))
        away = [d for d in row["bpb"] if d not in (domain, "avg")]
        ours, theirs = (sum(r["bpb"][d] for d in away) / max(1, len(away)) for r in (row, seed))
        found.append((ours > theirs, f"expert-{domain} loses to the seed away from home", ours, theirs))
    for name, row in named.items() if btx else ():
        if name != "btx":
            ours, theirs = btx["bpb"]["avg"], row["bpb"]["avg"]
            found.append((ours < theirs, f"btx beats {name} on the average", ours, theirs))
    for domain, row in experts.items() if btx else ():
        ours, theirs = btx["bpb"][domain], row["bpb"][domain]
        found.append((ours <= 1.02 * theirs, f"btx is within 2 % of expert-{domain} at home", ours, theirs))
    return [f"- {'yes' if holds else '**no**'}: {what} ({a:.3f} and {b:.3f})" for holds, what, a, b in found]


def read_log(folder):
    with open(os.path.join(folder, LOG)) as file:
        return [json.loads(line) for line in file]


def plot_curves(runs, domains, path):
    """Bits per byte against training FLOPs, each run starting where the training behind it ends.

    A panel ends at 1.3 times what the first run (the seed) came to: a curve that leaves it forgets that domain.
    """
    figure, axes = plt.subplots(1, len(domains), figsize=(3.1 * len(domains), 3.2), sharex=True)
    logs = {folder: read_log(folder) for folder in runs}
    for i, (folder, run) in enumerate(runs.items()):
        before = sum(cost["flops"] for name, cost in run["history"].items() if name != folder)
        for axis, domain in zip(axes, domains, strict=True):
            axis.plot(
                [before + line["flops"] for line in logs[folder]],
                [line["bpb"][domain] for line in logs[folder]],
                color=COLOURS[i % len(COLOURS)],
                linestyle=STYLES[i % len(STYLES)],
                label=os.path.basename(folder),
            )
    for axis, domain in zip(axes, domains, strict=True):
        low = min(line["bpb"][domain] for log in logs.values() for line in log)
        high = 1.3 * next(iter(logs.values()))[-1]["bpb"][domain]
        axis.set_ylim(low - 0.05 * (high - low), high)
        axis.set_title(domain if domain != "avg" else "average")
        axis.set_xlabel("training FLOPs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation bits per byte")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(runs), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_bpb(rows, domains, path):
    """One panel a domain, one dot a model, its value beside it; the best is black.

    Values beyond 1.5 times the best stand at the edge, as an arrow: forgotten domains would squeeze the rest.
    """
    size = (2.7 * len(domains) + 0.8, 0.32 * len(rows) + 1.1)
    figure, axes = plt.subplots(1, len(domains), figsize=size, sharey=True)
    for axis, domain in zip(axes, domains, strict=True):
        values = [row["bpb"][domain] for row in rows]
        best = min(values)
        edge = 1.5 * best
        for y, value in enumerate(values):
            inside = value <= edge
            style = {"color": "black" if value == best else COLOURS[0], "marker": "o" if inside else ">", "zorder": 2}
            axis.hlines(y, best, min(value, edge), color="#bbbbbb")
            axis.scatter(min(value, edge), y, **style)
            axis.annotate(f"{value:.3f}", (min(value, edge), y), xytext=(6, -3), textcoords="offset points", fontsize=8)
        axis.set_xlim(best - 0.07 * (edge - best), edge + 0.35 * (edge - best))
        axis.set_title(domain if domain != "avg" else "average")
        axis.set_xlabel("bits per byte")
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def routing_table(models):
    """From routing.json: what the routers learned, layer by layer."""
    layers = range(len(models[0]["mutual_information"]))
    body = []
    for model in models:
        domains = model["domains"].values()
        entropy = [sum(domain["gate_entropy"][layer] for domain in domains) / len(domains) for layer in layers]
        bits = model["mutual_information"]
        body.append([f"{model['name']}: expert tells about domain, bits", *(f"{value:.3f}" for value in bits)])
        body.append([f"{model['name']}: entropy of a token's gates, bits", *(f"{value:.2f}" for value in entropy)])
        body.append([f"{model['name']}: dead experts", *(", ".join(names) or "-" for names in model["dead"])])
    return markdown_table(["", *(f"layer {layer}" for layer in layers)], body)


def routing_section(folder):
    """The part of report.md that route.py's files make; empty where route.py has not run."""
    path = os.path.join(folder, "routing.json")
    if not os.path.exists(path):
        return []
    models = read_json(path, "make it again with route.py")["models"]
    text = ["\n## Where the routers send tokens\n", "![share of tokens by expert, layer and domain](routing.png)\n"]
    if any(model["experts_per_token"] > 1 for model in models):
        text += ["![share of tokens by pair of experts](pairs.png)\n"]
    pages = ", ".join(f"[{domain}](tokens-{domain}.html)" for domain in models[0]["domains"])
    return [*text, routing_table(models), f"\n{models[0]['name']} token by token, pages for a browser: {pages}."]


def main():
    folder = parse(ReportConfig).report
    results = read_json(os.path.join(folder, "results.json"), "make it first: python eval.py --model=DIR,DIR")
    rows = results["rows"]
    if not rows:
        raise UserError(f"{folder}/results.json has no rows; evaluate a model first: python eval.py --model=DIR")
    domains = list(rows[0]["bpb"])
    folders = dict.fromkeys(run for row in rows for run in row["runs"])
    runs = {run: read_run(run) for run in folders if os.path.exists(os.path.join(run, LOG))}

    plot_bpb(rows, domains, os.path.join(folder, "bpb.png"))
    text = ["# Results\n", score_table(results)]
    text += [f"\nbpb: bits per byte on held-out text ({results['config']['split']}), lower is better.\n"]
    if results["baselines"]:
        text += ["Scores of guesses, made without a model:\n", *baseline_lines(results["baselines"]), ""]
    text += ["![bits per byte](bpb.png)\n", "## What was expected\n", *claims(rows)]
    if runs:
        plot_curves(runs, domains, os.path.join(folder, "curves.png"))
        text += ["\n## What it cost\n", cost_table(runs), "\n![training curves](curves.png)"]
    text += routing_section(folder)
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    text += [f"\nMade with {versions}; data and settings are in results.json."]
    write_atomically(os.path.join(folder, "report.md"), "\n".join(text) + "\n")
    print("\n".join(text[1:2]) + f"\n\n{folder}/report.md has the table, the costs and the pictures")


if __name__ == "__main__":
    command(main)
