"""What study/regime.py measured, as tables and lines: BTX's lead over its rivals with intervals, and the published law.

A point is an entry of regime.json: a width, a scale, domains and a share, and under "chains" the rows of each random
seed. Leads are in bits per byte, positive where BTX is ahead.
"""

import math
import statistics

from study.tables import BITS, METRICS, T_95, bold, difference, markdown_table, mean_and_std, short

ROWS = "btx", "upcycle-cm", "dense-cm"
RIVALS = {"upcycle-cm": "upcycling", "dense-cm": "dense"}
AXES = "budget", "share", "domains"
TASKS = "choice", "switched", "accuracy"  # of points that were asked problems
# Liew, Kato and Takase 2025 (arXiv 2502.03009), equation 12 with the numbers of table 2
LAW_DENSE = {"scale": 8.83, "tokens": 0.088, "parameter_scale": 12.3, "parameters": 0.116}
LAW_UPCYCLED = {"scale": 16.3, "seed": 0.043, "tokens": 0.085, "interaction": 7.98e-4}
LAW_UPCYCLED |= {"parameter_scale": 8.53, "parameters": 0.112}
LAW_FLOOR = 0.165


def on_axis(points, axis):
    """The points of one axis in order. The other axes' contain the one of the budgets' that they vary."""
    chosen = [point for point in points if point["axis"] == axis]
    if axis != "budget" and chosen:
        base = chosen[0]["width"], chosen[0]["scale"]
        chosen += [p for p in points if p["axis"] == "budget" and (p["width"], p["scale"]) == base]
    return sorted(chosen, key=lambda point: (point["width"], place(axis, point)))


def place(axis, point):
    """Where a point stands on an axis."""
    return {
        "budget": point["tokens_per_parameter"],
        "share": point["share"],
        "domains": len(point["domains"]),
    }[axis]


# ---- leads ----


def pooled(points, rival, metric):
    """(standard deviation of BTX's lead within a point, degrees of freedom), pooled over the points that have two
    random seeds or more, as one point has too few of them; (0, 0) where none has."""
    squares, freedom = 0.0, 0
    for point in points:
        leads = [difference([rows], rival, metric, "avg")[0] for rows in point["chains"]]
        if len(leads) > 1:
            squares += statistics.variance(leads) * (len(leads) - 1)
            freedom += len(leads) - 1
    return (squares / freedom) ** 0.5 if freedom else 0.0, freedom


def lines_of(points):
    """The lines of regime.png: [{"axis", "rival", "text", "width", "x", "lead", "half"}]. lead: BTX's, averaged over
    random seeds; half: half of its 95 % interval, from the deviation pooled over all points."""
    lines = []
    for axis in AXES:
        chosen = on_axis(points, axis)
        for rival in RIVALS:
            for metric in BITS:
                deviation, freedom = pooled(points, rival, metric)
                quantile = T_95[min(freedom, len(T_95)) - 1] if freedom else 0.0
                for width in dict.fromkeys(point["width"] for point in chosen):
                    some = [point for point in chosen if point["width"] == width]
                    line = {"axis": axis, "rival": rival, "text": metric, "width": width}
                    line["x"] = [place(axis, point) for point in some]
                    line["lead"] = [difference(point["chains"], rival, metric, "avg")[0] for point in some]
                    line["half"] = [quantile * deviation / len(point["chains"]) ** 0.5 for point in some]
                    lines.append(line)
    return lines


def lead(chains, rival, metric):
    """'+0.012' with one random seed; '+0.012 ± 0.020' with several, bold where the 95 % interval excludes zero. Tasks
    in points: '+12.3 ± 4.5'."""
    scale, digits = (1, 3) if metric in BITS else (100, 1)
    ahead, half = (scale * number for number in difference(chains, rival, metric, "avg"))
    if len(chains) == 1:
        return f"{ahead:+.{digits}f}"
    return bold(f"{ahead:+.{digits}f} ± {half:.{digits}f}", abs(ahead) > half)


def regime_table(points, axis, metrics=BITS):
    """One axis: BTX's scores, and how far it is ahead of its rivals."""
    header = ["width", "scale", "domains", "branches' share", "parameters", "tokens per parameter", "random seeds"]
    for metric in metrics:
        header += [f"BTX, {METRICS[metric]}", *(f"ahead of {words}" for words in RIVALS.values())]
    body = []
    for point in on_axis(points, axis):
        chains = point["chains"]
        scores = mean_and_std([next(row for row in rows if row["name"] == "btx") for rows in chains])
        cells = [str(point["width"]), f"{point['scale']:g}", " ".join(point["domains"]), f"{point['share']:.0%}"]
        cells += [short(point["parameters"]), f"{point['tokens_per_parameter']:.0f}", str(len(chains))]
        for metric in metrics:
            style = ".3f" if metric in BITS else ".1%"
            cells += [f"{scores[metric]['avg']:{style}}", *(lead(chains, rival, metric) for rival in RIVALS)]
        body.append(cells)
    return markdown_table(header, body)


# ---- the published law of upcycling ----


def law_dense(tokens, parameters):
    """Loss of a dense model after so many tokens, in nats per token of their data."""
    law = LAW_DENSE
    by_tokens = law["scale"] * tokens ** -law["tokens"]
    return by_tokens + law["parameter_scale"] * parameters ** -law["parameters"] + LAW_FLOOR


def law_upcycled(before, after, parameters):
    """Loss of a mixture upcycled from a dense model of so many parameters, trained on `before` tokens, after `after`
    more: A D1^-a1 D2^(-a2 + a3 ln D1) + B N^-b + E. The longer the seed's training, the flatter in D2."""
    law, flatter = LAW_UPCYCLED, LAW_UPCYCLED["interaction"]
    by_tokens = law["scale"] * before ** -law["seed"] * after ** (flatter * math.log(before) - law["tokens"])
    return by_tokens + law["parameter_scale"] * parameters ** -law["parameters"] + LAW_FLOOR


def law_table(points):
    """Upcycling's lead over dense training at equal FLOPs, measured and by the law, in per cent of the loss."""
    header = ["width", "scale", "seed's tokens", "upcycling's", "dense training's", "measured", "by the law"]
    body = []
    for point in on_axis(points, "budget"):
        dense, upcycled = (
            [next(row for row in rows if row["name"] == name) for rows in point["chains"]]
            for name in ("dense-cm", "upcycle-cm")
        )
        before, after, longer = dense[0]["seed_tokens"], upcycled[0]["tokens"], dense[0]["tokens"]
        of_dense, of_upcycled = (statistics.mean(row["bpb"]["avg"] for row in rows) for rows in (dense, upcycled))
        law = law_dense(before + longer, point["parameters"])
        found = [1 - of_upcycled / of_dense, 1 - law_upcycled(before, after, point["parameters"]) / law]
        tokens = (short(count) for count in (before, after, longer))
        body.append([str(point["width"]), f"{point['scale']:g}", *tokens, *(f"{share:+.1%}" for share in found)])
    return markdown_table(header, body)


def all_tables(points):
    """The tables of docs/regime.md, {name: Markdown}."""
    tables = {axis: regime_table(points, axis) for axis in AXES if on_axis(points, axis)}
    asked = [point for point in points if "choice" in point["chains"][0][0]]
    tables |= {f"{axis}, tasks": regime_table(asked, axis, TASKS) for axis in AXES if on_axis(asked, axis)}
    return {**tables, "law": law_table(points)}
