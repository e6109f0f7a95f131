"""README's tables are the committed results, to the letter, and the code that it quotes is the source."""

import glob
import inspect
import json
import os
import re

import pytest

from mix import mix
from study import compare, tables
from study.damage import damage_table
from study.drift import drift_table
from study.regime import regime_table

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
    rows = [{**row, "stale": row.get("stale", [])} for row in found["rows"]]
    for row in rows:  # the code at c3efc85 also counted a network's bytes, and the time of branches side by side
        for gone in ("bytes_sent", "critical_seconds"):
            row.pop(gone, None)
    assert compare.mean_rows(found["chains"]) == rows and len(found["chains"]) >= 3
    page = read("results", "cpu", "compare.md")
    assert tables.score_table(found["rows"]) in page and tables.cost_table(found["rows"]) in page
    assert tables.verdict_table(found["rows"], found["chains"]) in page
    assert tables.score_table(found["rows"], (), tables.main_columns(found["rows"])) in read("docs", "results.md")


def test_readmes_table_comes_from_one_run():
    rows = json.loads(read("results", "run", "results.json"))["rows"]
    assert tables.headline_table(rows) in read("README.md")


def test_the_real_model_comes_from_its_rows():
    rows = tables.in_order(json.loads(read("results", "smollm", "results.json"))["rows"])
    page = read("docs", "real.md")
    assert tables.headline_table(rows) in page and tables.headline_table(rows) in read("README.md")
    assert tables.score_table(rows, ("active_params", "train_flops")) in page
    assert tables.resampled_table(rows) in page
    assert tables.question_table(json.loads(read("results", "smollm", "questions.json"))) in page


@pytest.mark.parametrize("path", ["cpu/damage.json", "smollm/damage.json", "smollm/damage-held.json"])
def test_the_damage_comes_from_its_groups(path):
    assert damage_table(json.loads(read("results", path))["groups"]) in read("docs", "mixing.md")


@pytest.mark.parametrize("size", ["cpu", "smollm"])
def test_the_drift_comes_from_its_points(size):
    assert drift_table(json.loads(read("results", size, "drift.json"))["points"]) in read("docs", "mixing.md")


def test_the_study_comes_from_its_points():
    points = json.loads(read("results", "cpu", "regime.json"))["points"]
    points.sort(key=lambda point: (point["width"], point["scale"]))
    assert regime_table(points) in read("docs", "regime.md")


def test_readme_quotes_the_method():
    quoted = re.findall(r"```python\n(.*?)```", read("README.md"), re.S)
    assert quoted and quoted[0] == inspect.getsource(mix)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))])
def test_files_that_pages_name_exist(page):
    folder = os.path.dirname(page)
    for name in [part.split(")")[0].split("#")[0] for part in read(page).split("](")[1:]]:
        assert name.startswith("https://") or os.path.exists(os.path.join(ROOT, folder, name)), name
