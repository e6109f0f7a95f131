"""The study of width and budget: its chains' settings, one small point by its real commands, numbers by hand."""

import dataclasses
import json
import math
import os
import shutil

import pytest
from helpers import ROOT, error_line, read, read_json, run

from common.errors import UserError
from study.draw import plot_regime
from study.regime import (
    Point,
    RegimeConfig,
    Trainer,
    best_of,
    from_comparison,
    length_flags,
    measure,
    points_of,
    settings_of,
    shape_flags,
    split_budget,
    summarize,
)
from study.regime_tables import all_tables, law_dense, law_table, law_upcycled, lead, lines_of, pooled, regime_table
from study.stages import parse_study

SET = {
    "sets": "math+rain",
    "seed_domains": "rain:3,math",
    "problems": 2,
    "btx_rates": "1e-3,3e-3",
    "upcycle_rates": "3e-3",
    "dense_rates": "3e-3",
}


@pytest.fixture(scope="module")
def config(configs, data, tmp_path_factory):
    """A config whose every stage takes a moment, the data in place."""
    folder = str(tmp_path_factory.mktemp("regime"))
    shutil.copytree(configs, f"{folder}/configs")
    with open(f"{folder}/configs/expert.py", "a") as file:
        file.write("freeze = 'embeddings,attention,norms'\n")
    with open(f"{folder}/configs/mix.py", "w") as file:
        file.write("router_init = 'ridge'\n")
    with open(f"{folder}/configs/compare.py", "w") as file:
        file.write("dense_flags = '--splice=0.5 --learning_rate=0.1'\nupcycle_flags = '--router_aux_loss_coef=0.02'\n")
    shutil.copytree(data, f"{folder}/regime/data")
    return RegimeConfig(configs=f"{folder}/configs", out_dir=folder, shares="0.3", axis_width=16, axis_scale=0.5, **SET)


POINT = Point("budget", 16, 0.5, ("math", "rain"))


@pytest.fixture(scope="module")
def measured(config, in_this_process):
    """The rows of a point, and of another share at the same FLOPs."""
    return measure(config, POINT, 1), measure(config, POINT._replace(axis="share", share=0.3), 1)


def test_lengths_and_shapes(config):
    """Half of SHORT's 12 steps and 3 of warm-up; four times the config's width of 64 and 176."""
    assert length_flags(config, "expert", 6) == ("--max_steps=6", "--warmup_steps=2")
    assert length_flags(config, "expert", 24) == ("--max_steps=24", "--warmup_steps=6")
    assert shape_flags(256, settings_of(config, "seed")) == (
        *("--hidden_size=256", "--intermediate_size=704", "--num_attention_heads=16", "--num_key_value_heads=16"),
    )


def test_more_domains_share_the_steps_of_the_branches(config):
    def steps(*domains):
        return Trainer(config, Point("domains", 16, 0.5, domains), 1).usual_lengths()

    assert steps("math", "rain") == (6, 6) and steps("a", "b", "c", "d") == (3, 6)


def test_one_seed_model_for_all_sets(config, measured):
    """Trained on what --seed_domains says."""
    pair, more = (Trainer(config, Point("domains", 16, 0.5, names), 1) for names in (("math", "rain"), ("a", "b")))
    assert pair.seed == more.seed and pair.folder != more.folder
    assert read_json(f"{pair.seed}/run.json")["recipe"]["config"]["domain"] == "rain:3,math"
    assert read_json(f"{pair.folder}/expert-math/run.json")["recipe"]["config"]["domain"] == "math"
    own = Trainer(dataclasses.replace(config, seed_domains=""), Point("domains", 16, 0.5, ("a", "b")), 1)
    assert own.seed == f"{own.folder}/seed"


def test_problems_are_asked_and_tabled(measured):
    """math alone asks; of two questions none, one or both are right."""
    for row in measured[0]:
        assert row["accuracy"]["avg"] == row["accuracy"]["math"] and row["choice"]["avg"] in (0, 0.5, 1)
    points = [summarize(POINT, {1: measured[0], 2: measured[0]})]
    tables = all_tables(points)
    btx = next(row for row in measured[0] if row["name"] == "btx")
    assert f"| {btx['choice']['avg']:.1%} |" in tables["budget, tasks"] and "tasks" not in tables["budget"]
    assert "budget, tasks" not in all_tables([summarize(POINT, CHAINS)])


def test_a_budget_split_by_hand():
    """20 and 40 FLOPs a token: 100 tokens at 3 : 1 take 75 x 20 + 25 x 40."""
    assert split_budget(2500, 0.75, 20, 40) == pytest.approx((75, 25))


def test_all_rows_have_the_same_flops(measured):
    """Up to half a step of 8 x 32 tokens, and half a step for each branch and the finetuning of another share."""
    for rows in measured:
        flops = {row["name"]: row["flops"] for row in rows}
        budget = {row["name"]: row["flops"] for row in measured[0]}["btx"]
        for row in rows:
            step = row["flops"] / row["tokens"] * 8 * 32
            assert abs(flops[row["name"]] - budget) <= 1.6 * step, row["name"]


def test_shares_are_what_was_asked_for(measured):
    usual, asked = (summarize(POINT, {1: rows}) for rows in measured)
    assert usual["share"] == pytest.approx(2 / 3)  # two branches of 6 steps, a finetuning of 6
    assert asked["share"] == pytest.approx(0.3, abs=0.12)  # in whole steps
    rows = {row["name"]: row for row in measured[0]}
    tokens = rows["btx"]["tokens"] + rows["btx"]["seed_tokens"]
    assert usual["tokens_per_parameter"] == tokens / rows["dense-cm"]["parameters"]


def test_settings_of_the_rivals(config, measured):
    trainer = Trainer(config, POINT, 1)
    folder = trainer.folder
    dense, upcycled, branch, mixed = (
        read_json(f"{folder}/{name}/run.json")["recipe"]["config"]
        for name in ("dense-cm-3e-3", "upcycle-cm-3e-3", "expert-rain", "upcycled")
    )
    assert (dense["freeze"], upcycled["freeze"], branch["freeze"]) == ("none", "none", "embeddings,attention,norms")
    assert dense["domain"] == upcycled["domain"] == "math,rain" and branch["domain"] == "rain"
    assert (dense["splice"], upcycled["router_aux_loss_coef"]) == (0.5, 0.02)  # the comparison's, but for the rates
    assert dense["learning_rate"] == upcycled["learning_rate"] == 3e-3
    assert mixed["experts"] == ",".join([trainer.seed] * 3) and mixed["router_init"] == "normal"


def test_the_best_rate_on_validation_text_counts(config, measured):
    folder = Trainer(config, POINT, 1).folder
    both = [f"{folder}/btx-1e-3", f"{folder}/btx-3e-3"]
    best = best_of(both, ("math", "rain"))
    row = next(row for row in measured[0] if row["name"] == "btx")
    assert best == f"{folder}/btx-{'1e-3' if row['rate'] == 1e-3 else '3e-3'}"
    scored = {one["name"]: one for one in read_json(f"{folder}/scores/results.json")["rows"]}
    assert row["bpb"] == scored[os.path.basename(best)]["bpb"] and set(row["spliced"]) == {"math + rain", "avg"}


# ---- tables ----


def rows(btx, upcycled, dense):
    found = {"btx": btx, "upcycle-cm": upcycled, "dense-cm": dense}
    costs = {"tokens": 100, "seed_tokens": 300, "parameters": 50, "last_run_tokens": 20}
    return [{"name": n, "bpb": {"avg": v}, "spliced": {"avg": v + 1}, **costs} for n, v in found.items()]


CHAINS = {1: rows(0.5, 0.6, 0.4), 2: rows(0.5, 0.8, 0.4)}  # BTX ahead of upcycling by 0.1 and 0.3, behind dense by 0.1


def test_leads_with_their_intervals():
    """Two differences of 0.1 and 0.3: mean 0.2, deviation 0.1414, 12.71 x 0.1414 / sqrt 2 = 1.271."""
    chains = list(CHAINS.values())
    assert lead(chains, "upcycle-cm", "bpb") == "+0.200 ± 1.271"
    assert lead(chains[:1], "upcycle-cm", "spliced") == "+0.100"
    assert lead(chains, "dense-cm", "bpb") == "**-0.100 ± 0.000**"
    asked = [[{**row, "choice": {"avg": row["bpb"]["avg"]}} for row in rows] for rows in chains]
    assert lead(asked, "upcycle-cm", "choice") == "-20.0 ± 127.1"  # in points, and more is better


def test_the_deviation_is_pooled_over_points():
    """(0.1, 0.3) and (0.1, 0.1, 0.1): squares 0.02 + 0 over 1 + 2 degrees of freedom."""
    same = {number: rows(0.5, 0.6, 0.4) for number in (1, 2, 3)}
    points = [summarize(POINT, CHAINS), summarize(POINT, same), summarize(POINT, {1: rows(0.5, 0.6, 0.4)})]
    deviation, freedom = pooled(points, "upcycle-cm", "bpb")
    assert freedom == 3 and deviation == pytest.approx((0.02 / 3) ** 0.5)
    line = next(one for one in lines_of(points) if one["rival"] == "upcycle-cm" and one["text"] == "bpb")
    assert line["half"] == pytest.approx([3.18 * deviation / n**0.5 for n in (2, 3, 1)])
    assert line["lead"] == pytest.approx([0.2, 0.1, 0.1]) and line["x"] == [8, 8, 8]  # (300 + 100) / 50


def test_tables_and_picture(tmp_path):
    points = [
        summarize(point, CHAINS)
        for point in (POINT, POINT._replace(width=32), POINT._replace(axis="share"), POINT._replace(axis="domains"))
    ]
    assert regime_table(points, "budget").count("\n") == regime_table(points, "share").count("\n") == 3
    assert "| 80% |" in regime_table(points, "share")  # 20 of 100 tokens are the finetuning's
    plot_regime(lines_of(points), tmp_path / "regime.png")
    assert read(tmp_path / "regime.png").startswith(b"\x89PNG")


def test_the_published_law():
    """The values of its formula at 10 G tokens before, 1 G after and 100 M parameters, worked out with logarithms."""
    before, after, size = 23.02585, 20.72327, 18.42068
    by_tokens = math.exp(math.log(16.3) - 0.043 * before + (-0.085 + 7.98e-4 * before) * after)
    by_size = math.exp(math.log(8.53) - 0.112 * size)
    assert law_upcycled(1e10, 1e9, 1e8) == pytest.approx(by_tokens + by_size + 0.165, rel=1e-5)
    dense = math.exp(math.log(8.83) - 0.088 * after) + math.exp(math.log(12.3) - 0.116 * size)
    assert law_dense(1e9, 1e8) == pytest.approx(dense + 0.165, rel=1e-5)
    assert "| -75.0% |" in law_table([summarize(POINT, CHAINS)])  # upcycling's 0.7 beside 0.4


def test_a_comparison_is_one_point_more(config, tmp_path):
    """Two chains with a seed model of 300 tokens and 1,000 FLOPs; SHORT's finetuning takes 12 x 8 x 32 tokens."""

    def row(name, value, tokens, flops):
        scores = {"bpb": {"a": value, "b": value, "avg": value}, "spliced": {"avg": value + 1}}
        return {"name": name, **scores, "train_tokens": tokens, "train_flops": flops, "total_params": 50}

    chain = [row("seed", 0.9, 300, 1000), row("btx", 0.5, 9300, 5000), row("soup", 0.8, 0, 0)]
    chain += [row("upcycle-cm", 0.6, 7300, 5010), row("dense-cm", 0.4, 9900, 4990)]
    path = tmp_path / "compare.json"
    path.write_text(json.dumps({"chains": [chain, chain]}))
    point, chains = from_comparison(dataclasses.replace(config, comparison=str(path)))
    assert point == Point("budget", 64, 1.0, ("a", "b")) and list(chains) == [1, 2]
    found = summarize(point, chains)
    assert found["tokens_per_parameter"] == 9300 / 50 and found["share"] == 1 - 12 * 8 * 32 / 9000
    assert [one["flops"] for one in found["chains"][0]] == [4000, 4010, 3990]
    assert "| +0.100 ± 0.000" in regime_table([found], "budget").replace("**", "")
    del chain[0]["spliced"]
    path.write_text(json.dumps({"chains": [chain]}))
    with pytest.raises(UserError, match="no scores on spliced windows"):
        from_comparison(dataclasses.replace(config, comparison=str(path)))


# ---- what is asked for ----


def test_points_that_are_asked_for(config):
    asked = RegimeConfig(
        widths="16,32", scales="0.5", shares="0.5,0.2", sets="a+b,b+c", axis_width=16, axis_scale=0.5, seeds="1"
    )
    grid = [Point("budget", 16, 0.5, ("a", "b")), Point("budget", 32, 0.5, ("a", "b"))]
    shares = [Point("share", 16, 0.5, ("a", "b"), share) for share in (0.5, 0.2)]
    assert points_of(asked) == [*grid, *shares, Point("domains", 16, 0.5, ("b", "c"))]


def test_a_config_file_that_is_given_takes_the_place_of_the_sizes(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["regime", "config/cpu/worlds.py", "--seeds=7"])
    given = parse_study(RegimeConfig, "regime")
    assert (given.out_dir, given.widths, given.seeds, given.problems) == ("out/cpu/worlds", "64", "7", 100)
    domains = [len(point.domains) for point in points_of(given)]
    assert sorted(domains) == [2, 4, 6] and "prose" in given.seed_domains
    monkeypatch.setattr("sys.argv", ["regime", "--size=cpu", "--seeds=7"])
    usual = parse_study(RegimeConfig, "regime")
    assert (usual.out_dir, usual.widths, usual.seeds, usual.problems) == ("out/cpu", "32,64", "7", 1)


def test_what_makes_no_sense_is_named(tmp_path):
    flags = f"--out_dir={tmp_path}/out", "--size=smoke"
    assert "numbers separated by commas" in error_line(run("study/regime.py", "--widths=32,wide", *flags))
    assert not os.path.exists(tmp_path / "out")
    for wrong, words in (
        ({"widths": "30"}, "multiples of 16"),
        ({"shares": "1.0"}, "between 0 and 1"),
        ({"seeds": ""}, "must not be empty"),
        ({"sets": "code+math,code"}, "two domains or more"),
        ({"shares": "0.5", "axis_scale": 3.0}, "no point of the grid"),
    ):
        with pytest.raises(UserError, match=words):
            points_of(RegimeConfig(**wrong))
