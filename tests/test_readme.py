"""README's tables are the committed results, to the letter, and the code that it quotes is the source."""

import glob
import inspect
import json
import os
import re

import pytest

from common.config import parse
from mix import mix
from study import compare, tables
from study.damage import damage_table
from study.drift import drift_table
from study.regime import regime_table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(*path):
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


def test_the_ablations_come_from_their_rows():
    ablations = json.loads(read("results", "cpu", "ablations.json"))["rows"]
    assert tables.ablation_table(ablations) in read("docs", "variants.md")


RIVALS = "dense-cm", "upcycle-cm", "upcycle-dm", "btm-top1-cm", "btm-share-cm", "btx-paper"


@pytest.mark.parametrize("text, seeds", [("cpu", 5), ("text", 3)])
def test_the_comparison_comes_from_its_chains(text, seeds):
    found = json.loads(read("results", text, "compare.json"))
    rows, chains = found["rows"], found["chains"]
    assert compare.mean_rows(chains) == rows and len(chains) == seeds
    page, results = read("results", text, "compare.md"), read("docs", "results.md")
    assert tables.score_table(rows, ("active_params",)) in page and tables.cost_table(rows) in page
    assert tables.verdict_table(rows, chains) in page
    assert tables.comparison_table(rows) in page and tables.comparison_table(rows) in results
    assert tables.verdict_table([row for row in rows if row["name"] in RIVALS], chains) in results
    contrasts = [(one["ours"], one["theirs"]) for one in found["primary"]]
    assert found["primary"] == tables.primary_contrasts(chains, contrasts)
    assert tables.primary_table(found["primary"]) in page and tables.primary_table(found["primary"]) in results


def test_the_contrasts_are_those_decided_before_the_run():
    config = parse(compare.CompareConfig, [os.path.join(ROOT, "config", "cpu", "compare.py")])
    for text in ("cpu", "text"):
        primary = json.loads(read("results", text, "compare.json"))["primary"]
        assert [(one["ours"], one["theirs"]) for one in primary] == config.primary


def test_readmes_comparison_and_what_it_says_of_it():
    found = json.loads(read("results", "cpu", "compare.json"))
    text = read("README.md")
    assert tables.comparison_table(found["rows"]) in text
    words = " ".join(text.split())
    for said, ours, theirs in [
        ("ahead of the seed model by {} bits per byte", "btx", "seed"),
        ("runs all four models for each token, by {}.", "btm-share-cm", "btx"),
        ("the nearest expert alone is ahead by {},", "btm-top1-cm", "btx"),
        ("As printed it is behind dense training by {},", "dense-cm", "btx-paper"),
        ("on the built-in domains, {} bits per byte in all", "btx", "btx-paper"),
    ]:
        ahead, half = tables.difference(found["chains"], theirs, "bpb", "avg", ours)
        assert said.format(f"{ahead:.3f} ± {half:.3f}") in words
    for rival in ("dense-cm", "upcycle-cm"):
        ahead, half = tables.difference(found["chains"], rival, "spliced", "avg")
        assert ahead > half
        assert next(one for one in found["primary"] if one["theirs"] == rival)["holm"] > 0.05


def test_the_questions_for_two_experts_come_from_the_comparison():
    rows = json.loads(read("results", "cpu", "compare.json"))["rows"]
    asked = {*RIVALS, "seed", "btx", "expert-code", "expert-math", "expert-wiki"} - {"upcycle-dm"}
    some = [row for row in rows if row["name"] in asked]
    columns = [column for column in tables.columns_of(some) if column[0] == "together"]
    assert tables.score_table(some, (), columns) in read("docs", "results.md")
    assert all(share == 0 for row in rows for share in row["together_written"].values())


def test_the_page_of_one_run_comes_from_it():
    rows = json.loads(read("results", "run", "results.json"))["rows"]
    assert tables.score_table(tables.in_order(rows), tables.COUNTS) in read("results", "run", "report.md")


def test_the_settings_that_were_tried_come_from_the_sweep():
    """All scores of the rivals stand in the page's table, and each row's best is bold."""
    rows = json.loads(read("results", "cpu", "sweep.json"))["rows"]
    page = read("docs", "results.md")
    table = page[page.index("| row | what was tried") : page.index("**As printed, BTX gains")]
    for name in ("dense-cm", "upcycle-cm"):
        assert all(f"{bits:.3f}" in table for bits in rows[name].values())
    for scores in rows.values():
        assert f"**{min(scores.values()):.3f}**" in table


def test_what_routers_tell_comes_from_their_mixtures():
    models = json.loads(read("results", "cpu", "routing-starts.json"))["models"]
    for model in models:
        assert " | ".join(f"{bits:.2f}" for bits in model["mutual_information"]) in read("docs", "results.md")


def test_the_real_model_comes_from_its_rows():
    rows = tables.in_order(json.loads(read("results", "smollm", "results.json"))["rows"])
    page = read("docs", "real.md")
    assert tables.headline_table(rows) in page and tables.headline_table(rows) in read("README.md")
    assert tables.score_table(rows, ("active_params", "train_flops")) in page
    assert tables.resampled_table(rows) in page
    assert tables.question_table(json.loads(read("results", "smollm", "questions.json"))) in page


@pytest.mark.parametrize(
    "path", ["cpu/damage.json", "cpu/damage-held.json", "smollm/damage.json", "smollm/damage-held.json"]
)
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
