"""README's tables are the committed results, to the letter."""

import json
import os

import ablate
import report

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(*path):
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


def test_the_tables_come_from_results():
    readme = read("README.md")
    assert report.score_table(json.loads(read("results", "cpu", "results.json"))) in readme
    assert ablate.table(json.loads(read("results", "cpu", "ablations.json"))["rows"]) in readme


def test_files_that_the_readme_names_exist():
    names = [part.split(")")[0] for part in read("README.md").split("](")[1:]]
    for name in names:
        assert name.startswith("https://") or os.path.exists(os.path.join(ROOT, name)), name
