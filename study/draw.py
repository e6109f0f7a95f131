"""Every picture of the studies, and how they look."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.runs import read_log
from study.tables import BASE, SCORES, kind

# Okabe and Ito's colours, told apart by colour-blind readers; line styles and markers tell them apart in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]
# the comparison's rows: a colour per method and a marker of its own
LOOKS = {
    "seed": ("#999999", "8"),
    "dense-dm": ("#0072B2", "s"),
    "dense-cm": ("#0072B2", "D"),
    "upcycle-dm": ("#009E73", "p"),
    "upcycle-cm": ("#009E73", "h"),
    "btm-top1": ("#56B4E9", "^"),
    "btm-top2": ("#56B4E9", "v"),
    "btm-posterior": ("#56B4E9", "<"),
    "btm-posterior-prefix": ("#56B4E9", ">"),
    "btx": ("#D55E00", "o"),
    "btx-sample": ("#D55E00", "X"),
}


def save(figure, path):
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- the pipeline's report ----


def plot_curves(folders, domains, path):
    """Bits per byte against training FLOPs, each run starting where the training behind it ends.

    A panel ends at 1.3 times what the first run (the seed) came to: a curve that leaves it forgets that domain.
    folders: {folder: run.json}.
    """
    figure, axes = plt.subplots(1, len(domains), figsize=(3.1 * len(domains), 3.2), sharex=True)
    logs = {folder: read_log(folder) for folder in folders}
    for i, (folder, run) in enumerate(folders.items()):
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(folders), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, path)


def plot_bpb(rows, domains, path):
    """One panel per domain, one dot per model, its value beside it; the best is black.

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
    save(figure, path)


# ---- routing: a panel per domain and model; layers run to the right ----


def expert_rows(entry, domain):
    """(names, R x L values) for routing.png: each expert's share of a layer's (token, expert) choices."""
    return entry["experts"], list(zip(*entry["domains"][domain]["share"], strict=True))


def pair_rows(entry, domain):
    """(names, R x L values) for pairs.png: the share of tokens whose two largest gates are the pair's."""
    names, layers = entry["experts"], entry["domains"][domain]["co_activation"]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    return [f"{names[i]} + {names[j]}" for i, j in pairs], [[layer[i][j] for layer in layers] for i, j in pairs]


def plot_heatmaps(models, rows_of, title, path):
    """models: entries of routing.json, one line of panels each; rows_of(entry, domain) gives a panel's rows.

    The middle tone is an even share, the darkest twice that or more.
    """
    domains = list(models[0]["domains"])
    panels = [[rows_of(entry, domain) for domain in domains] for entry in models]
    layers = len(panels[0][0][1][0])
    heights = [0.26 * len(line[0][0]) + 0.45 for line in panels]
    width = max(0.36 * layers, 2.2)
    label = 0.085 * max(len(name) for line in panels for name in line[0][0])
    size = label + width * len(domains) + 0.4, sum(heights) + 0.6
    shape = {"figsize": size, "squeeze": False, "layout": "constrained", "height_ratios": heights}
    figure, axes = plt.subplots(len(models), len(domains), **shape)
    for entry, panel_line, axis_line in zip(models, panels, axes, strict=True):
        for domain, (names, rows), axis in zip(domains, panel_line, axis_line, strict=True):
            darkest = 2 / len(rows)
            axis.imshow(rows, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    ink = "white" if value > 0.7 * darkest else "black"
                    axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
            axis.set_title(f"{entry['name']} reading {domain}", fontsize=9)
            axis.set_xticks(range(layers), labels=range(layers) if entry is models[-1] else [], fontsize=8)
            axis.set_yticks(range(len(names)), labels=names if axis is axis_line[0] else [], fontsize=8)
            axis.tick_params(length=0)
    figure.supxlabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


# ---- the comparison, the ablations, width and budget ----


def plot_cost(rows, cost, label, path):
    """Average accuracy and average bits per byte against a cost; a marker's area is the row's active parameters.

    Experts, soup and the unfinetuned mixture are left out: they lack most domains, and would squeeze the rest.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    largest = max(row["active_params"] for row in rows)
    shown = [row for row in rows if kind(row) in LOOKS]
    shown.sort(key=lambda row: -row["active_params"])  # small markers on top of large ones
    for axis, (metric, text) in zip(axes, SCORES.items(), strict=True):
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
    save(figure, path)


def plot_ablations(rows, path):
    """Average bits per byte of every row, with the spread over random seeds; lines: top-2 at both budgets."""
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(rows) + 1))
    for y, row in enumerate(rows):
        style = {"color": COLOURS[row["long"]], "marker": "s" if row["long"] else "o", "capsize": 3}
        axis.errorbar(row["bpb"]["avg"], y, xerr=row["std"]["bpb"]["avg"], **style)
    for name, style in ((BASE, "-"), (f"{BASE}, longer", "--")):
        base = next(row for row in rows if row["name"] == name)
        axis.axvline(base["bpb"]["avg"], color="#999999", linestyle=style, zorder=0)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("average bits per byte (lower is better); lines: top-2 at the two budgets")
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    save(figure, path)


def plot_regime(points, path):
    """BTX minus dense over tokens per parameter, a line per width; below zero BTX is ahead."""
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for i, width in enumerate(dict.fromkeys(point["width"] for point in points)):
        line = sorted((p["tokens_per_parameter"], p["difference"]) for p in points if p["width"] == width)
        parameters = next(p["parameters"] for p in points if p["width"] == width)
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "marker": "os^Dvx"[i % 6]}
        axis.plot(*zip(*line, strict=True), **style, label=f"width {width}, {parameters / 1000:.0f} k parameters")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("training tokens per parameter, the seed's included")
    axis.set_ylabel("BTX minus dense, average bits per byte\n(below zero BTX is ahead)")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, path)
