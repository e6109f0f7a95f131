"""Every table of the studies, and what they share: formats, means over random seeds, what "dead" and "at home" mean.

Nothing is computed on models here: rows are those of results.json, which eval.py writes, or means over several of them.
"""

import statistics

import numpy as np

from common.run import ancestors, changed_files, read_run

DEAD = 0.01  # an expert that gets a smaller share of a layer's choices is dead
AT_HOME = 3  # percent: how much worse than an expert a model may be in the expert's own domain
METRICS = {  # of a row of results.json, in the order of the tables
    "bpb": "bits per byte",
    "unread": "bits per byte, unread text",
    "spliced": "spliced bits per byte",
    "accuracy": "task accuracy",
    "choice": "choice accuracy",
    "switched": "choice accuracy after other text",
    "together": "choice accuracy, two experts needed",
    "together_written": "accuracy, two experts needed",
    "edit_similarity": "edit similarity",
}
SHORT = {"switched": "choice after other text", "together": "choice, two experts", "unread": "(unread)"}  # in tables
BITS = ("bpb", "unread", "spliced")  # lower is better; of the others higher
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided 95 %, 1 to 9 degrees of freedom
COUNTS = {
    "active_params": "active params",
    "total_params": "total params",
    "train_tokens": "training tokens",
    "train_flops": "training FLOPs",
}
WORDS = {  # the comparison's rows in the order of the tables, the paper's, and what pictures call them
    "seed": "seed",
    "expert": "expert",  # before it, its domain
    "dense-dm": "dense, same tokens",
    "dense-cm": "dense, same FLOPs",
    "dense-tm": "dense, same device time",
    "upcycle-dm": "upcycling, same tokens",
    "upcycle-cm": "upcycling, same FLOPs",
    "upcycle-tm": "upcycling, same device time",
    "soup": "average of all weights",
    "btm-top1": "ensemble, nearest expert",
    "btm-top2": "ensemble, two nearest",
    "btm-posterior": "ensemble, last token's posterior",
    "btm-posterior-prefix": "ensemble, prefix posterior",
    "btm-share": "ensemble, fixed share",
    "btm-top1-cm": "ensemble, nearest expert, same FLOPs",
    "btm-top2-cm": "ensemble, two nearest, same FLOPs",
    "btm-posterior-cm": "ensemble, last token's posterior, same FLOPs",
    "btm-posterior-prefix-cm": "ensemble, prefix posterior, same FLOPs",
    "btm-share-cm": "ensemble, fixed share, same FLOPs",
    "mixed": "mixture, not finetuned",
    "btx": "Branch-Train-MiX",
    "mixed-paper": "mixture as printed, not finetuned",
    "mixed-held": "mixture of feed-forward branches, not finetuned",
    "btx-held": "Branch-Train-MiX, feed-forward branches",
    "btx-even": "Branch-Train-MiX, half of it finetuning",
    "btx-paper": "Branch-Train-MiX as printed",
    "btx-sample": "Branch-Train-MiX, sample top-1",
}
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


def format_score(row, metric, name):
    """'0.794' or '17.6%'."""
    return f"{row[metric][name]:{'.3f' if metric in BITS else '.1%'}}"


def plus_minus(row, metric, name):
    """'0.794 ± 0.005' or '17.6% ± 2.3%' from a row with "std"; '0.794' or '17.6%' from one without."""
    deviation = f" ± {format_score(row['std'], metric, name)}" if "std" in row else ""
    return format_score(row, metric, name) + deviation


def claim(holds, text, ours, theirs):
    return f"- {'yes' if holds else '**no**'}: {text} ({ours:.3f} and {theirs:.3f})"


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
    mean, std = {}, {}
    for metric in METRICS:
        if metric in rows[0]:
            values = {name: [row[metric][name] for row in rows] for name in rows[0][metric]}
            mean[metric] = {name: statistics.mean(some) for name, some in values.items()}
            std[metric] = {name: statistics.stdev(some) if len(some) > 1 else 0.0 for name, some in values.items()}
    return {**mean, "std": std}


def dead_experts(load):
    """For each layer, the numbers of its dead experts: those that get less than DEAD of its choices.

    load: {domain: L x E shares of a layer's (token, expert) choices}; domains count equally.
    """
    shares = np.mean(list(load.values()), axis=0)  # (L, E)
    return [np.flatnonzero(layer < DEAD).tolist() for layer in shares]


def homes_of(bits):
    """{"expert-code": "code", ...}, of the experts whose domain is scored. bits: {row: {domain: bits per byte}}."""
    domains = {name: name.removeprefix("expert-") for name in bits if name.startswith("expert-")}
    return {name: domain for name, domain in domains.items() if domain in bits[name]}


def home_lines(rows):
    """How close BTX is to each expert at home: whether mixing keeps what the experts learned."""
    bits = {row["name"]: row["bpb"] for row in rows}
    lines = []
    for name, domain in homes_of(bits).items() if "btx" in bits else ():
        ours, theirs = bits["btx"][domain], bits[name][domain]
        close = ours <= (1 + AT_HOME / 100) * theirs
        lines.append(claim(close, f"btx is within {AT_HOME} % of {name} at home", ours, theirs))
    return lines


# ---- rows made before the source changed ----
#
# They are marked when a page is made, under "stale" of its JSON: the same JSON gives the same page at any later time.


def mark_stale(row):
    """Put under "stale" of a row of results.json which source files have changed since it was scored, or since any leg
    of the runs behind it that are still on disk; None where one of these has no record of its source."""
    legs = [row.get("source")]
    behind = dict.fromkeys(folder for run in row["runs"] for folder in ancestors(run))  # mixtures, too
    for record in map(read_run, behind):
        if record is not None:
            legs += [leg["files"] for leg in record.get("source", [{"files": {}}])]
    row["stale"] = sorted({name for files in legs for name in changed_files(files)}) if all(legs) else None


def stale_together(rows):
    """What is stale of a row that is made of these: the files of all of them, or None if one of them has None."""
    found = [row.get("stale", []) for row in rows]
    return None if None in found else sorted({name for files in found for name in files})


def with_dagger(row):
    """A row's name as tables show it; a row that no page has marked counts as made today."""
    return row["name"] if row.get("stale", []) == [] else f"{row['name']} †"


def stale_line(rows):
    """The line below a table that explains its daggers; empty where there are none."""
    files = stale_together([row for row in rows if row.get("stale")])
    reasons = [f"{', '.join(files)} changed"] if files else []
    if stale_together(rows) is None:
        reasons.append("the source was recorded")
    return f"\n\n† made before {', or before '.join(reasons)}" if reasons else ""


def model_table(header, rows, cells):
    """A line per row: its name, then cells(row), a list. Below the table stands what the daggers mean."""
    return markdown_table(header, [[with_dagger(row), *cells(row)] for row in rows]) + stale_line(rows)


# ---- scores ----


def columns_of(rows):
    """[(metric, name)], the scores that rows have: names are domains, tasks, or pairs of domains."""
    return [(metric, name) for metric in METRICS for name in rows[0].get(metric, {})]


def main_columns(rows):
    """The scores that a page shows: bits per byte by domain, averages of the rest, and the facts recalled."""
    averaged = "unread", "spliced", "choice", "switched", "together"
    main = [*((metric, "avg") for metric in averaged), ("accuracy", "wiki")]
    return [column for column in columns_of(rows) if column[0] == "bpb" or column in main]


def score_table(rows, counts=(), columns=None):
    """A row per model, the best of each score column in bold; then the given columns of COUNTS."""
    columns = columns or columns_of(rows)
    best = {(m, n): (min if m in BITS else max)(row[m][n] for row in rows) for m, n in columns}
    best = {(m, n): value for (m, n), value in best.items() if any(row[m][n] != value for row in rows)}

    def cells(row):
        scores = [(plus_minus(row, m, n), row[m][n] == best.get((m, n))) for m, n in columns]
        return [f"**{text}**" if wins else text for text, wins in scores] + [short(row[name]) for name in counts]

    names = [f"{n} {SHORT.get(m, m.replace('_', ' '))}" for m, n in columns]
    return model_table(["model", *names, *(COUNTS[name] for name in counts)], rows, cells)


def resampled(ours, theirs, metric, draws=10_000):
    """(how many bits per byte `ours` is ahead, the ends of the interval that holds 95 % of the differences when windows
    are drawn anew, with replacement, each domain for itself): what the choice of text leaves open. It does not know of
    another random seed. The same windows count for both rows. ours, theirs: rows of results.json."""
    random = np.random.default_rng(0)
    ahead, drawn = [], []
    for domain in (name for name in ours[metric] if name != "avg"):
        sizes = np.array(ours["bytes"][domain])  # (N,)
        saved = np.array(theirs["bits"][domain]) - np.array(ours["bits"][domain])  # (N,)
        chosen = random.integers(len(sizes), size=(draws, len(sizes)))
        ahead.append(saved.sum() / sizes.sum())
        drawn.append(saved[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))  # (draws,)
    return statistics.mean(ahead), *np.percentile(np.mean(drawn, axis=0), (2.5, 97.5))


def resampled_table(rows, ours="btx"):
    """How far a row is ahead of each other one on text that was read and that was not, with resampled's intervals."""
    [own] = [row for row in rows if row["name"] == ours]
    metrics = [metric for metric in ("bpb", "unread") if metric in own]

    def cell(row, metric):
        ahead, low, high = resampled(own, row, metric)
        text = f"{ahead:+.3f} ({low:+.3f} to {high:+.3f})"
        return text if low <= 0 <= high else f"**{text}**"

    body = [[with_dagger(row), *(cell(row, metric) for metric in metrics)] for row in rows if row is not own]
    return markdown_table([f"{ours} is ahead of", *(METRICS[metric] for metric in metrics)], body)


def headline_table(rows):
    """The table that run.sh ends with and README starts with: one row per way to spend the compute. rows: of
    results.json; those that are there."""
    shown = {
        "seed": "seed model",
        "dense-cm": "dense training",
        "upcycle-cm": "sparse upcycling",
        "btm-posterior-prefix": "Branch-Train-Merge",
        "btx": "**Branch-Train-MiX**",
    }
    metrics = ("bpb", "unread", "spliced", "choice", "accuracy")
    return named_table(rows, shown, metrics, ("active_params", "train_flops"))


def comparison_table(rows):
    """The same of a comparison, with those that are ahead of BTX, and BTX in both forms. rows: of compare.json."""
    spent = {row["name"]: row["train_flops"] for row in rows}
    spent = {name: flops - spent["seed"] for name, flops in spent.items()}
    more = spent.get("upcycle-dm", 0) / spent["upcycle-cm"]
    shown = {
        "seed": "seed model",
        "dense-cm": "dense training",
        "upcycle-cm": "sparse upcycling",
        "upcycle-dm": f"sparse upcycling, {more:.1f} times the FLOPs",
        "btm-top1-cm": "Branch-Train-Merge, the nearest expert",
        "btm-share-cm": "Branch-Train-Merge, all experts",
        "btx-paper": "**Branch-Train-MiX as printed**",
        "btx": "**Branch-Train-MiX, branches train feed-forwards alone**",
    }
    return named_table(rows, shown, ("bpb", "spliced", "choice", "accuracy"), ("active_params", "train_flops"))


def named_table(rows, shown, metrics, counts):
    """A table of some rows in plain words. shown: {row: what to call it}; metrics: of METRICS, those that rows have,
    averages but for accuracy, which is of facts; counts: of COUNTS, those that all rows have (a published
    seed's FLOPs are unknown)."""
    words = {
        "bpb": "bits per byte",
        "unread": "unread text",
        "spliced": "where domains meet",
        "choice": "choices right",
        "accuracy": "facts recalled",
    }
    columns = {(metric, "wiki" if metric == "accuracy" else "avg"): words[metric] for metric in metrics}
    columns = {column: name for column, name in columns.items() if column in columns_of(rows)}
    named = {row["name"]: row for row in rows}
    rows = [{**named[name], "name": words} for name, words in shown.items() if name in named]
    heads = {"active_params": "parameters per token", "train_flops": "training FLOPs"}
    counts = [name for name in counts if all(row[name] for row in rows)]

    def cells(row):
        return [*(format_score(row, *column) for column in columns), *(short(row[name]) for name in counts)]

    return model_table(["", *columns.values(), *(heads[name] for name in counts)], rows, cells)


def question_table(found):
    """Questions that lm_eval asked: right answers, by the likelihood of a choice per character, and one standard error.
    found: {model: {task: [share, standard error]}}."""
    tasks = list(next(iter(found.values())))
    body = [[name, *(f"{scores[t][0]:.1%} ± {scores[t][1]:.1%}" for t in tasks)] for name, scores in found.items()]
    return markdown_table(["model", *tasks], body)


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
        speed = short(cost["tokens"] / cost["seconds"]) if cost["seconds"] else "-"
        body.append([folder, short(cost["tokens"]), short(cost["flops"]), f"{cost['seconds']:.0f}", speed])
    return markdown_table(["run", "tokens", "FLOPs", "seconds", "tokens/s"], body)


def claims(rows):
    """What the BTX paper would lead one to expect, each with the numbers and whether they bear it out."""
    bits = {row["name"]: row["bpb"] for row in rows}
    lines = []
    for name, home in homes_of(bits).items() if "seed" in bits else ():
        ours, theirs = bits[name][home], bits["seed"][home]
        lines.append(claim(ours < theirs, f"{name} beats the seed at home", ours, theirs))
        away = [domain for domain in bits[name] if domain not in (home, "avg")]
        ours, theirs = (sum(bits[one][domain] for domain in away) / max(1, len(away)) for one in (name, "seed"))
        lines.append(claim(ours > theirs, f"{name} loses to the seed away from home", ours, theirs))
    averages = {name: scores["avg"] for name, scores in bits.items()}
    if {"seed", "mixed"} <= averages.keys():  # the gate of docs/mixing.md
        text = "the mixture is no worse than the seed before it is finetuned"
        lines.append(claim(averages["mixed"] <= averages["seed"], text, averages["mixed"], averages["seed"]))
    btx = averages.pop("btx", None)
    for name, theirs in averages.items() if btx else ():
        lines.append(claim(btx < theirs, f"btx beats {name} on average", btx, theirs))
    return lines + home_lines(rows)


def routing_table(models):
    """From routing.json: what the routers learned, layer by layer."""
    layers = range(len(models[0]["mutual_information"]))
    body = []
    for model in models:
        entropy = np.mean([domain["gate_entropy"] for domain in model["domains"].values()], axis=0)  # (L,)
        bits = model["mutual_information"]
        body.append([f"{model['name']}: expert tells about domain, bits", *(f"{value:.3f}" for value in bits)])
        body.append([f"{model['name']}: entropy of a token's gates, bits", *(f"{value:.2f}" for value in entropy)])
        body.append([f"{model['name']}: dead experts", *(", ".join(names) or "-" for names in model["dead"])])
    return markdown_table(["", *(f"layer {layer}" for layer in layers)], body)


# ---- the comparison ----


def kind(row):
    """The row's key in WORDS: its name, without the domain."""
    return "expert" if row["name"].startswith("expert-") else row["name"]


def in_order(rows):
    """Rows in the order of WORDS, experts as they come; rows of other names last."""
    place = {name: i for i, name in enumerate(WORDS)}
    return sorted(rows, key=lambda row: place.get(kind(row), len(place)))


def cost_table(rows):
    """What each row cost, from the seed on."""
    header = ["model", *COUNTS.values(), "seconds, summed"]
    return model_table(header, rows, lambda row: [*(short(row[name]) for name in COUNTS), f"{row['seconds']:.0f}"])


def saved(ours, theirs, metric, name):
    """(how far `ours` is ahead of `theirs` on each window or question (U,), what each counts (U,)): bits and bytes, or
    marks and 1. ours, theirs: rows of results.json."""
    if metric in BITS:
        return np.array(theirs["bits"][name]) - ours["bits"][name], np.array(ours["bytes"][name])
    ahead = np.array(ours["marks"][metric][name], float) - theirs["marks"][metric][name]
    return ahead, np.ones(len(ahead))


def lead(chains, name, metric, column, ours="btx", draws=4000):
    """(how far BTX is ahead of the row `name`, the standard error of that), from the rows of each chain.

    Differences are taken within a chain, whose rows share a seed model and its luck: a paired comparison. The error is
    that of a two-way bootstrap: chains and windows (or questions) are both drawn anew, with replacement, windows for
    each domain and the same ones for all chains (Owen 2007, The pigeonhole bootstrap). It is taken times
    sqrt(n / (n - 1)) for n chains, since a sample of n varies by so much less than what it was drawn from. With one
    chain it knows of the text alone; where rows were made before windows were kept, of the chains alone.
    """
    random = np.random.default_rng(0)
    rows = [{row["name"]: row for row in chain} for chain in chains]
    if not rows[0][ours].get("bits" if metric in BITS else "marks"):
        sign = -1 if metric in BITS else 1
        each = [sign * (row[ours][metric][column] - row[name][metric][column]) for row in rows]
        return statistics.mean(each), statistics.stdev(each) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
    names = [part for part in rows[0][ours][metric] if part != "avg"] if column == "avg" else [column]
    n = len(chains)
    ahead = np.zeros(n)  # of each chain
    drawn = np.zeros((draws, n))  # the same, of texts drawn anew
    for part in names:
        found = [saved(row[ours], row[name], metric, part) for row in rows]
        each = np.stack([values for values, _ in found], axis=1)  # (U, n)
        sizes = found[0][1]  # (U,), the same text in every chain
        often = random.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)  # (draws, U)
        ahead += each.sum(axis=0) / sizes.sum() / len(names)
        drawn += often @ each / (often @ sizes)[:, None] / len(names)
    often = random.multinomial(n, np.full(n, 1 / n), size=draws)  # (draws, n)
    error = (often * drawn).sum(axis=1).std() / n
    return ahead.mean(), error * (n / (n - 1)) ** 0.5 if n > 1 else error


def difference(chains, name, metric, column, ours="btx"):
    """(how far BTX is ahead of the row `name`, half the width of the 95 % interval); see lead and half_width."""
    ahead, error = lead(chains, name, metric, column, ours)
    return ahead, half_width(error, len(chains))


def half_width(error, n):
    """Half of a 95 % interval from a standard error over n chains, by Student's t of n - 1 degrees of freedom; with one
    chain by the normal distribution."""
    return error * (T_95[min(n - 2, len(T_95) - 1)] if n > 1 else 1.96)


def p_value(t, freedom):
    """How often Student's t is farther from 0 than this, both sides. With t = sqrt(freedom) tan(x) its density is a
    power of a cosine."""

    def area(start, stop):
        y = np.cos(np.linspace(start, stop, 10_001)) ** (freedom - 1)
        return (y.sum() - (y[0] + y[-1]) / 2) * (stop - start)

    return float(area(np.arctan(abs(t) / freedom**0.5), np.pi / 2) / area(0, np.pi / 2))


def holm(p_values):
    """Each of some p values, adjusted for there being several (Holm 1979): the smallest times their number, the next
    times one less, and so on, but none below one before it."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def primary_contrasts(chains, contrasts):
    """The contrasts that were chosen before the run, with Holm's correction: a list of {"ours", "theirs", "lead",
    "half", "p", "holm"}, of average bits per byte. contrasts: [(ours, theirs)]. It takes two chains or more."""
    found = []
    for ours, theirs in contrasts:
        ahead, error = lead(chains, theirs, "bpb", "avg", ours)
        half = half_width(error, len(chains))
        p = p_value(ahead / error, len(chains) - 1) if error else float(ahead == 0)
        found.append({"ours": ours, "theirs": theirs, "lead": float(ahead), "half": float(half), "p": p})
    for one, adjusted in zip(found, holm([one["p"] for one in found]), strict=True):
        one["holm"] = adjusted
    return found


def primary_table(found):
    """A line for each of primary_contrasts."""
    body = []
    for one in found:
        apart = "ahead" if one["lead"] > 0 else "**behind**"
        words = apart if one["holm"] < 0.05 else "not told apart"
        numbers = f"{one['lead']:+.4f} ± {one['half']:.4f}", f"{one['p']:.4f}", f"{one['holm']:.4f}"
        body.append([WORDS[one["ours"]], WORDS[one["theirs"]], *numbers, words])
    return markdown_table(["", "against", "bits per byte saved", "p", "p, Holm", "verdict"], body)


def verdict(chains, name, metric, column, ours="btx"):
    """'ahead by 0.012 ± 0.004', '**behind by ...**' or 'tie (+0.001 ± 0.004)': a tie is an interval that holds zero."""
    ahead, half = difference(chains, name, metric, column, ours)
    scale, digits, unit = (1, 3, "") if metric in BITS else (100, 1, " points")
    if abs(ahead) <= half:
        return f"tie ({scale * ahead:+.{digits}f} ± {scale * half:.{digits}f}{unit})"
    size = f"{abs(scale * ahead):.{digits}f} ± {scale * half:.{digits}f}{unit}"
    return f"ahead by {size}" if ahead > 0 else f"**behind by {size}**"


def verdict_table(rows, chains, ours="btx"):
    """BTX, or another row of its kind, against every row that may hold all domains: on the averages first. Daggers are
    explained below the page's table of scores."""
    columns = sorted(main_columns(rows), key=lambda column: column[1] != "avg")
    body = [
        [with_dagger(row), *(verdict(chains, row["name"], *column, ours) for column in columns)]
        for row in rows
        if kind(row) not in ("expert", ours)
    ]
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


def bases_of(rows):
    """{row["long"]: the top-2 row of that budget}."""
    return {row["long"]: row for row in rows if row["name"] in (BASE, f"{BASE}, longer")}


def ablation_table(rows):
    columns = [(metric, name) for metric in ("bpb", "accuracy") for name in rows[0][metric]]
    header = ["variant", *(f"{name} {metric}" for metric, name in columns)]
    header += ["active params", "tokens/s", "dead experts", "paper", "order as in the paper"]
    bases, tie = bases_of(rows), tie_width(rows)

    def cells(row):
        scores = [plus_minus(row, *column) for column in columns]
        scores += [short(row["active_params"]), short(row["tokens_per_second"])]
        dead = " / ".join(map(str, row["dead_experts"]))
        return [*scores, dead, str(row["paper"] or ""), paper_verdict(row, bases[row["long"]], tie)]

    return model_table(header, rows, cells)
