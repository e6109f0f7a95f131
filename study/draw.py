"""Draws every picture; the only file that sets up matplotlib. It is given numbers and measures nothing."""

import math
import os
import statistics

os.environ["MPLBACKEND"] = "agg"  # to draw into files; a notebook may have set a backend that is missing here

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator

from common.run import read_log
from study.tables import BASE, WORDS, bases_of, difference, kind, short

plt.rcParams["figure.constrained_layout.use"] = True

# Okabe and Ito's colours, told apart by colour-blind readers; line styles and markers tell them apart in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]
MARKERS = "os^Dvx"
FAMILIES = ("btx", "dense", "upcycle", "btm", "seed", "")  # of the comparison's rows, by how their names begin
MOST_NUMBERED = 12  # with more layers than this, shares are not written into the picture


def in_words(name):
    """'btx' -> 'Branch-Train-MiX'; 'expert-code' -> 'code expert'; 'held-code' -> 'code expert, feed-forwards'."""
    if name.startswith("held-"):
        return f"{name.removeprefix('held-')} expert, feed-forwards"
    return f"{name.removeprefix('expert-')} expert" if name.startswith("expert-") else WORDS.get(name, name)


def save(figure, path):
    figure.savefig(path, dpi=150)
    plt.close(figure)


def name_rows(axis, names):
    """Write rows' names along the y axis, the first at the top."""
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()


def plot_point(axis, x, y, half, edge, digits, **style):
    """Draw a point with its interval x ± half; or, beyond the edge, an arrow at the edge and the value beside it."""
    if x <= edge:
        axis.errorbar(x, y, xerr=half, capsize=3, **style)
    else:
        axis.plot(edge, y, **{**style, "marker": ">"})
        place = {"ha": "right", "va": "center", "xytext": (-8, 0), "textcoords": "offset points"}
        axis.annotate(f"{x:.{digits}f}", (edge, y), fontsize=8, **place)


def log_axis(axis, low, high):
    """Make an axis (axis.xaxis or axis.yaxis) logarithmic, with plain numbers at 1, 2 and 5 times powers of ten, or at
    a few more if that gives fewer than three."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    ticks = []
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        if len(ticks) < 3:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


# ---- the pipeline's report ----


def plot_curves(folders, domains, path):
    """Bits per byte, on a log axis, against training FLOPs. Each run starts at the FLOPs already spent on its parents,
    so you see the branches forget, the jump at mixing, and the repair.

    folders: {folder: run.json}.
    """
    read = [domain for domain in domains if domain != "avg"]
    logs = {folder: read_log(folder) for folder in folders}
    for line in (line for log in logs.values() for line in log):  # runs also score unread text
        line["bpb"]["avg"] = statistics.mean(line["bpb"][domain] for domain in read)
    figure, axes = plt.subplots(1, len(domains), figsize=(3.1 * len(domains), 3.4), sharex=True)
    for i, (folder, run) in enumerate(folders.items()):
        before = sum(cost["flops"] for name, cost in run["history"].items() if name != folder)
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
        label = in_words(os.path.basename(folder))
        for axis, domain in zip(axes, domains, strict=True):
            x, y = zip(*((before + line["flops"], line["bpb"][domain]) for line in logs[folder]), strict=True)
            axis.plot(x, y, label=label, **style)
    for axis, domain in zip(axes, domains, strict=True):
        values = [line["bpb"][domain] for log in logs.values() for line in log]
        log_axis(axis.yaxis, 0.9 * min(values), 1.1 * max(values))
        axis.set(title=domain if domain != "avg" else "average", xlabel="training FLOPs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation bits per byte")
    columns = len(folders) if len(folders) < 7 else 3
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    save(figure, path)


def plot_bpb(rows, domains, path):
    """One panel per domain, one dot per model with its value beside it; the best is black. The axis is logarithmic, as
    a forgotten domain costs several times the bits."""
    size = (2.7 * len(domains) + 1.6, 0.32 * len(rows) + 1.1)
    figure, axes = plt.subplots(1, len(domains), figsize=size, sharey=True)
    for axis, domain in zip(axes, domains, strict=True):
        values = [row["bpb"][domain] for row in rows]
        best = min(values)
        log_axis(axis.xaxis, 0.93 * best, 1.9 * max(values))
        for y, value in enumerate(values):
            colour = "black" if value == best else COLOURS[0]
            axis.hlines(y, best, value, color="#bbbbbb")
            axis.scatter(value, y, color=colour, zorder=2)
            axis.annotate(f"{value:.3f}", (value, y), xytext=(6, -3), textcoords="offset points", fontsize=8)
        axis.set(title=domain if domain != "avg" else "average", xlabel="bits per byte")
    name_rows(axes[0], [in_words(row["name"]) for row in rows])  # for all panels: they share the axis
    save(figure, path)


# ---- routing ----


def plot_routing(models, path):
    """Each expert's share of a layer's (token, expert) choices: a panel per model and domain, with layers from left to
    right. The middle tone is an even share, the darkest twice that or more. models: entries of routing.json."""
    domains = list(models[0]["domains"])
    layers = len(models[0]["mutual_information"])
    heights = [0.26 * len(entry["experts"]) + 0.45 for entry in models]
    label = 0.085 * max(len(name) for entry in models for name in entry["experts"])
    few = layers <= MOST_NUMBERED
    size = label + max((0.36 if few else 0.11) * layers, 2.2) * len(domains) + 0.4, sum(heights) + 0.6
    layout = {"figsize": size, "squeeze": False, "height_ratios": heights}
    figure, axes = plt.subplots(len(models), len(domains), **layout)
    for entry, axis_line in zip(models, axes, strict=True):
        names = entry["experts"]
        darkest = 2 / len(names)
        for domain, axis in zip(domains, axis_line, strict=True):
            shares = np.array(entry["domains"][domain]["share"]).T  # (E, L)
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
            for (y, x), share in np.ndenumerate(shares) if few else ():
                ink = "white" if share > 0.7 * darkest else "black"
                axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
            axis.set_title(f"{entry['name']} reading {domain}", fontsize=9)
            numbered = range(0, layers, 1 if few else 5)
            axis.set_xticks(numbered, labels=numbered if entry is models[-1] else [], fontsize=8)
            axis.set_yticks(range(len(names)), labels=names if axis is axis_line[0] else [], fontsize=8)
            axis.tick_params(length=0)
    figure.supxlabel("layer", fontsize=9)
    figure.suptitle("share of the routers' choices (%)", fontsize=10)
    save(figure, path)


# ---- several chains and variants ----


def plot_differences(chains, columns, path):
    """How far each row is behind BTX (to the right) or ahead of it, within each chain: the mean over the chains and its
    95 % interval. chains: a list of rows for each; columns: {label: (metric, name)}. Leaves out rows that are too far
    behind to matter (single experts, models that were not finetuned); others beyond the edge become arrows."""
    names = [row["name"] for row in chains[0] if kind(row) not in ("btx", "expert", "soup", "mixed")]
    rows = math.ceil(len(columns) / 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9, rows * (0.26 * len(names) + 1)), sharey=True, squeeze=False)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, (label, (metric, column)) in zip(axes.flat, columns.items(), strict=False):
        found = [difference(chains, name, metric, column) for name in names]
        edge = 5 * statistics.median(abs(ahead) for ahead, _ in found)
        for y, (ahead, half) in enumerate(found):
            colour = "#777777" if abs(ahead) <= half else COLOURS[0] if ahead > 0 else COLOURS[1]
            plot_point(axis, ahead, y, half, edge, digits=2, color=colour, marker="o")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("BTX worse  ←  →  BTX better", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    name_rows(axes[0, 0], [in_words(name) for name in names])
    save(figure, path)


# the rows of plot_efficiency; the others would overlap with these
EFFICIENT = {name: WORDS[name].replace(", same FLOPs", "") for name in WORDS if name.endswith("-cm")}
EFFICIENT |= {name: WORDS[name] for name in ("seed", "upcycle-dm", "btx", "btx-paper", "btx-even", "btx-sample")}
EFFICIENT["btm-share"] = "ensemble, fixed share, of BTX's branches"


def plot_efficiency(rows, path):
    """Scores against the parameters that a token uses at inference, a dot for each row of EFFICIENT: the larger the
    dot, the more training FLOPs. Top: the mean of bits per byte on text of one domain and where domains meet; bottom:
    multiple choice. Up is better in both; a model far worse than the seed is at the edge, with its number. rows:
    compare.json's."""
    rows = [row for row in rows if row["name"] in EFFICIENT]
    panels = {"bits per byte: the mean of one domain and of where domains meet": mean_bits}
    if all(row.get("choice") for row in rows):
        panels["choices right, %"] = lambda row: 100 * row["choice"]["avg"]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 4.5 * len(panels)), squeeze=False, sharex=True)
    most = max(row["train_flops"] for row in rows)
    counts = [row["active_params"] for row in rows]
    for axis, (label, score) in zip(axes.flat, panels.items(), strict=True):
        labels = []  # (parameters, scores, names): dots that nearly touch share one
        scores = {row["name"]: score(row) for row in rows}
        worst = max(scores.values())
        if score is mean_bits and "seed" in scores:
            worst = 1.2 * scores["seed"] - 0.2 * min(scores.values())
        grain = (min(worst, max(scores.values())) - min(scores.values())) / 28
        for row in sorted(rows, key=lambda row: scores[row["name"]]):
            name, x, y = row["name"], row["active_params"], min(worst, scores[row["name"]])
            words = EFFICIENT[name] if y == scores[name] else f"{EFFICIENT[name]}: {scores[name]:.2f}"
            family = next(i for i, start in enumerate(FAMILIES) if name.startswith(start))
            style = {"color": COLOURS[family], "marker": MARKERS[family], "alpha": 0.7}
            axis.scatter(x, y, s=120 * row["train_flops"] / most, **style)
            near = [label for label in labels if label[0] == x and y - label[1][-1] <= grain]
            if not near:
                labels.append((x, [], []))
            _, heights, names = (near or labels)[-1]
            heights.append(y)
            names.append(words)
        for x, heights, names in labels:
            names = names if score is mean_bits else names[::-1]  # in their order, from the top
            axis.annotate(
                "\n".join(names),
                (x, statistics.mean(heights)),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        log_axis(axis.xaxis, min(counts) / 1.15, max(counts) * 2.2)
        axis.xaxis.set_major_formatter(lambda value, _: short(value))
        if score is mean_bits:
            axis.invert_yaxis()
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("parameters per token at inference")
    save(figure, path)


def mean_bits(row):
    """A row's bits per byte: the mean over text of one domain and, if it has them, windows that switch domain."""
    averages = [row[metric]["avg"] for metric in ("bpb", "spliced") if row.get(metric)]
    return statistics.mean(averages)


def plot_regime(lines, path):
    """BTX's lead in bits per byte against training tokens per parameter: a panel for each rival, a line for each width.
    Above zero BTX is ahead; the shade is the 95 % interval. lines: from study.regime.lines_of."""
    rivals = list(dict.fromkeys(line["rival"] for line in lines))
    widths = list(dict.fromkeys(line["width"] for line in lines))
    figure, panels = plt.subplots(1, len(rivals), figsize=(4.2 * len(rivals), 3.6), sharey=True, squeeze=False)
    for line in lines:
        panel = panels[0][rivals.index(line["rival"])]
        i = widths.index(line["width"])
        panel.plot(line["x"], line["lead"], label=f"width {line['width']}", color=COLOURS[i], marker=MARKERS[i])
        lead, half = np.array(line["lead"]), np.array(line["half"])
        panel.fill_between(line["x"], lead - half, lead + half, color=COLOURS[i], alpha=0.12, linewidth=0)
    for rival, panel in zip(rivals, panels[0], strict=True):
        x = [value for line in lines for value in line["x"]]
        log_axis(panel.xaxis, 0.5 * min(x), 2 * max(x))
        panel.set_title(f"against {in_words(rival)}", fontsize=10)
        panel.set_xlabel("training tokens per parameter")
        panel.axhline(0, color="black", linewidth=0.8)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("BTX ahead by, bits per byte")
    panels[0][0].legend(frameon=False)
    save(figure, path)


def plot_ablations(rows, path):
    """Average bits per byte of every row, best first, with the spread over random seeds; two lines mark top-2 at the
    two budgets. Rows far behind the others become arrows at the edge."""
    rows = sorted(rows, key=lambda row: row["bpb"]["avg"])
    values = [row["bpb"]["avg"] for row in rows]
    edge = values[0] + 4 * (values[len(values) // 2] - values[0]) + 0.02
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.2))
    kinds = {False: (COLOURS[0], "o", "-", "short finetuning"), True: (COLOURS[1], "s", "--", "long finetuning")}
    for long, (colour, marker, line, label) in kinds.items():
        axis.plot([], [], color=colour, marker=marker, linestyle="", label=label)
        base = bases_of(rows)[long]
        axis.axvline(base["bpb"]["avg"], color=colour, linestyle=line, linewidth=0.8, zorder=0)
    for y, row in enumerate(rows):
        colour, marker, *_ = kinds[row["long"]]
        plot_point(axis, values[y], y, row["std"]["bpb"]["avg"], edge, digits=3, color=colour, marker=marker)
    name_rows(axis, [row["name"] for row in rows])
    axis.set_xlabel(f"average bits per byte (lower is better); lines: {BASE}")
    axis.legend(frameon=False, loc="upper right")
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def plot_damage(found, path):
    """Bits per byte on the experts' domains, with each group of tensors replaced by the models' average or the seed's.
    found: the groups of damage.json."""
    labels = list(found)
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(labels) + 1.2))
    for i, (source, words) in enumerate({"averaged": "the average of all models", "seed": "the seed's"}.items()):
        values = [found[label][source]["avg"] for label in labels]
        style = {"color": COLOURS[1 - i], "marker": MARKERS[i], "linestyle": "", "label": f"replaced by {words}"}
        axis.plot(values, [y + 0.16 * i for y in range(len(labels))], **style)
    axis.axvline(found["nothing"]["averaged"]["avg"], color="#999999", linewidth=0.8, zorder=0)
    name_rows(axis, labels)
    axis.set_xlabel("bits per byte of the experts at home, averaged (the line: nothing replaced)")
    axis.legend(frameon=False, loc="lower right", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def plot_drift(points, path):
    """What branches gain and how much of it averaging loses, against how far they moved. points: {size: [point]}, from
    study.drift.point_of: "seed", "branch" and "averaged" in bits per byte, "lost" the share, "drift"."""
    figure, (bits, share) = plt.subplots(1, 2, figsize=(10, 4.4))
    for i, (size, some) in enumerate(points.items()):
        for j, rate in enumerate(sorted({point["rate"] for point in some})):
            style = {"color": COLOURS[i], "marker": MARKERS[j], "alpha": 0.85}
            line = sorted((point for point in some if point["rate"] == rate), key=lambda point: point["drift"])
            x = [point["drift"] for point in line]
            gained = [point["seed"] - point["branch"] for point in line]
            bits.plot(x, gained, linestyle=":", markerfacecolor="none", **style)
            bits.plot(x, [point["averaged"] - point["branch"] for point in line], **style)
            line = [point for point in line if point["lost"] is not None]
            x, y = ([point[name] for point in line] for name in ("drift", "lost"))
            share.plot(x, y, label=f"{size}, learning rate {rate:g}", **style)
            for point in line:
                place = {"textcoords": "offset points", "xytext": (5, -9), "fontsize": 7}
                share.annotate(str(point["steps"]), (point["drift"], point["lost"]), **place)
    bits.set_yscale("symlog", linthresh=0.001)
    bits.set_ylabel("bits per byte gained (hollow), lost (solid)")
    share.axhline(1, color="#999999", linewidth=0.8, linestyle="--")
    share.set_ylabel("lost share of the gain (numbers: steps)")
    share.legend(frameon=False, fontsize=8)
    for axis in (bits, share):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("drift of what mixing averages, |branch - seed| / |seed|")
        axis.grid(alpha=0.3)
    save(figure, path)


def plot_experts_per_token(found, path):
    """Bits per byte, and speed, against the number of experts per token. found: "top_k" of open_ends.json."""
    figure, (score, speed) = plt.subplots(1, 2, figsize=(9, 3.4))
    ks = [int(k) for k in found["speed"]]
    for i, column in enumerate(found["rows"]["top-1"]):
        style = {"color": COLOURS[i], "linestyle": STYLES[i], "marker": MARKERS[i], "label": column}
        at_two = found["rows"]["top-2"][column]["mean"]
        score.plot(ks, [found["rows"][f"top-{k}"][column]["mean"] - at_two for k in ks], **style)
    score.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    score.set(xlabel="experts per token", ylabel="bits per byte, less those of top-2", xticks=ks)
    score.legend(frameon=False, fontsize=9)
    speed.plot(ks, list(found["speed"].values()), color=COLOURS[6], marker="o")
    speed.set(xlabel="experts per token", ylabel="thousand tokens a second, one thread", xticks=ks)
    speed.set_ylim(bottom=0)
    for axis in (score, speed):
        axis.grid(alpha=0.3)
    save(figure, path)
