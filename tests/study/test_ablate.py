"""The ablation table: spreads, dead experts and verdicts against cases worked out by hand."""

import json
import os

import pytest

from common.config import parse
from finetune import FinetuneConfig
from mix import MixConfig
from study.ablate import VARIANTS, row_of, slug
from study.tables import BASE, bases_of, dead_experts, paper_verdict, tie_width


def row(name, avg, std=0.0, paper=None, long=False):
    return {"name": name, "bpb": {"avg": avg}, "std": {"bpb": {"avg": std}}, "paper": paper, "long": long}


def test_every_variant_is_a_valid_command_with_a_folder_of_its_own():
    for variant in VARIANTS:
        parse(MixConfig, variant.mix.split())
        parse(FinetuneConfig, variant.finetune.split())
    assert len({slug(variant.name) for variant in VARIANTS}) == len(VARIANTS)


def test_rows_are_held_against_top_2_of_their_own_budget():
    rows = [row(BASE, 1.0), row(f"{BASE}, longer", 0.9, long=True), row("soft, longer", 0.8, long=True)]
    assert bases_of(rows) == {False: rows[0], True: rows[1]}


@pytest.mark.parametrize(
    "paper, avg, expected",
    [
        (24.7, 1.10, "yes"),  # worse in the paper (34.6), worse here: bits per byte are higher
        (24.7, 0.90, "**no**"),
        (24.7, 1.03, "**no**, a tie here"),
        (34.7, 1.03, "yes, equal"),
        (34.7, 1.10, "**no**, the paper has them equal"),
        (35.8, 0.90, "yes"),
        (None, 0.90, ""),
    ],
)
def test_verdicts(paper, avg, expected):
    base = row(BASE, 1.0, paper=34.6)
    assert paper_verdict(row("other", avg, paper=paper), base, tie=0.04) == expected
    assert paper_verdict(base, base, tie=0.04) == ""


def test_the_spread_is_pooled():
    assert tie_width([row("a", 1.0, std=0.03), row("b", 2.0, std=0.04)]) == pytest.approx(2 * (0.0025 / 2) ** 0.5)


def test_dead_experts_are_counted_over_all_domains():
    load = {
        "code": [[0.5, 0.495, 0.005], [0.4, 0.6, 0.0]],
        "math": [[0.5, 0.47, 0.03], [0.4, 0.592, 0.008]],  # the third expert: 1.75 % in layer 0, 0.4 % in layer 1
    }
    assert dead_experts(load) == [[], [2]]


def test_a_row_is_mean_and_sample_deviation_over_seeds(tmp_path):
    def result(name, bpb, accuracy):
        scores = {"bpb": {"avg": bpb}, "accuracy": {"math": accuracy}, "load": {"math": [[0.5, 0.5]]}}
        return {"name": name, **scores, "active_params": 10, "total_params": 20, "runs": [], "source": {}}

    folders = []
    for name, seconds in (("one", 1.0), ("two", 3.0)):
        folders.append(str(tmp_path / name))
        os.makedirs(folders[-1])
        cost = {"tokens": 1000, "flops": 5.0, "seconds": seconds}
        run = {"id": "", "recipe": {}, "step": 1, "finished": True, "history": {"seed": {}, folders[-1]: cost}}
        with open(f"{folders[-1]}/run.json", "w") as file:
            json.dump(run, file)
    scored = {"one": result("one", 1.0, 0.1), "two": result("two", 1.2, 0.3)}
    found = row_of(VARIANTS[0], folders, scored)
    assert found["bpb"]["avg"] == pytest.approx(1.1)
    assert found["std"]["bpb"]["avg"] == pytest.approx(0.2 / 2**0.5)
    assert found["accuracy"]["math"] == pytest.approx(0.2)
    assert found["seconds"] == 2.0 and found["train_tokens"] == 1000
    assert found["tokens_per_second"] == pytest.approx((1000 + 1000 / 3) / 2)
