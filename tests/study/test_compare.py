"""The comparison: data and FLOPs matched, costs against hand-computed ones, verdicts against cases worked out."""

import json
import os

import pytest
from helpers import SHORT, must, read, read_json, read_log, run, weights

from common.errors import UserError
from study import compare
from study.clock import read_matched
from study.compare import Chain, CompareConfig, evaluate, sweep, train_baselines, write_report
from study.cost import Run, bytes_sent, critical_seconds, lineage
from study.tables import crossing, crossing_lines, difference, home_lines, mean_and_std, verdict

# ---- cost ----

A = Run((), frozenset(), seconds=10.0, steps=100, parameters=1000)  # the seed
BRANCHES = [Run(("a",), frozenset("a"), seconds=s, steps=50, parameters=1000) for s in (3.0, 5.0)]
MIX = Run(("b", "c", "a"), frozenset("abc"), seconds=0.0, steps=0, parameters=1800)
FINETUNED = Run(("m",), frozenset("abcm"), seconds=7.0, steps=20, parameters=1800)
CHAIN = {"a": A, "b": BRANCHES[0], "c": BRANCHES[1], "m": MIX, "f": FINETUNED}


def test_the_critical_path_takes_the_slowest_branch():
    assert critical_seconds(CHAIN) == 10 + 5 + 7
    assert critical_seconds({"a": A, "b": BRANCHES[0]}) == 13
    assert critical_seconds({}) == 0


def test_bytes_of_a_ring_all_reduce():
    """A worker sends each of w - 1 parts twice, a part has P / w numbers of 4 bytes, and there are w workers."""
    workers, parameters = 8, 1000
    for_each = 2 * (workers - 1) * parameters / workers * 4
    assert bytes_sent({"a": A}, workers) == 100 * workers * for_each


def test_branches_share_the_workers_and_send_nothing_to_one_another():
    seed, finetuning = 100 * 2 * 7 * 1000 * 4, 20 * 2 * 7 * 1800 * 4
    branches = 2 * 50 * 2 * 3 * 1000 * 4  # four workers each
    assert bytes_sent(CHAIN, workers=8) == seed + branches + finetuning
    assert bytes_sent(CHAIN, workers=2) == 100 * 2 * 1000 * 4 + 0 + 20 * 2 * 1800 * 4  # one worker sends nothing


def test_lineage_of_a_real_chain(seed, experts, mixed, btx):
    runs = lineage([btx])
    assert list(runs) == [*_once([seed, *experts]), mixed, btx]  # parents first
    assert runs[btx].before == {seed, *experts, mixed} and runs[experts[0]].before == {seed}
    assert [runs[name].steps for name in (seed, mixed, btx)] == [12, 0, 12]
    history = read_json(f"{btx}/run.json")["history"]
    assert runs[btx].seconds == history[btx]["seconds"]
    slowest = max(history[expert]["seconds"] for expert in experts)
    assert critical_seconds(runs) == pytest.approx(history[seed]["seconds"] + slowest + history[btx]["seconds"])
    assert lineage(experts).keys() == {seed, *experts}  # an ensemble


def test_what_is_frozen_has_no_gradients_to_send(work, seed, data):
    """A branch that trains its feed-forwards alone: three matrices a layer, counted in the file of weights."""
    must(
        run(
            "train.py",
            *(*SHORT, f"--data_dir={data}", "--max_steps=1", "--domain=math", "--freeze=embeddings,attention,norms"),
            *(f"--init_from={seed}", f"--out_dir={work}/frozen"),
        )
    )
    sizes = {name: tensor.size for name, tensor in weights(f"{work}/frozen").items()}
    trained = lineage([f"{work}/frozen"])
    assert trained[f"{work}/frozen"].parameters == sum(n for name, n in sizes.items() if ".mlp." in name)
    assert trained[seed].parameters == sum(sizes.values())


def _once(names):
    return list(dict.fromkeys(names))


# ---- the baselines ----


@pytest.fixture(scope="module")
def chain(work, seed, experts, mixed, btx):
    """The session's tiny pipeline as a chain, a soup added."""
    must(run("mix.py", f"--experts={','.join([*experts, seed])}", f"--out_dir={work}/soup", "--method=soup"))
    return Chain(work)


@pytest.fixture(scope="module")
def config(work, configs):
    """With the rows matched by time: two branches and a finetuning of 12 steps each, as long as 45 or 20 steps."""
    times = {"spent_by_btx": {"branch": 24, "mixture": 12}, "matched_steps": {"dense-tm": 45, "upcycle-tm": 20}}
    with open(f"{work}/step_times.json", "w") as file:
        json.dump(times, file)
    rates = {"rates": "1e-3,3e-3", "sweep": ",".join(compare.SWEPT)}
    return CompareConfig(configs=configs, out_dir=work, step_times=f"{work}/step_times.json", **rates)


pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def baselines(config, chain, in_this_process):
    return dict(zip((*compare.BASELINES, *compare.TIMED), train_baselines(config, chain), strict=True))


@pytest.fixture(scope="module")
def longer(config, chain, baselines):
    return compare.train_longer_branches(config, chain)


def test_data_matched_rows_see_the_tokens_of_btx(baselines, experts, btx, seed):
    """Counted in the logs, after the seed model."""
    ours = sum(read_log(folder)[-1]["tokens"] for folder in (*experts, btx))
    assert ours == 36 * 8 * 32
    for name in ("dense-dm", "upcycle-dm"):
        assert read_log(baselines[name])[-1]["tokens"] == ours
        run = read_json(f"{baselines[name]}/run.json")
        assert sum(cost["tokens"] for folder, cost in run["history"].items() if folder != seed) == ours


def test_data_matched_rows_see_each_domain_as_often(baselines):
    """Experts: 12 steps of math, 12 of rain. Finetuning: 12 steps of both, evenly."""
    for name in ("dense-dm", "dense-cm", "upcycle-dm", "upcycle-cm"):
        mixture = read_json(f"{baselines[name]}/run.json")["recipe"]["config"]["domain"]
        assert mixture == f"math:{18 * 8 * 32},rain:{18 * 8 * 32}"


def test_compute_matched_rows_take_the_flops_of_btx(baselines, experts, btx):
    ours = sum(read_log(folder)[-1]["flops"] for folder in (*experts, btx))
    for name in ("dense-cm", "upcycle-cm"):
        log = read_log(baselines[name])
        of_a_step = log[-1]["flops"] / log[-1]["step"]
        assert abs(log[-1]["flops"] - ours) <= of_a_step / 2  # whole steps
    steps = {name: read_log(folder)[-1]["step"] for name, folder in baselines.items()}
    assert steps["dense-cm"] > steps["dense-dm"] == steps["upcycle-dm"] == 36 > steps["upcycle-cm"]


def test_time_matched_rows_take_the_measured_steps(baselines):
    """All else is as in the compute-matched rows."""
    for name, steps in (("dense", 45), ("upcycle", 20)):
        timed, computed = (
            read_json(f"{baselines[f'{name}-{by}']}/run.json")["recipe"]["config"] for by in ("tm", "cm")
        )
        assert timed.pop("max_steps") == steps != computed.pop("max_steps")
        del timed["out_dir"], computed["out_dir"]
        assert timed == computed


def test_step_times_of_another_btx_are_refused(work):
    path = f"{work}/step_times.json"
    assert read_matched(path, {"branch": 24, "mixture": 12}) == {"dense-tm": 45, "upcycle-tm": 20}
    with pytest.raises(UserError, match=r"is of a BTX of .*24.* steps, not .*25.*; run study.clock again"):
        read_matched(path, {"branch": 25, "mixture": 12})


def test_a_file_without_step_times_is_refused(tmp_path):
    for text in ("{}", "[1]"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match=r"is of a BTX of None steps.*; run study.clock again"):
            read_matched(tmp_path / "other.json", {"branch": 24, "mixture": 12})


def test_the_sampling_row_is_btx_with_another_router(baselines, mixed):
    recipe = read_json(f"{baselines['btx-sample']}/run.json")["recipe"]
    assert recipe["config"]["router"] == "sample" and list(recipe["parents"]) == [mixed]
    assert recipe["config"]["max_steps"] == 12


def test_the_even_row_has_as_many_tokens_in_its_finetuning_for_the_flops_of_btx(baselines, work, experts, btx):
    branches = [read_log(f"{work}/compare/even/{os.path.basename(expert)}")[-1] for expert in experts]
    finetuning = read_log(baselines["btx-even"])[-1]
    assert branches[0]["tokens"] == branches[1]["tokens"]
    of_a_step = finetuning["tokens"] / finetuning["step"]
    assert abs(sum(log["tokens"] for log in branches) - finetuning["tokens"]) <= 1.5 * of_a_step  # half a step a run
    logs = [*branches, finetuning]
    ours = sum(read_log(folder)[-1]["flops"] for folder in (*experts, btx))
    assert abs(sum(log["flops"] for log in logs) - ours) <= sum(log["flops"] / log["step"] for log in logs) / 2


def test_the_row_as_printed_has_random_routers(baselines, work, seed, experts):
    recipe = read_json(f"{work}/compare/paper/mixed/run.json")["recipe"]
    branches = [f"{work}/compare/paper/{os.path.basename(expert)}" for expert in experts]
    assert recipe["config"]["router_init"] == "normal" and list(recipe["parents"]) == [*branches, seed]
    assert list(read_json(f"{baselines['btx-paper']}/run.json")["recipe"]["parents"]) == [f"{work}/compare/paper/mixed"]


def test_longer_branches_share_the_flops_of_the_finetuning(longer, btx, experts, seed):
    *branches, last = longer
    assert last == seed and [os.path.basename(folder) for folder in branches] == ["expert-math", "expert-rain"]
    logs = [read_log(folder)[-1] for folder in branches]
    ours = sum(read_log(folder)[-1]["flops"] for folder in (*experts, btx))
    assert abs(sum(log["flops"] for log in logs) - ours) <= logs[0]["flops"] / logs[0]["step"]  # half a step each


def test_report_of_a_chain(config, chain, baselines, longer, experts):
    results = evaluate(config, chain, list(baselines.values()), longer)
    chains = [results["rows"]] * 2
    found = {"rows": compare.summarize(chains), "chains": chains, "config": {}}
    report = f"{config.out_dir}/compare-report"
    os.makedirs(report)
    write_report(report, {**found, "baselines": results["baselines"], "versions": results["versions"]})
    rows = {row["name"]: row for row in read_json(f"{report}/compare.json")["rows"]}
    assert rows.keys() >= {"seed", "soup", "btm-top1", "btm-top2", "mixed", "btx", *baselines}
    assert {"btm-top1-cm", "btm-posterior-prefix-cm"} < rows.keys()
    assert rows["btm-top1-cm"]["train_flops"] == pytest.approx(rows["btx"]["train_flops"], rel=0.02)
    own = {row["name"]: row for row in results["rows"]}
    for name, row in rows.items():
        assert row["bpb"] == own[name]["bpb"] and row["std"]["bpb"]["avg"] == 0  # twice the same
    assert rows["btm-top1"]["critical_seconds"] < rows["btx"]["critical_seconds"] < rows["btx"]["seconds"]
    assert rows["upcycle-dm"]["bytes_sent"] > rows["btx"]["bytes_sent"]
    text = read(f"{report}/compare.md").decode()
    assert all(f"| {name} |" in text for name in rows)
    assert os.path.exists(f"{report}/compare.png")


def test_the_sweep_scores_on_validation_text(config, chain, baselines):
    found = sweep(config, chain)
    assert list(found) == list(compare.SWEPT)
    for name, scores in found.items():
        for rate in ("1e-3", "3e-3"):
            folder = chain.path(f"compare/sweep/{name}-{rate}")
            assert scores[rate] == read_log(folder)[-1]["bpb"]["avg"]
            assert read_json(f"{folder}/run.json")["recipe"]["config"]["learning_rate"] == float(rate)
        assert scores["1e-3"] != scores["3e-3"]


def test_an_unfinished_chain_is_named(tmp_path):
    with pytest.raises(UserError, match="seed is not there or not finished; run the pipeline first"):
        Chain(str(tmp_path))


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
    assert crossing(ours, theirs) == crossing(theirs, ours) == pytest.approx(0.25)
    ahead = {"bpb": {"avg": 0.8}, "spliced": {"avg": 0.9}}
    assert crossing(ours, ahead) is crossing(ahead, ours) is crossing(ours, ours) is None
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
