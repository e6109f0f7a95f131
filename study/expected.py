"""Holds a run's table against what config/<size>/expected.json says should come out.

    python -m study.expected out/lesson

expected.json: {"bpb": {row: {domain: [value, tolerance]}}, "ahead": [[better row, worse row, domain, by at least]]}.
Ends with exit code 1 when something lies outside.
"""

import os
import sys

from common import run as runs
from common.errors import UserError, command, read_json


def check(rows, expected):
    """[(what was checked, whether it holds)]. rows: {name: row of results.json}."""
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


def main():
    if len(sys.argv) != 2:
        raise UserError("name the folder of a run: python -m study.expected out/lesson")
    folder = os.path.normpath(sys.argv[1])
    expected = read_json(os.path.join("config", os.path.basename(folder), "expected.json"), "choose out/lesson")
    results = os.path.join(folder, "report", "results.json")
    rows = {row["name"]: row for row in runs.read_results(results)["rows"]}
    named = {*expected["bpb"], *(name for pair in expected["ahead"] for name in pair[:2])}
    if missing := sorted(named - rows.keys()):
        raise UserError(f"{results} has no row {missing[0]}; run it to its end")
    checks = check(rows, expected)
    for text, holds in checks:
        print(f"{'ok ' if holds else 'NO '} {text}")
    outside = sum(not holds for _, holds in checks)
    print("all as expected" if not outside else f"{outside} of {len(checks)} not as expected")
    if outside:
        raise SystemExit(1)


if __name__ == "__main__":
    command(main)
