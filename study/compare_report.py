"""compare.json -> compare.md and its two pictures; see compare.py."""

import json
import os
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.config import write_atomically
from study.report import baseline_lines, bold, markdown_table, plus_minus, short

# rows in the paper's order: a colour a method (Okabe and Ito) and a marker of its own, which tells it apart in grey
LOOKS = {
    "seed": ("#999999", "8"),
    "expert": ("#E69F00", "."),
    "dense-dm": ("#0072B2", "s"),
    "dense-cm": ("#0072B2", "D"),
    "upcycle-dm": ("#009E73", "p"),
    "upcycle-cm": ("#009E73", "h"),
    "soup": ("#CC79A7", "x"),
    "btm-top1": ("#56B4E9", "^"),
    "btm-top2": ("#56B4E9", "v"),
    "btm-posterior": ("#56B4E9", "<"),
    "btm-posterior-prefix": ("#56B4E9", ">"),
    "mixed": ("#CC79A7", "+"),
    "btx": ("#D55E00", "o"),
    "btx-sample": ("#D55E00", "X"),
}
SCORES = {"accuracy": (1, "task accuracy"), "bpb": (-1, "bits per byte")}  # 1: higher is better


def kind(row):
    return "expert" if row["name"].startswith("expert-") else row["name"]


def in_order(rows):
    """Rows in the paper's order, experts as they come."""
    return sorted(rows, key=lambda row: list(LOOKS).index(kind(row)))


# ---- tables ----


def score_table(rows):
    """Bits per byte and accuracies, mean ± standard deviation over the chains; the best of each column in bold."""
    columns = [("bpb", name) for name in rows[0]["bpb"]] + [("accuracy", name) for name in rows[0]["accuracy"]]
    columns += [("edit_similarity", name) for name in rows[0]["edit_similarity"]]
    best = {(m, n): (min if m == "bpb" else max)(row[m][n] for row in rows) for m, n in columns}
    body = []
    for row in rows:
        cells = [bold(plus_minus(row, m, n), row[m][n] == best[m, n]) for m, n in columns]
        body.append([row["name"], *cells])
    return markdown_table(["model", *(f"{n} {m.replace('_', ' ')}" for m, n in columns)], body)


def cost_table(rows):
    """What each row cost, from the seed on."""
    header = ["model", "active params", "total params", "training tokens", "training FLOPs", "seconds, summed"]
    header += ["seconds, branches side by side", "bytes sent by 8 workers"]
    names = "active_params", "total_params", "train_tokens", "train_flops"
    body = []
    for row in rows:
        cells = [row["name"], *(short(row[name]) for name in names)]
        cells += [f"{row['seconds']:.0f}", f"{row['critical_seconds']:.0f}", f"{row['bytes_sent'] / 1e9:.1f} GB"]
        body.append(cells)
    return markdown_table(header, body)


# ---- verdicts ----


def difference(chains, name, metric, column):
    """(how far BTX is ahead of the row `name`, the tie limit), from the rows of each chain.

    The limit is twice the standard deviation, over the chains, of the difference within a chain: its rows share a seed
    model, whose luck is in both of them.
    """
    sign, _ = SCORES[metric]
    ahead = []
    for rows in chains:
        named = {row["name"]: row for row in rows}
        ahead.append(sign * (named["btx"][metric][column] - named[name][metric][column]))
    return statistics.mean(ahead), 2 * statistics.stdev(ahead) if len(ahead) > 1 else 0.0


def verdict(chains, name, metric, column):
    """'ahead by 0.012', 'behind by 0.012' or 'tie (+0.001)': a tie is no farther than the limit."""
    ahead, limit = difference(chains, name, metric, column)
    scale, digits, unit = (1, 3, "") if metric == "bpb" else (100, 1, " points")
    if abs(ahead) <= limit:
        return f"tie ({scale * ahead:+.{digits}f}{unit})"
    size = f"{abs(scale * ahead):.{digits}f}{unit}"
    return f"ahead by {size}" if ahead > 0 else f"**behind by {size}**"


def verdict_table(rows, chains):
    """BTX against every other row that may hold all domains: on the averages and domain by domain."""
    columns = [(metric, column) for metric in SCORES for column in rows[0][metric]]
    columns.sort(key=lambda column: column[1] != "avg")
    others = [row["name"] for row in rows if kind(row) not in ("btx", "expert")]
    body = [[name, *(verdict(chains, name, *column) for column in columns)] for name in others]
    return markdown_table(["btx against", *(f"{name} {SCORES[metric][1]}" for metric, name in columns)], body)


def home_lines(rows):
    """How close BTX is to each expert at home: the issue of whether mixing keeps what the experts learned."""
    named = {row["name"]: row for row in rows}
    lines = []
    for name, row in named.items():
        domain = name.removeprefix("expert-")
        if name != domain and domain in row["bpb"]:
            ours, theirs = named["btx"]["bpb"][domain], row["bpb"][domain]
            holds = "yes" if ours <= 1.03 * theirs else "**no**"
            lines.append(f"- {holds}: btx within 3 % of {name} at home ({ours:.3f} and {theirs:.3f} bits per byte)")
    return lines


# ---- pictures ----


def plot_cost(rows, cost, label, path):
    """Average accuracy and average bits per byte against a cost; a marker's area is the row's active parameters.

    Experts, soup and the unfinetuned mixture are left out: they lack most domains, and would squeeze the rest.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    largest = max(row["active_params"] for row in rows)
    shown = [row for row in rows if kind(row) not in ("expert", "soup", "mixed")]
    shown.sort(key=lambda row: -row["active_params"])  # small markers on top of large ones
    for axis, (metric, (_, text)) in zip(axes, SCORES.items(), strict=True):
        unit = 100 if metric == "accuracy" else 1
        for row in shown:
            colour, marker = LOOKS[kind(row)]
            x, y = row[cost], unit * row[metric]["avg"]
            axis.errorbar(x, y, yerr=unit * row["std"][metric]["avg"], color="black", capsize=3, linewidth=1, zorder=1)
            style = {"color": colour, "marker": marker, "edgecolor": "black", "linewidth": 0.8, "label": row["name"]}
            axis.scatter(x, y, s=30 + 370 * row["active_params"] / largest, zorder=2, **style)
        axis.set_xlabel(label)
        axis.set_ylabel(f"average {text}" + (", %" if metric == "accuracy" else " (top is best)"))
        axis.grid(alpha=0.3)
    axes[1].invert_yaxis()
    legend = figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_domains(rows, path):
    """Each domain's scores over the best row's: accuracy over the highest, the lowest bits per byte over the row's."""
    shown = [row for row in rows if kind(row) not in ("soup", "mixed")]
    columns = [("accuracy", name) for name in rows[0]["accuracy"] if name != "avg"]
    columns += [("bpb", name) for name in rows[0]["bpb"] if name != "avg"]
    figure, axes = plt.subplots(
        1, len(columns), figsize=(1.6 * len(columns) + 1.2, 0.28 * len(shown) + 1.1), sharey=True
    )
    for axis, (metric, name) in zip(axes, columns, strict=True):
        values = [row[metric][name] for row in shown]
        best = max(values) if metric == "accuracy" else min(values)
        for y, (row, value) in enumerate(zip(shown, values, strict=True)):
            colour, marker = LOOKS[kind(row)]
            share = (value / best if metric == "accuracy" else best / value) if best else 0.0
            axis.hlines(y, 0, share, color="#bbbbbb")
            axis.scatter(share, y, color=colour, marker=marker, edgecolor="black", linewidth=0.6, zorder=2)
        axis.set_title(f"{name}\n{SCORES[metric][1]}", fontsize=9)
        axis.set_xlim(0, 1.08)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(shown)), [row["name"] for row in shown])
    axes[0].invert_yaxis()
    figure.supxlabel("score over the best row's (1 is best)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(folder, found):
    """Write compare.json, compare.md, compare.png, compare-time.png and compare-domains.png."""
    rows, chains = found["rows"], len(found["config"]["compare"]["chains"].split(","))
    write_atomically(os.path.join(folder, "compare.json"), json.dumps(found, indent=1) + "\n")
    plot_cost(rows, "train_flops", "training FLOPs, from the seed model's on", os.path.join(folder, "compare.png"))
    label = "training seconds, branches side by side"
    plot_cost(rows, "critical_seconds", label, os.path.join(folder, "compare-time.png"))
    plot_domains(rows, os.path.join(folder, "compare-domains.png"))
    text = ["# BTX and other ways to spend the same compute\n", score_table(rows)]
    text += [f"\nMean ± standard deviation over {chains} random seed(s) of the whole chain, on test text.", ""]
    text += ["What guessing scores:\n", *baseline_lines(found["baselines"])]
    text += ["\n![average scores against training FLOPs](compare.png)\n"]
    text += ["![scores of each domain over the best](compare-domains.png)\n"]
    text += ["## Who wins\n", verdict_table(rows, found["chains"]), ""]
    text += ["Differences within each chain, averaged; up to twice their standard deviation they are ties.\n"]
    text += home_lines(rows)
    text += ["\n## What it cost\n", cost_table(rows), "\n![average scores against time](compare-time.png)"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    text += [f"\nMade with {versions}; data and settings are in compare.json."]
    write_atomically(os.path.join(folder, "compare.md"), "\n".join(text) + "\n")
