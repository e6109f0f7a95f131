"""Turn results.json and the runs' logs into report.md and its pictures.

    python -m study.report --report=out/cpu/report

Nothing is computed on models here: every number comes from results.json, routing.json, run.json and log.jsonl.
"""

import dataclasses
import glob
import os

from common.config import key, parse
from common.errors import UserError, command, read_json, write_atomically, write_json
from common.run import LOG, read_run
from eval import read_results
from study import tables
from study.draw import in_words, plot_bpb, plot_curves

RESAMPLED = """In bits per byte, with the interval that holds 95 % of the differences when the scored windows are drawn
anew; bold where zero is outside. It knows which text was scored, not what another random seed of training would do."""
TOPICS = {  # the sections of all rows' scores, and which of METRICS are in them: no table too wide to read
    "Bits per byte": ("bpb", "unread"),
    "Where domains meet": ("spliced",),
    "Answers chosen": ("choice", "switched"),
    "Two experts needed": ("together", "together_written"),
    "Answers written": ("accuracy", "edit_similarity"),
}


@dataclasses.dataclass
class ReportConfig:
    """Write report.md, curves.png and bpb.png beside a results.json."""

    report: str = key("out/cpu/report", "the folder with results.json, from eval.py")
    expected: str = key("", "a config's expected.json: says what is not as it should be, and ends with exit code 1")


def without_note(table):
    """A table without the line that says what its daggers mean: of all tables of a page, the first has it."""
    return table.partition("\n\n†")[0]


def score_sections(rows):
    """The parts of report.md that show every score, by topic; those that rows have."""
    text = []
    for topic, metrics in TOPICS.items():
        columns = [column for column in tables.columns_of(rows) if column[0] in metrics]
        if columns:
            text += [f"## {topic}\n", without_note(tables.score_table(rows, columns=columns)), ""]
    return text


def questions_in(folder):
    """{model: {task: [share of right answers, standard error]}} from what lm_eval wrote below a folder: the normalised
    accuracy of each task where it has one, with the model's folder as its name."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "results_*.json"), recursive=True)):
        scores = read_json(path, "delete it and run lm_eval again")
        name = os.path.basename(os.path.normpath(scores["model_name"]))
        for task, metrics in scores["results"].items():
            metric = "acc_norm" if "acc_norm,none" in metrics else "acc"
            if f"{metric},none" in metrics:
                pair = [metrics[f"{metric},none"], metrics[f"{metric}_stderr,none"]]
                found.setdefault(name, {})[task.removeprefix("btx_")] = pair
    return found


def question_section(folder):
    """The part of report.md that lm_eval's files in FOLDER/questions make; empty where there are none."""
    found = questions_in(os.path.join(folder, "questions"))
    if not found:
        return []
    write_json(os.path.join(folder, "questions.json"), found)
    return ["\n## Questions\n", tables.question_table(found)]


def routing_section(folder):
    """The part of report.md that route.py's files make; empty where route.py has not run."""
    path = os.path.join(folder, "routing.json")
    if not os.path.exists(path):
        return []
    models = read_json(path, "make it again with study/route.py")["models"]
    pages = ", ".join(f"[{domain}](tokens-{domain}.html)" for domain in models[0]["domains"])
    return [
        "\n## Where the routers send tokens\n",
        "![share of tokens by expert, layer and domain](routing.png)\n",
        tables.routing_table(models),
        f"\n{models[0]['name']} token by token, pages for a browser: {pages}.",
    ]


def differences(rows, expected):
    """[(what was checked, whether it holds)]. rows: {name: row of results.json}. expected: {"bpb": {row: {domain:
    [value, tolerance]}}, "ahead": [[better row, worse row, domain, by at least]]}."""
    found = []
    for name, domains in expected["bpb"].items():
        for domain, (value, tolerance) in domains.items():
            ours = rows[name]["bpb"][domain]
            text = f"{name:12s} {domain:5s} {ours:.3f}   expected {value:.3f} ± {tolerance:.3f}"
            found.append((text, abs(ours - value) <= tolerance))
    for better, worse, domain, margin in expected["ahead"]:
        lead = rows[worse]["bpb"][domain] - rows[better]["bpb"][domain]
        text = f"{better} is ahead of {worse} on {domain} by {lead:.3f}   expected {margin:.3f} or more"
        found.append((text, lead >= margin))
    return found


def check_expected(rows, path):
    """Print what is not as expected.json says, or that all is; exit code 1 if something is not."""
    expected = read_json(path, "choose config/lesson/expected.json")
    rows = {row["name"]: row for row in rows}
    for name in [*expected["bpb"], *(name for pair in expected["ahead"] for name in pair[:2])]:
        if name not in rows:
            raise UserError(f"results.json has no row {name}, which {path} speaks of; run the pipeline to its end")
    wrong = [f"NO {text}" for text, holds in differences(rows, expected) if not holds]
    print("\n".join(wrong) or "all as expected")
    if wrong:
        raise SystemExit(1)


def write_report(folder, results):
    """Write report.md and its pictures."""
    rows = results["rows"]
    domains = list(rows[0]["bpb"])
    plot_bpb(rows, domains, os.path.join(folder, "bpb.png"))
    text = ["# Results\n", without_note(tables.headline_table(rows)) + tables.stale_line(rows)]
    text += [f"\nbpb: bits per byte on held-out text ({results['config']['split']}), lower is better.\n"]
    named = {row["name"]: in_words(row["name"]) for row in rows}
    legend = [f"`{name}`: {words}" for name, words in named.items() if name != words]
    text += [f"{'; '.join(legend)}.\n"] if legend else []
    text += ["![bits per byte](bpb.png)\n", *score_sections(rows)]
    if results["baselines"]:
        text += ["Scores of guesses, made without a model:\n", *tables.baseline_lines(results["baselines"]), ""]
    if all("bits" in row for row in rows) and any(row["name"] == "btx" for row in rows):
        text += ["## How sure\n", tables.resampled_table(rows), f"\n{RESAMPLED}\n"]
    text += ["## What was expected\n", *tables.claims(rows)]
    behind = dict.fromkeys(name for row in rows for name in row["runs"])
    folders = {name: read_run(name) for name in behind if os.path.exists(os.path.join(name, LOG))}
    text += ["\n## What it cost\n", without_note(tables.cost_table(rows))]
    if folders:
        plot_curves(folders, domains, os.path.join(folder, "curves.png"))
        text += ["\nEach run by itself:\n", tables.run_table(folders), "\n![training curves](curves.png)"]
    text += [*question_section(folder), *routing_section(folder), tables.versions_line(results, "results.json")]
    write_atomically(os.path.join(folder, "report.md"), "\n".join(text) + "\n")


def main():
    config = parse(ReportConfig)
    folder = config.report
    results = read_results(os.path.join(folder, "results.json"))
    if not results["rows"]:
        raise UserError(f"{folder}/results.json has no rows; evaluate a model first: python eval.py --model=DIR")
    for row in results["rows"]:
        tables.mark_stale(row)
    results["rows"] = tables.in_order(results["rows"])
    write_report(folder, results)
    print(f"\n{tables.headline_table(results['rows'])}\n")
    print(f"{folder}/report.md has every row, the costs and the pictures")
    if config.expected:
        check_expected(results["rows"], config.expected)


if __name__ == "__main__":
    command(main)
