"""Turn results.json and the runs' logs into report.md and its pictures.

    python -m study.report --report=out/cpu/report

Nothing is computed on models here: every number comes from results.json, routing.json, run.json and log.jsonl. A
report that was made from the same numbers is left as it is.
"""

import dataclasses
import os
import re

from common.config import key, parse
from common.errors import UserError, command, read_json, write_atomically
from common.run import LOG, hash_of, read_log, read_run, source, source_hash
from eval import read_results
from study.tables import (
    COUNTS,
    baseline_lines,
    claims,
    headline_table,
    in_order,
    mark_stale,
    routing_table,
    run_table,
    score_table,
    versions_line,
)


@dataclasses.dataclass
class ReportConfig:
    """Write report.md, curves.png and bpb.png beside a results.json."""

    report: str = key("out/cpu/report", "the folder with results.json, from eval.py")
    expected: str = key("", "a config's expected.json: says what is not as it should be, and ends with exit code 1")


def routing_section(folder):
    """The part of report.md that route.py's files make; empty where route.py has not run."""
    path = os.path.join(folder, "routing.json")
    if not os.path.exists(path):
        return []
    models = read_json(path, "make it again with study/route.py")["models"]
    text = ["\n## Where the routers send tokens\n", "![share of tokens by expert, layer and domain](routing.png)\n"]
    if any(model["experts_per_token"] > 1 for model in models):
        text += ["![share of tokens by pair of experts](pairs.png)\n"]
    pages = ", ".join(f"[{domain}](tokens-{domain}.html)" for domain in models[0]["domains"])
    return [*text, routing_table(models), f"\n{models[0]['name']} token by token, pages for a browser: {pages}."]


def stamp(results, routing, folders):
    """The last line of report.md: a hash of all that the report is made of. folders: {folder: run.json}."""
    logs = {folder: read_log(folder) for folder in folders}
    code = {**source(), "study/draw.py": source_hash("study/draw.py")}  # which is not loaded yet
    return f"<!-- made from {hash_of([results, routing, folders, logs, code])} -->"


def is_up_to_date(folder, last_line):
    """Whether the folder's report.md ends with this line, and all pictures that it shows are there."""
    path = os.path.join(folder, "report.md")
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        text = file.read()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    return text.endswith(last_line + "\n") and all(os.path.exists(os.path.join(folder, one)) for one in pictures)


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
    named = {*expected["bpb"], *(name for pair in expected["ahead"] for name in pair[:2])}
    if missing := sorted(named - rows.keys()):
        raise UserError(f"results.json has no row {missing[0]}, which {path} speaks of; run the pipeline to its end")
    wrong = [text for text, holds in differences(rows, expected) if not holds]
    print(*(f"NO {text}" for text in wrong), sep="\n") if wrong else print("all as expected")
    if wrong:
        raise SystemExit(1)


def write_report(folder, results):
    """Write report.md and its pictures, unless they are there and made from the same numbers."""
    rows = results["rows"]
    domains = list(rows[0]["bpb"])
    behind = dict.fromkeys(name for row in rows for name in row["runs"])
    folders = {name: read_run(name) for name in behind if os.path.exists(os.path.join(name, LOG))}
    routing = routing_section(folder)
    last_line = stamp(results, routing, folders)
    if is_up_to_date(folder, last_line):
        return

    from study import draw  # matplotlib takes half a second, which a report that is there need not wait for

    draw.plot_bpb(rows, domains, os.path.join(folder, "bpb.png"))
    text = ["# Results\n", score_table(rows, COUNTS)]
    text += [f"\nbpb: bits per byte on held-out text ({results['config']['split']}), lower is better.\n"]
    if results["baselines"]:
        text += ["Scores of guesses, made without a model:\n", *baseline_lines(results["baselines"]), ""]
    text += ["![bits per byte](bpb.png)\n", "## What was expected\n", *claims(rows)]
    if folders:
        draw.plot_curves(folders, domains, os.path.join(folder, "curves.png"))
        text += ["\n## What it cost\n", run_table(folders), "\n![training curves](curves.png)"]
    text += [*routing, versions_line(results, "results.json"), last_line]
    write_atomically(os.path.join(folder, "report.md"), "\n".join(text) + "\n")


def main():
    config = parse(ReportConfig)
    folder = config.report
    results = read_results(os.path.join(folder, "results.json"))
    if not results["rows"]:
        raise UserError(f"{folder}/results.json has no rows; evaluate a model first: python eval.py --model=DIR")
    for row in results["rows"]:
        mark_stale(row)
    results["rows"] = in_order(results["rows"])
    write_report(folder, results)
    print(f"\n{headline_table(results['rows'])}\n")
    print(f"{folder}/report.md has every row, the costs and the pictures")
    if config.expected:
        check_expected(results["rows"], config.expected)


if __name__ == "__main__":
    command(main)
