"""Chains and the comparison: recipes read back from run.json, budgets counted in logs, verdicts worked out by hand."""

import dataclasses
import json
import os
import re
import shutil

import pytest
from helpers import read, read_json, read_log

from common.errors import UserError
from study import chain, compare, tables
from study.tables import crossing_lines, difference, home_lines, mean_and_std, share_at_par, verdict

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The chain of random seed 3, as run.sh places it."""
    return str(tmp_path_factory.mktemp("chain") / "out" / "seed3")


@pytest.fixture(scope="module")
def config(chain_configs, out):
    flags = {"branch_flags": "--learning_rate=4e-3", "paper_flags": "--router_learning_rate=2.0"}
    flags |= {"even_flags": "--router_learning_rate=5.0", "rates": "1e-3,3e-3"}
    flags["sweep"] = "dense-cm,upcycle-cm,btx-paper,btx"
    return compare.CompareConfig(
        configs=chain_configs, out_dir=os.path.dirname(out), seeds="3", domains="math,rain", **flags
    )


@pytest.fixture(scope="module")
def results(config, in_this_process):
    """A whole chain with random seed 3, all baselines, and its scores."""
    return compare.train_and_score(config, "3")


def recipe(out, name):
    return read_json(f"{out}/{name}/run.json")["recipe"]


def spent(out, name, what="tokens"):
    """The tokens, or FLOPs, behind a checkpoint since the seed model, counted in the logs."""
    behind = read_json(f"{out}/{name}/run.json")["history"]
    return sum(read_log(folder)[-1][what] for folder in behind if folder != f"{out}/seed")


def test_every_run_has_the_chains_random_seed(out, results):
    for name in ("seed", "expert-math", "btx", "compare/dense-cm", "compare/upcycle-cm", "compare/btx-paper"):
        assert recipe(out, name)["config"]["seed"] == 3


def test_branches_train_feed_forwards_alone_and_dense_training_everything(out, results):
    assert recipe(out, "expert-math")["config"]["freeze"] == "embeddings,attention,norms"
    for name in ("dense-cm", "dense-dm", "dense-tm", "paper/expert-math", "longer/expert-rain"):
        assert recipe(out, f"compare/{name}")["config"]["freeze"] == "none"


def test_rows_have_their_own_flags(out, results):
    for name in ("dense-cm", "dense-dm", "dense-tm"):
        settings = recipe(out, f"compare/{name}")["config"]
        assert (settings["splice"], settings["learning_rate"]) == (0.25, 2e-3)
        assert list(recipe(out, f"compare/{name}")["parents"]) == [f"{out}/seed"]
    for name in ("upcycle-cm", "upcycle-dm", "upcycle-tm"):
        assert recipe(out, f"compare/{name}")["config"]["router_aux_loss_coef"] == 0.02
        assert list(recipe(out, f"compare/{name}")["parents"]) == [f"{out}/compare/upcycled"]
    assert list(recipe(out, "compare/upcycled")["parents"]) == [f"{out}/seed"]
    assert recipe(out, "compare/paper/expert-math")["config"]["learning_rate"] == 4e-3
    assert recipe(out, "compare/btx-paper")["config"]["router_learning_rate"] == 2.0
    assert recipe(out, "compare/btx-even")["config"]["router_learning_rate"] == 5.0
    assert recipe(out, "btx")["config"]["router_learning_rate"] == 1.0
    assert recipe(out, "compare/btx-sample")["config"]["router"] == "sample"


def test_the_row_as_printed_has_random_routers(out, results):
    found = recipe(out, "compare/paper/mixed")
    assert found["config"]["router_init"] == "normal" and recipe(out, "mixed")["config"]["router_init"] == "ridge"
    branches = [f"{out}/compare/paper/expert-{domain}" for domain in ("math", "rain")]
    assert list(found["parents"]) == [*branches, f"{out}/seed"]
    assert list(recipe(out, "compare/btx-paper")["parents"]) == [f"{out}/compare/paper/mixed"]


def test_data_matched_rows_see_the_tokens_of_btx(out, results):
    assert spent(out, "btx") == 36 * 8 * 32  # two branches and a finetuning of 12 steps each
    for name in ("dense-dm", "upcycle-dm"):
        assert spent(out, f"compare/{name}") == spent(out, "btx")


def test_rivals_see_each_domain_as_often_as_btx(out, results):
    for name in ("dense-dm", "dense-cm", "upcycle-dm", "upcycle-cm"):
        assert recipe(out, f"compare/{name}")["config"]["domain"] == f"math:{18 * 8 * 32},rain:{18 * 8 * 32}"


def test_compute_matched_rows_take_the_flops_of_btx(out, results):
    ours = spent(out, "btx", "flops")
    for name in ("compare/dense-cm", "compare/upcycle-cm", "compare/btx-even"):
        last = read_log(f"{out}/{name}")[-1]
        runs = 3 if name.endswith("even") else 1  # each in whole steps
        assert abs(spent(out, name, "flops") - ours) <= runs * last["flops"] / last["step"] / 2, name
    longer = sum(read_log(f"{out}/compare/longer/expert-{domain}")[-1]["flops"] for domain in ("math", "rain"))
    assert abs(longer - ours) <= read_log(f"{out}/compare/longer/expert-math")[-1]["flops"] / 10


def test_the_even_row_has_as_many_tokens_in_its_finetuning(out, results):
    branches = [read_log(f"{out}/compare/even/expert-{domain}")[-1]["tokens"] for domain in ("math", "rain")]
    finetuning = read_log(f"{out}/compare/btx-even")[-1]["tokens"]
    assert branches[0] == branches[1] and abs(sum(branches) - finetuning) <= 1.5 * 8 * 32


def test_time_matched_rows_take_the_seconds_of_btx(out, results):
    history = read_json(f"{out}/btx/run.json")["history"]
    seconds = sum(cost["seconds"] for folder, cost in history.items() if folder != f"{out}/seed")
    for name in ("dense", "upcycle"):
        folder = f"{out}/compare/{name}-cm"
        last = read_json(f"{folder}/run.json")
        steps = seconds / (last["history"][folder]["seconds"] / last["step"])
        assert recipe(out, f"compare/{name}-tm")["config"]["max_steps"] == max(1, round(steps))


def test_the_report(config, results):
    chains = [results["rows"]] * 2
    found = {"rows": compare.mean_rows(chains), "chains": chains, "config": {}}
    report = f"{config.out_dir}/compare-report"
    os.makedirs(report)
    compare.write_comparison(report, {**found, "baselines": results["baselines"], "versions": results["versions"]})
    rows = {row["name"]: row for row in read_json(f"{report}/compare.json")["rows"]}
    needed = {
        "seed",
        "soup",
        "mixed",
        "btx",
        "dense-tm",
        "upcycle-dm",
        "btx-paper",
        "btm-top1",
        "btm-posterior-prefix-cm",
    }
    assert rows.keys() >= needed
    assert rows["btm-top1-cm"]["train_flops"] == pytest.approx(rows["btx"]["train_flops"], rel=0.02)
    own = {row["name"]: row for row in results["rows"]}
    for name, row in rows.items():
        assert row["bpb"] == own[name]["bpb"] and row["std"]["bpb"]["avg"] == 0  # twice the same
    text = read(f"{report}/compare.md").decode()
    assert all(f"| {name} |" in text for name in rows) and os.path.exists(f"{report}/compare.png")


def test_rows_made_before_the_source_changed_are_marked(results, out):
    row = dict(results["rows"][0])
    tables.mark_stale(row)
    assert row["stale"] == []
    row["source"] = {**row["source"], "model.py": "another"}
    tables.mark_stale(row)
    assert row["stale"] == ["model.py"]
    columns = [("bpb", "avg")]
    text = tables.score_table([row], columns=columns)
    assert f"{row['name']} †" in text and text.endswith("† made before model.py changed")
    path = f"{out}/btx/run.json"
    record = read_json(path)
    btx = dict(next(one for one in results["rows"] if one["name"] == "btx"))
    with open(path, "w") as file:
        source = [{"step": 0, "files": {"train.py": "another"}}, *record["source"]]
        json.dump({**record, "source": source}, file)
    tables.mark_stale(btx)
    with open(path, "w") as file:
        json.dump(record, file)
    assert btx["stale"] == ["train.py"]


def test_the_headline(results):
    text = tables.headline_table(results["rows"])
    assert text.count("\n") == 6 and "±" not in text
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:]]
    wanted = ["seed model", "dense training", "sparse upcycling", "Branch-Train-Merge", "**Branch-Train-MiX**"]
    assert names == wanted


def test_the_sweep_scores_on_validation_text(config, out, results):
    found = compare.sweep(config)
    assert list(found) == config.sweep.split(",")
    for name, scores in found.items():
        for rate in ("1e-3", "3e-3"):
            folder = f"{out}/compare/sweep/{name}-{rate}"
            assert scores[rate] == read_log(folder)[-1]["bpb"]["avg"]
            assert read_json(f"{folder}/run.json")["recipe"]["config"]["learning_rate"] == float(rate)
        assert scores["1e-3"] != scores["3e-3"]


def test_rows_that_nobody_sweeps(config, out, results):
    with pytest.raises(UserError, match="soup is no row to sweep; choose from dense-cm"):
        compare.sweep(dataclasses.replace(config, sweep="soup"))


def test_seeds_that_are_no_numbers():
    with pytest.raises(UserError, match="whole numbers separated by commas"):
        compare.CompareConfig(seeds="one")


def test_a_budget_is_known_before_anything_is_trained(config, out, results):
    """The configs' own arithmetic, against what the logs of a finished chain say."""
    fresh = compare.chain_with(config, "3")
    assert isinstance(fresh, chain.Chain) and fresh.budget.tokens == spent(out, "btx")
    assert fresh.budget.flops == pytest.approx(spent(out, "btx", "flops"), rel=1e-12)


def test_flops_are_equal_whatever_the_flags(chain_configs, tmp_path, in_this_process):
    """A domain with settings of its own, batches other than the config's, and rivals whose batches differ again."""
    configs, out = tmp_path / "configs", str(tmp_path / "out")
    shutil.copytree(chain_configs, configs)
    own = re.sub("max_steps = .*", "max_steps = 25", (configs / "expert.py").read_text())
    (configs / "expert-math.py").write_text(own)
    flags = {"seed_flags": "--max_steps=2", "expert_flags": "--sequence_length=16", "finetune_flags": "--batch_size=2"}
    flags |= {"dense_flags": "--batch_size=8", "upcycle_flags": "--sequence_length=24", "report": False}
    settings = {"configs": str(configs), "out_dir": out, "domains": "math,rain", **flags}
    made = chain.Chain(chain.ChainConfig(**settings))
    chain.pipeline(made)
    made.run()
    lengths = {name: read_log(f"{out}/expert-{name}")[-1]["tokens"] for name in ("math", "rain")}
    steps = {name: recipe(out, f"expert-{name}")["config"]["max_steps"] for name in lengths}
    assert steps["math"] == 25 != steps["rain"]
    assert lengths["math"] / lengths["rain"] == 25 / steps["rain"]
    ours = spent(out, "btx", "flops")
    for name, value in {"dense-cm": ("batch_size", 8), "upcycle-cm": ("sequence_length", 24)}.items():
        last = read_log(f"{out}/compare/{name}")[-1]
        assert recipe(out, f"compare/{name}")["config"][value[0]] == value[1]
        assert abs(last["flops"] - ours) <= last["flops"] / last["step"] / 2, name
    assert recipe(out, "compare/dense-cm")["config"]["sequence_length"] == 16  # the branches' flags are its own, too
    assert recipe(out, "compare/upcycle-cm")["config"]["batch_size"] == 2
    shares = recipe(out, "compare/dense-cm")["mixture"]
    finetuned = spent(out, "btx") - sum(lengths.values())
    expected = {name: (count + finetuned / 2) / spent(out, "btx") for name, count in lengths.items()}
    assert shares == pytest.approx(expected, rel=1e-3)


def test_what_run_sh_is_given_reaches_every_chain(chain_configs):
    """And random seed 1 is where `bash run.sh` has it, whatever stands first."""
    given = {"launch": "torchrun", "jobs": 3, "flags": "--dtype=float32", "domains": "math,rain"}
    given |= {"seed_flags": "--splice=0.1", "expert_flags": "--splice=0.2", "finetune_flags": "--splice=0.3"}
    config = compare.CompareConfig(configs=chain_configs, out_dir="some", seeds="2,1", **given)
    folders = {}
    for number in ("2", "1"):
        made = compare.chain_with(config, number)
        assert {name: getattr(made.config, name) for name in given} == given and made.config.seed == int(number)
        folders[number] = made.config.out_dir
        chain.pipeline(made)
        flags = {job.name: job.arguments for job in made.jobs}
        assert "--splice=0.1" in flags["seed"] and "--splice=0.2" in flags["expert-math"]
        assert "--splice=0.3" in flags["btx"] and "--dtype=float32" in flags["scores/seed"]
    assert folders == {"1": "some", "2": "some/seed2"}


# ---- verdicts ----


def row(name, bpb, accuracy=0.5):
    return {"name": name, "bpb": {"math": bpb, "avg": bpb}, "accuracy": {"avg": accuracy}}


@pytest.mark.parametrize(
    "btx, other, expected",
    [
        ([1.0, 1.5, 2.0], [1.2, 1.7, 2.2], "ahead by 0.200 ± 0.000"),  # by as much, however far chains are apart
        ([1.0, 1.5, 2.0], [0.9, 1.4, 1.9], "**behind by 0.100 ± 0.000**"),
        ([1.0, 1.5, 2.0], [1.1, 1.5, 2.2], "tie (+0.100 ± 0.248)"),  # 0.1, 0, 0.2: 4.30 * 0.1 / sqrt(3)
        ([1.0, 1.5, 2.0], [1.1, 1.7, 2.2], "ahead by 0.167 ± 0.143"),  # 0.1, 0.2, 0.2: 4.30 * 0.0577 / sqrt(3)
    ],
)
def test_verdicts(btx, other, expected):
    chains = [[row("btx", ours), row("dense-dm", theirs)] for ours, theirs in zip(btx, other, strict=True)]
    assert verdict(chains, "dense-dm", "bpb", "avg") == expected


def test_another_row_may_be_held_against_the_others():
    chains = [[row("btx", 9.0), row("btx-even", 1.0), row("soup", 1.2)]] * 2
    assert verdict(chains, "soup", "bpb", "avg", "btx-even") == "ahead by 0.200 ± 0.000"


def test_rows_cross_where_their_mixed_text_has_equal_bits():
    """0.9 (1 - p) + 1.0 p = 0.8 (1 - p) + 1.3 p at p = 1 / 4."""
    ours, theirs = ({"bpb": {"avg": pure}, "spliced": {"avg": spliced}} for pure, spliced in ((0.9, 1.0), (0.8, 1.3)))
    assert share_at_par(ours, theirs) == share_at_par(theirs, ours) == pytest.approx(0.25)
    ahead = {"bpb": {"avg": 0.8}, "spliced": {"avg": 0.9}}
    assert share_at_par(ours, ahead) is share_at_par(ahead, ours) is share_at_par(ours, ours) is None
    rows = [{"name": "btx", **ours}, {"name": "btm-top1", **theirs}, {"name": "dense-dm", **ahead}]
    assert crossing_lines(rows) == ["- btx has fewer bits than btm-top1 from 25.0% on"]


def test_higher_accuracy_is_ahead():
    chains = [[row("btx", 1.0, 0.40 + x), row("soup", 1.0, 0.30)] for x in (0.0, 0.01, 0.02)]
    assert difference(chains, "soup", "accuracy", "avg") == (pytest.approx(0.11), pytest.approx(0.0248, rel=0.01))
    assert verdict(chains, "soup", "accuracy", "avg") == "ahead by 11.0 ± 2.5 points"


def test_being_within_3_percent_at_home():
    rows = [row("expert-math", 1.0), row("btx", 1.03)]
    assert home_lines(rows) == ["- yes: btx is within 3 % of expert-math at home (1.030 and 1.000)"]
    assert home_lines([rows[0], row("btx", 1.031)])[0].startswith("- **no**")


def test_means_and_sample_deviations():
    rows = [{"bpb": {"avg": x}, "accuracy": {"avg": 2 * x}, "edit_similarity": {}} for x in (1.0, 2.0, 6.0)]
    found = mean_and_std(rows)
    assert found["bpb"]["avg"] == 3 and found["accuracy"]["avg"] == 6
    assert found["std"]["bpb"]["avg"] == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert json.dumps(mean_and_std(rows[:1])["std"]["bpb"]) == '{"avg": 0.0}'
