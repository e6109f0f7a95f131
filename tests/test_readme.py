"""README's tables are the committed results, to the letter."""

import json
import os

from study import compare, tables

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(*path):
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


def test_the_tables_come_from_results():
    readme = read("README.md")
    assert tables.score_table(json.loads(read("results", "cpu", "results.json"))["rows"], tables.COUNTS) in readme
    assert tables.ablation_table(json.loads(read("results", "cpu", "ablations.json"))["rows"]) in readme


def test_the_comparison_comes_from_its_chains():
    found = json.loads(read("results", "cpu", "compare.json"))
    assert compare.summarize(found["chains"]) == found["rows"] and len(found["chains"]) >= 3
    readme, page = read("README.md"), read("results", "cpu", "compare.md")
    assert tables.score_table(found["rows"]) in readme
    assert tables.score_table(found["rows"]) in page and tables.cost_table(found["rows"]) in page
    assert tables.verdict_table(found["rows"], found["chains"]) in page


def test_the_study_comes_from_its_points():
    assert tables.regime_table(json.loads(read("results", "cpu", "regime.json"))["points"]) in read("docs", "regime.md")


def test_files_that_the_readme_names_exist():
    names = [part.split(")")[0] for part in read("README.md").split("](")[1:]]
    for name in names:
        assert name.startswith("https://") or os.path.exists(os.path.join(ROOT, name)), name
