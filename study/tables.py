"""Every table of the studies, and what they share: formats, means over random seeds, what "dead" and "at home" mean.

Nothing is computed on models here: rows are those of results.json, which eval.py writes, or means over several of them.
"""

import statistics

from common.run import changed_files, read_run

DEAD = 0.01  # an expert that gets a smaller share of a layer's choices is dead
AT_HOME = 3  # percent: how much worse than an expert a model may be in the expert's own domain
METRICS = {  # of a row of results.json, in the order of the tables
    "bpb": "bits per byte",
    "spliced": "spliced bits per byte",
    "accuracy": "task accuracy",
    "choice": "choice accuracy",
    "switched": "choice accuracy after other text",
    "edit_similarity": "edit similarity",
}
SHORT = {"switched": "choice after other text"}  # in tables
BITS = ("bpb", "spliced")  # lower is better; of the others higher
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided 95 %, 1 to 9 degrees of freedom
COUNTS = {
    "active_params": "active params",
    "total_params": "total params",
    "train_tokens": "training tokens",
    "train_flops": "training FLOPs",
}
ORDER = (  # of the comparison's rows, the paper's
    *("seed", "expert", "dense-dm", "dense-cm", "dense-tm", "upcycle-dm", "upcycle-cm", "upcycle-tm", "soup"),
    *("btm-top1", "btm-top2", "btm-posterior", "btm-posterior-prefix"),
    *("btm-top1-cm", "btm-top2-cm", "btm-posterior-cm", "btm-posterior-prefix-cm"),
    *("mixed", "btx", "btx-even", "btx-paper", "btx-sample"),
)
BASE = "top-2"  # the ablation that every other one is held against


# ---- formats ----


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


def format_score(row, metric, name):
    """'0.794' or '17.6%'."""
    return f"{row[metric][name]:{'.3f' if metric in BITS else '.1%'}}"


def plus_minus(row, metric, name):
    """'0.794 ± 0.005' or '17.6% ± 2.3%' from a row with "std"; '0.794' or '17.6%' from one without."""
    deviation = f" ± {format_score(row['std'], metric, name)}" if "std" in row else ""
    return format_score(row, metric, name) + deviation


def yes_or_no(holds, text):
    return f"- {'yes' if holds else '**no**'}: {text}"


def versions_line(found, where):
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"\nMade with {versions}; data and settings are in {where}."


# ---- definitions ----


def add_average(row):
    """Put the mean of what a row of results.json recalled beside its parts, under "avg" as the other scores have it."""
    recalled = row["accuracy"].values()
    row["accuracy"]["avg"] = sum(recalled) / max(1, len(recalled))


def mean_and_std(rows):
    """{metric: {name: mean}} of several rows of results.json that differ in a random seed, and the same form of
    standard deviations (of a sample; 0 for a single row) under "std"."""

    def over(metric, name, of):
        values = [row[metric][name] for row in rows]
        return of(values) if of is statistics.mean or len(values) > 1 else 0.0

    def all_scores(of):
        return {m: {name: over(m, name, of) for name in rows[0][m]} for m in METRICS if m in rows[0]}

    return {**all_scores(statistics.mean), "std": all_scores(statistics.stdev)}


def dead_experts(load):
    """For each layer, the numbers of its dead experts: those that get less than DEAD of its choices.

    load: {domain: L x E shares of a layer's (token, expert) choices}; domains count equally.
    """
    layers = zip(*load.values(), strict=True)  # L tuples of the domains' E shares
    shares = [[statistics.mean(expert) for expert in zip(*layer, strict=True)] for layer in layers]
    return [[e for e, share in enumerate(layer) if share < DEAD] for layer in shares]


def home_lines(rows):
    """How close BTX is to each expert at home: whether mixing keeps what the experts learned."""
    named = {row["name"]: row for row in rows}
    lines = []
    for name, row in named.items() if "btx" in named else ():
        domain = name.removeprefix("expert-")
        if name != domain and domain in row["bpb"]:
            ours, theirs = named["btx"]["bpb"][domain], row["bpb"][domain]
            text = f"btx is within {AT_HOME} % of {name} at home ({ours:.3f} and {theirs:.3f})"
            lines.append(yes_or_no(ours <= (1 + AT_HOME / 100) * theirs, text))
    return lines


# ---- rows made before the source changed ----
#
# They are marked when a page is made, under "stale" of its JSON: the same JSON gives the same page at any later time.


def stale_files(row):
    """Which source files have changed since a row of results.json was scored, or since any leg of the runs behind it
    that are still on disk; None where one of these has no record of its source."""
    legs = [row.get("source")]
    for record in map(read_run, row["runs"]):
        if record is not None:
            legs += [leg["files"] for leg in record.get("source", [{"files": {}}])]
    if not all(legs):
        return None
    return sorted({name for files in legs for name in changed_files(files)})


def mark_stale(row):
    """Put stale_files of a row of results.json under its "stale"."""
    row["stale"] = stale_files(row)


def stale_together(rows):
    """What is stale of a row that is made of these: the files of all of them, or None if one of them has None."""
    found = [row.get("stale", []) for row in rows]
    return None if None in found else sorted({name for files in found for name in files})


def with_dagger(text, row):
    """A row's name as tables show it; a row that no page has marked counts as made today."""
    return text if row.get("stale", []) == [] else f"{text} †"


def stale_line(rows):
    """The line below a table that explains its daggers; empty where there are none."""
    files = stale_together([row for row in rows if row.get("stale")])
    reasons = [f"{', '.join(files)} changed"] if files else []
    if stale_together(rows) is None:
        reasons.append("the source was recorded")
    return f"\n\n† made before {', or before '.join(reasons)}" if reasons else ""


# ---- scores ----


def columns_of(rows):
    """[(metric, name)], the scores that rows have: names are domains, tasks, or pairs of domains."""
    return [(metric, name) for metric in METRICS for name in rows[0].get(metric, {})]


def main_columns(rows):
    """The scores that a page shows: bits per byte by domain, averages of the rest, and the facts recalled."""
    main = [(metric, "avg") for metric in ("spliced", "choice", "switched")] + [("accuracy", "wiki")]
    return [column for column in columns_of(rows) if column[0] == "bpb" or column in main]


def score_table(rows, counts=(), columns=None):
    """A row per model, the best of each score column in bold; then the given columns of COUNTS. A row that was made
    before the source changed has a dagger, which is explained below the table."""
    columns = columns or columns_of(rows)
    best = {(m, n): (min if m in BITS else max)(row[m][n] for row in rows) for m, n in columns}
    body = []
    for row in rows:
        cells = [bold(plus_minus(row, m, n), row[m][n] == best[m, n]) for m, n in columns]
        body.append([with_dagger(row["name"], row), *cells, *(short(row[name]) for name in counts)])
    names = [f"{n} {SHORT.get(m, m.replace('_', ' '))}" for m, n in columns]
    return markdown_table(["model", *names, *(COUNTS[name] for name in counts)], body) + stale_line(rows)


def headline_table(rows):
    """The table that run.sh ends with and README starts with: one row per way to spend the compute. rows: of
    results.json or compare.json; those that are there."""
    named = {row["name"]: row for row in rows}
    shown = {
        "seed": "seed model",
        "dense-cm": "dense training",
        "upcycle-cm": "sparse upcycling",
        "btm-posterior-prefix": "Branch-Train-Merge",
        "btx": "**Branch-Train-MiX**",
    }
    columns = {
        ("bpb", "avg"): "bits per byte",
        ("choice", "avg"): "choices right",
        ("accuracy", "wiki"): "facts recalled",
    }
    columns = {column: words for column, words in columns.items() if all(_has(row, column) for row in rows)}
    body = []
    for name, words in shown.items():
        if name in named:
            scores = [format_score(named[name], *column) for column in columns]
            body.append([with_dagger(words, named[name]), *scores, short(named[name]["active_params"])])
    table = markdown_table(["", *columns.values(), "parameters per token"], body)
    return table + stale_line([named[name] for name in shown if name in named])


def _has(row, column):
    metric, name = column
    return name in row.get(metric, {})


def baseline_lines(baselines):
    """What each task's score is without knowing anything: one line per task and metric."""
    return [
        f"- {domain} {metric.replace('_', ' ')}: " + ", ".join(f"{name} {score:.1%}" for name, score in scores.items())
        for domain, metrics in baselines.items()
        for metric, scores in metrics.items()
    ]


# ---- the pipeline's report ----


def run_table(folders):
    """What each training run cost by itself. folders: {folder: run.json}."""
    body = []
    for folder, run in folders.items():
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
    if seed and "mixed" in named:  # the gate of docs/mixing.md
        ours, theirs = named["mixed"]["bpb"]["avg"], seed["bpb"]["avg"]
        found.append((ours <= theirs, "the mixture is no worse than the seed before it is finetuned", ours, theirs))
    for name, row in named.items() if btx else ():
        if name != "btx":
            ours, theirs = btx["bpb"]["avg"], row["bpb"]["avg"]
            found.append((ours < theirs, f"btx beats {name} on average", ours, theirs))
    return [yes_or_no(holds, f"{what} ({a:.3f} and {b:.3f})") for holds, what, a, b in found] + home_lines(rows)


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


# ---- the comparison ----


def kind(row):
    """The row's place in ORDER: its name, without the domain."""
    return "expert" if row["name"].startswith("expert-") else row["name"]


def in_order(rows):
    """Rows in the paper's order, experts as they come; rows of other names last."""
    return sorted(rows, key=lambda row: ORDER.index(kind(row)) if kind(row) in ORDER else len(ORDER))


def cost_table(rows):
    """What each row cost, from the seed on."""
    body = []
    for row in rows:
        body.append([with_dagger(row["name"], row), *(short(row[name]) for name in COUNTS), f"{row['seconds']:.0f}"])
    return markdown_table(["model", *COUNTS.values(), "seconds, summed"], body) + stale_line(rows)


def difference(chains, name, metric, column, ours="btx"):
    """(how far BTX is ahead of the row `name`, half the width of the 95 % interval), from the rows of each chain.

    Differences are taken within a chain, whose rows share a seed model and its luck: a paired comparison. With one
    chain there is no interval (0).
    """
    ahead = []
    for rows in chains:
        named = {row["name"]: row for row in rows}
        sign = -1 if metric in BITS else 1
        ahead.append(sign * (named[ours][metric][column] - named[name][metric][column]))
    n = len(ahead)
    if n == 1:
        return ahead[0], 0.0
    return statistics.mean(ahead), T_95[min(n - 2, len(T_95) - 1)] * statistics.stdev(ahead) / n**0.5


def verdict(chains, name, metric, column, ours="btx"):
    """'ahead by 0.012 ± 0.004', '**behind by ...**' or 'tie (+0.001 ± 0.004)': a tie is an interval that holds zero."""
    ahead, half = difference(chains, name, metric, column, ours)
    scale, digits, unit = (1, 3, "") if metric in BITS else (100, 1, " points")
    if abs(ahead) <= half:
        return f"tie ({scale * ahead:+.{digits}f} ± {scale * half:.{digits}f}{unit})"
    size = f"{abs(scale * ahead):.{digits}f} ± {scale * half:.{digits}f}{unit}"
    return f"ahead by {size}" if ahead > 0 else f"**behind by {size}**"


def share_at_par(ours, theirs):
    """The share of spliced windows at which two rows have equal bits per byte; None where one is always ahead.

    With a share p of spliced windows a row has (1 - p) of its bits per byte on pure windows and p of those on spliced.
    """
    pure, spliced = (ours[metric]["avg"] - theirs[metric]["avg"] for metric in BITS)
    return pure / (pure - spliced) if pure * spliced < 0 else None


def crossing_lines(rows):
    """From which share of spliced windows on BTX is ahead of rows that are better on pure ones."""
    named, lines = {row["name"]: row for row in rows}, []
    for ours in (name for name in ("btx", "btx-even") if name in named):
        shares = {row["name"]: share_at_par(named[ours], row) for row in rows if "bpb" in row and "spliced" in row}
        better = [name for name in shares if shares[name] and named[name]["bpb"]["avg"] < named[ours]["bpb"]["avg"]]
        lines += [f"- {ours} has fewer bits than {name} from {shares[name]:.1%} on" for name in better]
    return lines


def verdict_table(rows, chains, ours="btx"):
    """BTX, or another row of its kind, against every row that may hold all domains: on the averages first. Daggers are
    explained below the page's table of scores."""
    columns = main_columns(rows)
    columns.sort(key=lambda column: column[1] != "avg")
    others = [row for row in rows if kind(row) not in ("btx", "expert") and row["name"] != ours]
    body = []
    for row in others:
        verdicts = [verdict(chains, row["name"], *column, ours) for column in columns]
        body.append([with_dagger(row["name"], row), *verdicts])
    return markdown_table([f"{ours} against", *(f"{name} {METRICS[metric]}" for metric, name in columns)], body)


# ---- the ablations ----


def tie_width(rows):
    """Twice the standard deviation over random seeds of the average bits per byte, pooled over all rows: with two or
    three of them a single row's own deviation is too uncertain. Smaller differences count as ties."""
    return 2 * statistics.mean(row["std"]["bpb"]["avg"] ** 2 for row in rows) ** 0.5


def paper_verdict(row, base, tie):
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


def ablation_table(rows):
    columns = [(metric, name) for metric in ("bpb", "accuracy") for name in rows[0][metric]]
    header = ["variant", *(f"{name} {metric}" for metric, name in columns)]
    header += ["active params", "tokens/s", "dead experts", "paper", "order as in the paper"]
    body = []
    for row in rows:
        cells = [with_dagger(row["name"], row), *(plus_minus(row, *column) for column in columns)]
        cells += [short(row["active_params"]), short(row["tokens_per_second"])]
        cells += [" / ".join(map(str, row["dead_experts"])), str(row["paper"] or "")]
        body.append([*cells, paper_verdict(row, base_of(row, rows), tie_width(rows))])
    return markdown_table(header, body) + stale_line(rows)
