"""README's tables are the committed results, to the letter."""

import glob
import json
import os

import pytest

from study import compare, regime_tables, tables
from study.damage import damage_table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(*path):
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


def test_the_tables_come_from_results():
    rows = json.loads(read("results", "cpu", "results.json"))["rows"]
    assert tables.score_table(rows, tables.COUNTS, tables.main_columns(rows)) in read("docs", "results.md")
    ablations = json.loads(read("results", "cpu", "ablations.json"))["rows"]
    assert tables.ablation_table(ablations) in read("docs", "variants.md")


def test_the_comparison_comes_from_its_chains():
    found = json.loads(read("results", "cpu", "compare.json"))
    assert compare.summarize(found["chains"]) == found["rows"] and len(found["chains"]) >= 3
    assert tables.headline_table(found["rows"]) in read("README.md")
    page = read("results", "cpu", "compare.md")
    assert tables.score_table(found["rows"]) in page and tables.cost_table(found["rows"]) in page
    assert tables.verdict_table(found["rows"], found["chains"]) in page
    assert tables.score_table(found["rows"], (), tables.main_columns(found["rows"])) in read("docs", "results.md")


def test_the_damage_comes_from_its_groups():
    assert damage_table(json.loads(read("results", "cpu", "damage.json"))["groups"]) in read("docs", "mixing.md")


def test_the_study_comes_from_its_points():
    points, page = json.loads(read("results", "cpu", "regime.json"))["points"], read("docs", "regime.md")
    assert [name for name, table in regime_tables.all_tables(points).items() if table not in page] == []
    worlds = regime_tables.all_tables(json.loads(read("results", "cpu", "worlds.json"))["points"])
    assert worlds["domains"] in page and worlds["domains, tasks"] in page


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))])
def test_files_that_pages_name_exist(page):
    folder = os.path.dirname(page)
    for name in [part.split(")")[0].split("#")[0] for part in read(page).split("](")[1:]]:
        assert name.startswith("https://") or os.path.exists(os.path.join(ROOT, folder, name)), name
