"""Chains and the comparison: recipes read back from run.json, budgets counted in logs, verdicts worked out by hand."""

import ast
import dataclasses
import itertools
import json
import os
import re
import shutil

import pytest
import torch
from helpers import SHAPE, SHORT, read, read_json, read_log

from common.config import parse
from common.errors import UserError
from finetune import FinetuneConfig
from mix import MixConfig
from study import chain, compare, tables
from study.tables import difference, home_lines, mean_and_std, verdict
from train import NOT_IN_RECIPE, TrainConfig

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The chain of random seed 3, as run.sh places it."""
    return str(tmp_path_factory.mktemp("chain") / "out" / "seed3")


@pytest.fixture(scope="module")
def config(chain_configs, out):
    """Flags that are no defaults and not the same twice; those of conftest's configs are others again."""
    flags = {"seed_flags": "--adam_beta2=0.9", "expert_flags": "--adam_beta2=0.91"}
    flags |= {"finetune_flags": "--adam_beta2=0.92", "branch_flags": "--learning_rate=4e-3"}
    flags |= {"paper_flags": "--learning_rate=5e-4 --router_learning_rate=2.0", "paper_share": 0.3}
    flags |= {"merge_flags": "--learning_rate=6e-3", "even_flags": "--router_learning_rate=5.0"}
    flags |= {"contrasts": "btx:dense-cm, btx-paper:upcycle-cm", "sweep": "dense-cm,upcycle-cm,btx-paper,btx"}
    flags |= {"settings": "--learning_rate=1e-3|--learning_rate=3e-3"}
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


def literals(*flags):
    """{"max_steps": 12, ...} of flags such as --max_steps=12."""
    pairs = (flag.removeprefix("--").split("=") for flag in flags)
    return {name: value if name in ("device", "dtype") else ast.literal_eval(value) for name, value in pairs}


BRANCH = {"freeze": "embeddings,attention,norms", "weight_decay": 0.05, "adam_beta2": 0.91}
WHOLE = {**BRANCH, "freeze": "none"}
FINETUNING = {"weight_decay": 0.06, "adam_beta2": 0.92, "router_learning_rate": 3.0, "router_aux_loss_coef": 0.03}
RIVALS = {
    "dense": ("seed", {**WHOLE, "learning_rate": 2e-3, "min_learning_rate": 0.2}),
    "upcycle": ("compare/upcycled", {**FINETUNING, "learning_rate": 1e-3, "router_aux_loss_coef": 0.02}),
}
RECIPES = {  # folder: (where it starts, what it sets)
    "seed": ("", {"adam_beta2": 0.9}),
    "btx": ("mixed", FINETUNING),
    "compare/btx-sample": ("mixed", {**FINETUNING, "router": "sample"}),
    "compare/btx-paper": ("compare/paper/mixed", {**FINETUNING, "learning_rate": 5e-4, "router_learning_rate": 2.0}),
    "compare/btx-even": ("compare/even/mixed", {**FINETUNING, "router_learning_rate": 5.0}),
    **{f"compare/{name}-{by}": settings for name, settings in RIVALS.items() for by in ("dm", "cm", "tm")},
}
for domain in ("math", "rain"):
    RECIPES |= {f"{folder}expert-{domain}": ("seed", BRANCH) for folder in ("", "compare/even/")}
    RECIPES[f"compare/paper/expert-{domain}"] = "seed", {**WHOLE, "learning_rate": 4e-3}
    RECIPES[f"compare/longer/expert-{domain}"] = "seed", {**WHOLE, "learning_rate": 6e-3}


@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_recipe_of_every_run(name, out, data, results):
    """Its stage's config, the stage's flags, and the row's own on top, and nothing else; steps, splices and domains are
    for the tests below."""
    start, settings = RECIPES[name]
    kind = FinetuneConfig if "router_learning_rate" in settings else TrainConfig
    shape = literals(*SHAPE) if name == "seed" else {}  # a checkpoint brings it
    expected = {**dataclasses.asdict(kind()), **literals(*SHORT), **shape, **settings, "seed": 3}
    expected |= {"out_dir": f"{out}/{name}", "init_from": f"{out}/{start}" if start else "", "data_dir": data}
    found = recipe(out, name)["config"]
    assert expected.pop("loss_on") == "text" and "loss_on" not in found  # as in older runs
    for computed in ("max_steps", "splice", "domain", *NOT_IN_RECIPE):
        expected.pop(computed)
        found.pop(computed, None)
    assert found == expected
    assert list(recipe(out, name)["parents"]) == ([f"{out}/{start}"] if start else [])


def test_every_run_reads_its_domains(out, results):
    """Rivals see each domain as often as BTX does: in a branch's 12 steps and half of the finetuning's."""
    for name in RECIPES:
        branch = re.fullmatch("(?:.*/)?expert-(.*)", name)
        rival = f"math:{18 * 8 * 32},rain:{18 * 8 * 32}" if re.search("(dense|upcycle)-", name) else "math,rain"
        assert recipe(out, name)["config"]["domain"] == (branch[1] if branch else rival), name


@pytest.mark.parametrize(
    "name, start, branches",
    [
        ("mixed", "ridge", ""),
        ("compare/even/mixed", "ridge", "compare/even/"),
        ("compare/paper/mixed", "normal", "compare/paper/"),
        ("compare/upcycled", "normal", None),
    ],
)
def test_the_whole_recipe_of_every_mixture(name, start, branches, out, data, results):
    """As printed, routers start at random; so do upcycling's, whose experts are copies of the seed model."""
    found = recipe(out, name)
    experts = [f"{out}/{branches}expert-{domain}" for domain in ("math", "rain")]
    experts = [*(experts if branches is not None else [f"{out}/seed"] * 2), f"{out}/seed"]
    expected = {"experts": ",".join(experts), "out_dir": f"{out}/{name}", "router_init": start, "data_dir": data}
    expected = {**dataclasses.asdict(MixConfig()), **expected, "seed": 3}
    left_out = ("overwrite", "dry_run", "mixture", "add", "remove")  # the last three where no mixture is changed
    assert found["config"] == {name: value for name, value in expected.items() if name not in left_out}
    assert list(found["parents"]) == list(dict.fromkeys(experts))


SPLICED = 0.4 * 12 * 8 * 32  # tokens of BTX's finetuning that are in windows which change domain


def test_whoever_reads_all_domains_reads_as_many_spliced_windows_as_btx(out, results):
    """In tokens; a run of fewer tokens than that reads nothing else. Branches read none."""
    rows = [name for name in RECIPES if name != "seed" and "expert-" not in name]
    assert len(rows) == 10
    for name in rows:
        tokens = read_log(f"{out}/{name}")[-1]["tokens"]
        splice = recipe(out, name)["config"]["splice"]
        assert splice * tokens == pytest.approx(min(SPLICED, tokens)), name
        assert tokens >= SPLICED or name.endswith("-tm"), name
    assert {recipe(out, name)["config"]["splice"] for name in RECIPES if "expert-" in name} == {0.0}


def test_a_rivals_own_splice_wins(chain_configs, out):
    flags = {"expert_flags": "--splice=0.3", "finetune_flags": "--splice=0.5"}
    settings = {"configs": chain_configs, "out_dir": out, "domains": "math,rain", "report": False, **flags}
    found = []
    for own in ({}, {"dense_flags": "--splice=0.125", "upcycle_flags": "--splice=0.375"}):
        made = chain.Chain(chain.ChainConfig(**settings, **own))
        chain.pipeline(made)
        jobs = {job.name: parse(FinetuneConfig, job.arguments[1:]) for job in made.jobs if job.trains}
        found.append([jobs[f"compare/{name}-cm"] for name in ("dense", "upcycle")])
    for one in found[0]:  # neither the branches' nor the finetuning's
        assert one.splice * one.max_steps * 8 * 32 == pytest.approx(0.5 * 12 * 8 * 32)
    assert [one.splice for one in found[1]] == [0.125, 0.375]


def test_rows_that_are_asked_for(config, out, results, monkeypatch):
    """Beside the chain's own and Branch-Train-Merge; each is what it is among all rows. Nothing else is trained."""
    ran = []
    monkeypatch.setattr(chain.Chain, "run", lambda made: ran.append({job.name: job.arguments for job in made.jobs}))
    for rows in ("", "btx-paper,dense-dm"):
        compare.train_and_score(dataclasses.replace(config, rows=rows), "3")
    every, some = ran
    assert all(every[name] == arguments for name, arguments in some.items())
    left_out = {name for name in every if re.fullmatch(".*(-tm|upcycle-dm|btx-sample|btx-even)", name)}
    assert every.keys() - some.keys() == left_out | {name for name in every if name.startswith("compare/even/")}
    with pytest.raises(UserError, match="no row soup; choose from dense-dm, upcycle-dm, btx-paper"):
        compare.baselines(dataclasses.replace(config, rows="btx-paper,soup"), compare.chain_with(config, "3"))


def test_data_matched_rows_see_the_tokens_of_btx(out, results):
    assert spent(out, "btx") == 36 * 8 * 32  # two branches and a finetuning of 12 steps each
    for name in ("dense-dm", "upcycle-dm"):
        assert spent(out, f"compare/{name}") == spent(out, "btx")


def test_compute_matched_rows_take_the_flops_of_btx(out, results):
    ours = spent(out, "btx", "flops")
    for name in ("compare/dense-cm", "compare/upcycle-cm", "compare/btx-even", "compare/btx-paper"):
        last = read_log(f"{out}/{name}")[-1]
        runs = 3 if "btx" in name else 1  # each in whole steps
        assert abs(spent(out, name, "flops") - ours) <= runs * last["flops"] / last["step"] / 2, name
    longer = sum(read_log(f"{out}/compare/longer/expert-{domain}")[-1]["flops"] for domain in ("math", "rain"))
    assert abs(longer - ours) <= read_log(f"{out}/compare/longer/expert-math")[-1]["flops"] / 10


@pytest.mark.parametrize("name, share", [("even", 0.5), ("paper", 0.3)])
def test_the_share_of_tokens_in_the_finetuning(name, share, out, results):
    branches = [read_log(f"{out}/compare/{name}/expert-{domain}")[-1]["tokens"] for domain in ("math", "rain")]
    finetuning = read_log(f"{out}/compare/btx-{name}")[-1]["tokens"]
    assert branches[0] == branches[1] and spent(out, f"compare/btx-{name}") == sum(branches) + finetuning
    assert abs(finetuning - share * (sum(branches) + finetuning)) <= 8 * 32  # all in whole steps


def test_time_matched_rows_take_the_seconds_of_btx(config, out, results):
    """By the times of single steps, measured once: a second chain takes the same number of steps."""
    seconds = read_json(f"{config.out_dir}/report/step_times.json")["seconds"]
    assert seconds.keys() == {"branch", "finetuning", "dense", "upcycling"} and min(seconds.values()) > 0
    spent = 2 * 12 * seconds["branch"] + 12 * seconds["finetuning"]
    for name, stage in {"dense": "dense", "upcycle": "upcycling"}.items():
        expected = max(1, round(spent / seconds[stage]))
        assert recipe(out, f"compare/{name}-tm")["config"]["max_steps"] == expected
    assert compare.times_of(config, compare.chain_with(config, "7")) == seconds


def test_steps_of_all_stages_are_timed_beside_each_other(config, out, results, monkeypatch):
    """The median over the rounds, without the first. Each stage is timed with what it trains: in this clock a step
    takes a second for each group of tensors that trains, and ten for each expert."""
    budget, clock, order, threads = compare.chain_with(config, "3").budget, [0.0], [], []

    def timed_step(corpus, settings, model_config, frozen):
        usual = 10 * model_config.num_local_experts + 4 - len(frozen.replace("none", "").split(","))

        def step(number):
            assert threads == [1]
            order.append((number, settings.learning_rate))
            clock[0] += {0: 500, 3: 300}.get(number, usual)  # the first step, and one that was disturbed

        return step

    monkeypatch.setattr(compare, "timed_step", timed_step)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    found = compare.step_seconds(budget, None, rounds=6)
    assert found == {"branch": 1, "dense": 3, "finetuning": 33, "upcycling": 33} and threads == [1, 8]
    rates = [3e-3, 3e-3, 2e-3, 1e-3]  # a branch's, the finetuning's, dense training's, upcycling's
    assert order == [(number, rate) for number in range(6) for rate in rates]


def test_a_timed_step_is_a_step_of_training(config, out, data, results):
    """The loss of a model of random weights: a step of the same number sees the same text, and has learned from it."""
    budget = compare.chain_with(config, "3").budget
    torch.manual_seed(1)
    step = compare.timed_step(compare.Corpus(data), budget.upcycling, budget.mixed_config, "none")
    losses = [step(3) for _ in range(4)]  # after the warm-up
    assert losses[0] == pytest.approx(5.77, abs=0.5)  # ln 320
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_the_report(config, results):
    chains = [results["rows"]] * 2
    found = {"rows": compare.mean_rows(chains), "chains": chains, "config": {}}
    report = f"{config.out_dir}/compare-report"
    os.makedirs(report)
    found |= {"baselines": results["baselines"], "versions": results["versions"]}
    compare.write_comparison(report, found, config.primary)
    found = read_json(f"{report}/compare.json")
    assert [(one["ours"], one["theirs"]) for one in found["primary"]] == [
        ("btx", "dense-cm"),
        ("btx-paper", "upcycle-cm"),
    ]
    rows = {row["name"]: row for row in found["rows"]}
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
        "btm-share",
        "btm-share-cm",
    }
    assert rows.keys() >= needed
    assert rows["btm-top1-cm"]["train_flops"] == pytest.approx(rows["btx"]["train_flops"], rel=0.02)
    own = {row["name"]: row for row in results["rows"]}
    for name, row in rows.items():
        assert row["bpb"] == own[name]["bpb"] and row["std"]["bpb"]["avg"] == 0  # twice the same
    text = read(f"{report}/compare.md").decode()
    assert all(f"| {name} |" in text for name in rows) and "Branch-Train-MiX | dense, same FLOPs |" in text
    assert all(os.path.exists(f"{report}/{name}.png") for name in ("compare", "efficiency"))


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


def names_in(table):
    return [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]


def test_the_headline(results):
    text = tables.headline_table(results["rows"])
    assert text.count("\n") == 6 and "±" not in text
    wanted = ["seed model", "dense training", "sparse upcycling", "Branch-Train-Merge", "**Branch-Train-MiX**"]
    assert names_in(text) == wanted


def test_the_headline_of_the_comparison(out, results):
    """With BTX in both forms, and how much more upcycling takes for BTX's tokens by the FLOPs in the logs."""
    text = tables.comparison_table(results["rows"])
    more = spent(out, "compare/upcycle-dm", "flops") / spent(out, "compare/upcycle-cm", "flops")
    wanted = ["seed model", "dense training", "sparse upcycling", f"sparse upcycling, {more:.1f} times the FLOPs"]
    wanted += ["Branch-Train-Merge, the nearest expert", "Branch-Train-Merge, all experts"]
    wanted += ["**Branch-Train-MiX as printed**", "**Branch-Train-MiX, branches train feed-forwards alone**"]
    assert names_in(text) == wanted and text.count("\n") == 9


def test_the_sweep_scores_on_validation_text(config, out, results):
    found = compare.sweep(config)
    places = {"dense-cm": "", "upcycle-cm": "", "btx-paper": "0.3/", "btx": "0.333/"}
    assert list(found) == list(places)
    for name, scores in found.items():
        share = f"share {places[name].strip('/')}; branches as configured; " if places[name] else ""
        assert list(scores) == [f"{share}--learning_rate={rate}" for rate in ("1e-3", "3e-3")]
        for rate, score in zip(("1e-3", "3e-3"), scores.values(), strict=True):
            folder = f"compare/sweep/{name}/{places[name]}learning_rate-{rate}"
            assert score == read_log(f"{out}/{folder}")[-1]["bpb"]["avg"]
            settings = recipe(out, folder)["config"]
            assert settings["learning_rate"] == float(rate)
            # but for the rate it is the row of the comparison
            usual = recipe(out, name if name == "btx" else f"compare/{name}")["config"]
            assert settings["splice"] == pytest.approx(usual["splice"])
            changed = {key for key in usual if usual[key] != settings[key]}
            assert changed <= {"out_dir", "init_from", "learning_rate", "splice"}
        assert len(set(scores.values())) == 2


def test_the_sweep_over_branches_and_shares(config, out, results, monkeypatch):
    """Each setting of the branches with each share makes branches and a mixture of its own, from which each setting of
    the last stage starts; a score is that of the folder which was trained as its label says. FLOPs are BTX's."""
    jobs = {}

    def run(made, quiet=False):
        for job in made.jobs:
            jobs[job.name] = job.arguments
            folder = f"{out}/{job.name}"
            if job.arguments[0] == "finetune.py":
                os.makedirs(folder)
                with open(f"{folder}/log.jsonl", "w") as file:
                    file.write(json.dumps({"bpb": {"avg": folder}}))

    monkeypatch.setattr(chain.Chain, "run", run)
    shares, of_branches = (0.2, 0.45), ("--learning_rate=7e-3", "--adam_beta1=0.8")
    settings = ("", "--learning_rate=8e-4 --weight_decay=0.5")
    changes = {"shares": ",".join(map(str, shares)), "branch_settings": " | ".join(of_branches)}
    changes |= {"sweep": "btx-paper,btx", "settings": "|".join(settings)}
    found = compare.sweep(dataclasses.replace(config, **changes))
    assert len(jobs) == 1 + 2 * 4 * (2 + 1 + 2)  # the seed; for both rows two branches, a mixture, two finetunings
    flops = {name: read_log(f"{out}/{name}")[-1] for name in ("btx", "expert-math", "compare/paper/expert-math")}
    flops = {name: last["flops"] / last["step"] for name, last in flops.items()}
    for name, scores in found.items():
        assert len(scores) == len(set(scores.values())) == 8
        for share, branching, text in itertools.product(shares, of_branches, settings):
            folder = scores[f"share {share}; branches {branching}; {text}"]
            assert folder.startswith(f"{out}/compare/sweep/{name}/{share}-")
            last = parse(FinetuneConfig, jobs[os.path.relpath(folder, out)][1:])
            usual = (5e-4, 2.0) if name == "btx-paper" else (3e-3, 3.0)
            rate, decay = (8e-4, 0.5) if text else (usual[0], 0.06)
            assert (last.learning_rate, last.weight_decay, last.router_learning_rate) == (rate, decay, usual[1])
            mixed = parse(MixConfig, jobs[os.path.relpath(last.init_from, out)][1:])
            assert mixed.router_init == ("normal" if name == "btx-paper" else "ridge")
            *folders, seed = mixed.experts.split(",")
            branches = [parse(TrainConfig, jobs[os.path.relpath(one, out)][1:]) for one in folders]
            assert seed == f"{out}/seed" and [one.domain for one in branches] == ["math", "rain"]
            printed = {"freeze": "none", "learning_rate": 4e-3} if name == "btx-paper" else {}
            printed = {"freeze": BRANCH["freeze"], "learning_rate": 3e-3, **printed, **literals(branching)}
            for one in branches:
                assert {key: getattr(one, key) for key in printed} == printed
                assert one.max_steps == branches[0].max_steps and one.splice == 0
            steps = last.max_steps, 2 * branches[0].max_steps
            assert abs(steps[0] - share * sum(steps)) <= 1
            assert last.splice * steps[0] * 8 * 32 == pytest.approx(min(SPLICED, steps[0] * 8 * 32))
            branch = flops["compare/paper/expert-math" if name == "btx-paper" else "expert-math"]
            total = steps[0] * flops["btx"] + steps[1] * branch
            assert abs(total - spent(out, "btx", "flops")) <= flops["btx"] / 2 + branch


def test_rows_that_nobody_sweeps(config, out, results):
    with pytest.raises(UserError, match="soup cannot be swept; choose from dense-cm"):
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


def test_what_run_sh_is_given_reaches_every_chain(chain_configs, data):
    """And random seed 1 is where `bash run.sh` has it, whatever stands first."""
    given = {"launch": "torchrun", "jobs": 3, "flags": "--dtype=float32", "domains": "math,rain", "data_dir": data}
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


def row(name, *bits, marks=(1, 0)):
    """A row of results.json by its bits in each window, of a byte each, and its marks for each question."""
    mean, right = sum(bits) / len(bits), sum(marks) / len(marks)
    found = {"name": name, "bpb": {"math": mean, "avg": mean}, "accuracy": {"math": right, "avg": right}}
    found |= {"bits": {"math": list(bits)}, "bytes": {"math": [1] * len(bits)}}
    return {**found, "marks": {"accuracy": {"math": list(marks)}}}


def number(text):
    """The half width in a verdict."""
    return float(re.search(r"± ([\d.]+)", text)[1])


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
    """All windows alike, so that the text leaves nothing open; the half width is of drawn samples."""
    chains = [
        [row("btx", ours, ours), row("dense-dm", theirs, theirs)] for ours, theirs in zip(btx, other, strict=True)
    ]
    found = verdict(chains, "dense-dm", "bpb", "avg")
    assert re.sub(r"± [\d.]+", "", found) == re.sub(r"± [\d.]+", "", expected)
    assert number(found) == pytest.approx(number(expected), rel=0.05)


def test_another_row_may_be_held_against_the_others():
    chains = [[row("btx", 9.0), row("btx-even", 1.0), row("soup", 1.2)]] * 2
    assert verdict(chains, "soup", "bpb", "avg", "btx-even") == "ahead by 0.200 ± 0.000"


def test_a_comparison_of_some_rows_holds_what_they_allow(results, config, tmp_path):
    """As --rows=btx-paper makes it: no btx-even to hold against others, and no contrast with what is not there."""
    some = [one for one in results["rows"] if one["name"] not in ("btx-even", "upcycle-dm", "dense-dm")]
    chains = [some, some]
    found = {name: results[name] for name in ("config", "baselines", "versions")}
    found |= {"rows": compare.mean_rows(chains), "chains": chains}
    compare.write_comparison(str(tmp_path), found, [("btx", "upcycle-dm"), ("btx-even", "seed"), ("btx", "seed")])
    primary = read_json(f"{tmp_path}/compare.json")["primary"]
    assert [(one["ours"], one["theirs"]) for one in primary] == [("btx", "seed")]
    page = read(f"{tmp_path}/compare.md")
    assert b"btx-paper against" in page and b"| btx-even" not in page
    assert b"left out by --rows: btx against upcycle-dm." in page and b"--rows: btx-even against seed." in page


def test_higher_accuracy_is_ahead():
    """Of a hundred questions 40, 41 and 42 right against 30 of the same: the chains' 4.30 * 0.01 / sqrt(3), and the
    text's, whose deviation is 0.31: a tenth of it for the mean, times sqrt(3 / 2) and 4.30."""
    chains = []
    for more in (10, 11, 12):
        marks = {"btx": [1] * (30 + more) + [0] * (70 - more), "soup": [1] * 30 + [0] * 70}
        chains.append([row(name, 1.0, marks=some) for name, some in marks.items()])
    ahead, half = difference(chains, "soup", "accuracy", "avg")
    text = 0.11 * 0.89 - 2 / 3 * 0.02 / 3  # two questions are right in some chains: 1/3 and 2/3 of the time
    expected = 4.30 * (0.01**2 / 3 + text / 100 * 3 / 2) ** 0.5
    assert ahead == pytest.approx(0.11) and half == pytest.approx(expected, rel=0.05)
    assert verdict(chains, "soup", "accuracy", "avg") == f"tie (+11.0 ± {100 * half:.1f} points)"
    sure = [[row("btx", 1.0, marks=[1, 1, 1]), row("soup", 1.0, marks=[0, 0, 0])]] * 2
    assert verdict(sure, "soup", "accuracy", "avg") == "ahead by 100.0 ± 0.0 points"


@pytest.mark.parametrize("contrasts", ["btx", "btx:soup:seed", "btx:rain"])
def test_contrasts_that_are_no_pairs_of_rows(contrasts):
    with pytest.raises(UserError, match=f"--contrasts: '{contrasts}' is not a pair of rows"):
        compare.CompareConfig(contrasts=f"btx:soup,{contrasts}")


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
