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
from common.run import LOG, code_hashes, hash_of, read_log, read_results, read_run
from study.tables import COUNTS, baseline_lines, claims, routing_table, run_table, score_table, versions_line


@dataclasses.dataclass
class ReportConfig:
    """Write report.md, curves.png and bpb.png beside a results.json."""

    report: str = key("out/cpu/report", "the folder with results.json, from eval.py")


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
    code = code_hashes("study/report.py", "study/tables.py", "study/draw.py")
    logs = {folder: read_log(folder) for folder in folders}
    return f"<!-- made from {hash_of([results, routing, folders, logs, code])} -->"


def is_there(folder, last_line):
    """Whether the folder's report.md ends with this line, and all pictures that it shows are there."""
    path = os.path.join(folder, "report.md")
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        text = file.read()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    return text.endswith(last_line + "\n") and all(os.path.exists(os.path.join(folder, one)) for one in pictures)


def main():
    folder = parse(ReportConfig).report
    results = read_results(os.path.join(folder, "results.json"))
    rows = results["rows"]
    if not rows:
        raise UserError(f"{folder}/results.json has no rows; evaluate a model first: python eval.py --model=DIR")
    domains = list(rows[0]["bpb"])
    behind = dict.fromkeys(name for row in rows for name in row["runs"])
    folders = {name: read_run(name) for name in behind if os.path.exists(os.path.join(name, LOG))}
    routing = routing_section(folder)
    last_line = stamp(results, routing, folders)
    if is_there(folder, last_line):
        print(f"{folder}/report.md is up to date, nothing to do")
        return

    from study import draw  # matplotlib takes half a second, which a report that is there need not wait for

    table = score_table(rows, COUNTS)
    draw.plot_bpb(rows, domains, os.path.join(folder, "bpb.png"))
    text = ["# Results\n", table]
    text += [f"\nbpb: bits per byte on held-out text ({results['config']['split']}), lower is better.\n"]
    if results["baselines"]:
        text += ["Scores of guesses, made without a model:\n", *baseline_lines(results["baselines"]), ""]
    text += ["![bits per byte](bpb.png)\n", "## What was expected\n", *claims(rows)]
    if folders:
        draw.plot_curves(folders, domains, os.path.join(folder, "curves.png"))
        text += ["\n## What it cost\n", run_table(folders), "\n![training curves](curves.png)"]
    text += [*routing, versions_line(results, "results.json"), last_line]
    write_atomically(os.path.join(folder, "report.md"), "\n".join(text) + "\n")
    print(f"{table}\n\n{folder}/report.md has the table, the costs and the pictures")


if __name__ == "__main__":
    command(main)
