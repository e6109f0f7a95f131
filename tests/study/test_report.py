"""The report of one chain: what the screen shows, which rows are marked, and what expected.json says of them."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import ROOT, must, read, read_json, run

from study import tables
from study.report import differences


@pytest.fixture(scope="module")
def results(seed, btx, eval_config, tmp_path_factory):
    """results.json of a seed model and a mixture, as eval.py wrote it."""
    folder = tmp_path_factory.mktemp("scores")
    must(run("eval.py", eval_config, f"--model={seed},{btx}", f"--out_dir={folder}"))
    return read_json(folder / "results.json")


@pytest.fixture
def report(results, tmp_path):
    """A function that writes results.json with changed rows, makes the report, and returns the folder and the run."""

    def make(change=lambda row: row, *flags):
        rows = [change(json.loads(json.dumps(row))) for row in results["rows"]]
        (tmp_path / "results.json").write_text(json.dumps({**results, "rows": rows}))
        return tmp_path, run("study/report.py", f"--report={tmp_path}", *flags)

    return make


def table_lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_screen_ends_with_the_headline(results, report):
    folder, done = report()
    must(done)
    header, _, *rows = [line.strip("| ").split(" | ") for line in table_lines(done.out)]
    scores = ["bits per byte", "where domains meet", "choices right"]
    assert header == [*scores, "parameters per token", "training FLOPs"] and len(rows) == 2
    for row, name, scores in zip(results["rows"], ("seed model", "**Branch-Train-MiX**"), rows, strict=True):
        bits, spliced, choice = row["bpb"]["avg"], row["spliced"]["avg"], row["choice"]["avg"]
        assert scores[:4] == [name, f"{bits:.3f}", f"{spliced:.3f}", f"{choice:.1%}"]
        assert scores[4:] == [tables.short(row["active_params"]), tables.short(row["train_flops"])]
    assert done.out.strip().splitlines()[-1] == f"{folder}/report.md has every row, the costs and the pictures"
    assert "†" not in done.out and "†" not in read(f"{folder}/report.md").decode()


def test_a_row_scored_by_other_source_has_a_dagger(report):
    def older(row):
        return {**row, "source": {**row["source"], "model.py": "another"}} if row["name"] == "btx" else row

    folder, done = report(older)
    for text in (must(done).out, read(f"{folder}/report.md").decode()):
        assert text.count("\n\n† made before model.py changed\n") == 1
    marked = [line.split(" | ")[0] for line in table_lines(done.out) if "†" in line]
    assert marked == ["| **Branch-Train-MiX** †"]
    assert "| btx † |" in read(f"{folder}/report.md").decode()


def test_a_row_without_a_record_of_its_source_has_a_dagger(report):
    folder, done = report(lambda row: {key: value for key, value in row.items() if key != "source"})
    assert must(done).out.count(" † |") == 2
    assert "† made before the source was recorded\n" in read(f"{folder}/report.md").decode()


def test_a_run_without_a_record_of_its_source(results, btx, tmp_path):
    """run.json of before, which a resumed run gives an empty leg."""
    row = results["rows"][1]

    def stale_with(runs):
        changed = {**row, "runs": runs}
        tables.mark_stale(changed)
        return changed["stale"]

    assert row["runs"][-1] == btx and stale_with(row["runs"]) == []
    record = read_json(os.path.join(btx, "run.json"))
    unrecorded = {name: value for name, value in record.items() if name != "source"}
    for old in (unrecorded, {**record, "source": [{"step": 0, "files": {}}, *record["source"]]}):
        (tmp_path / "run.json").write_text(json.dumps(old))
        assert stale_with([str(tmp_path)]) is None
    assert stale_with([str(tmp_path / "gone")]) == []


def test_a_row_is_stale_when_mix_py_has_changed_since_its_mixing(results, btx, tmp_path):
    """The mixture between branches and finetuning trains nothing, so it is none of the row's runs."""
    [mixed] = read_json(os.path.join(btx, "run.json"))["recipe"]["parents"]
    record = read_json(os.path.join(mixed, "run.json"))
    record["source"][0]["files"]["mix.py"] = "another"
    shutil.copytree(mixed, tmp_path / "mixed")
    (tmp_path / "mixed" / "run.json").write_text(json.dumps(record))
    tuned = read_json(os.path.join(btx, "run.json"))
    tuned["recipe"]["parents"] = {str(tmp_path / "mixed"): ""}
    (tmp_path / "run.json").write_text(json.dumps(tuned))
    row = {**results["rows"][1], "runs": [str(tmp_path)]}
    tables.mark_stale(row)
    assert row["stale"] == ["mix.py"]


def test_what_is_stale_of_a_mean():
    new, old, oldest = {"stale": []}, {"stale": ["train.py"]}, {"stale": None}
    assert tables.stale_together([new, {}]) == []
    assert tables.stale_together([old, {"stale": ["eval.py", "train.py"]}]) == ["eval.py", "train.py"]
    assert tables.stale_together([old, oldest]) is None
    assert tables.stale_line([new, {}]) == ""
    assert tables.stale_line([old, oldest]) == ("\n\n† made before train.py changed, or before the source was recorded")


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (0.011, 1)])
def test_what_lies_outside_ends_with_an_exit_code(results, report, tmp_path, shift, code):
    value = results["rows"][0]["bpb"]["avg"]
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps({"bpb": {"seed": {"avg": [value + shift, 0.01]}}, "ahead": []}))
    _, done = report(lambda row: row, f"--expected={expected}")
    assert done.code == code
    last = done.out.strip().splitlines()[-1]
    assert last == "all as expected" if not code else last.startswith("NO seed ")


def test_what_is_expected_of_a_row_that_is_not_there(report, tmp_path):
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps({"bpb": {}, "ahead": [["btx", "dense-cm", "avg", 0.0]]}))
    _, done = report(lambda row: row, f"--expected={expected}")
    assert done.code == 2 and done.err.count("\n") == 1 and "has no row dense-cm" in done.err


@pytest.mark.parametrize("chain", range(5))
def test_what_is_expected_of_config_cpu_holds_in_every_chain_and_notices_a_lost_lead(chain):
    """The random seeds of the comparison; then a finetuning that did nothing, and a BTX a little worse than any."""
    chains = read_json(os.path.join(ROOT, "results", "cpu", "compare.json"))["chains"]
    rows = {row["name"]: row for row in chains[chain]}
    expected = read_json(os.path.join(ROOT, "config", "cpu", "expected.json"))
    assert all(holds for _, holds in differences(rows, expected))
    for worse in (rows["mixed"]["bpb"]["avg"], rows["dense-cm"]["bpb"]["avg"] + 0.016):
        lost = rows | {"btx": {**rows["btx"], "bpb": {**rows["btx"]["bpb"], "avg": worse}}}
        wrong = [text for text, holds in differences(lost, expected) if not holds]
        assert any(text.startswith("btx is ahead of dense-cm") for text in wrong)


def test_an_interval_of_windows_drawn_anew():
    """Against the normal distribution: many windows of one size, whose differences have a known spread. A difference
    that is the same in every window has no interval."""
    random = np.random.default_rng(1)
    sizes, base = [800] * 400, random.normal(900, 100, 400)
    saved = random.normal(20, 80, 400)  # bits that ours needs fewer
    row = {"bytes": {"code": sizes}, "bpb": {"code": 0.0, "avg": 0.0}, "bits": {"code": base.tolist()}}
    other = {**row, "bits": {"code": (base + saved).tolist()}}
    ahead, low, high = tables.resampled(row, other, "bpb")
    half = 1.96 * saved.std() / 400**0.5 / 800
    assert ahead == pytest.approx(saved.mean() / 800)
    assert (low, high) == pytest.approx((ahead - half, ahead + half), abs=0.1 * half)
    same = {**row, "bits": {"code": (base + 16).tolist()}}
    assert tables.resampled(row, same, "bpb") == pytest.approx((0.02, 0.02, 0.02))


def test_the_report_says_how_sure_it_is(results, report):
    folder, done = report()
    must(done)
    text = read(f"{folder}/report.md").decode().split("## How sure")[1].split("##")[0]
    [row] = table_lines(text)[2:]
    ours, theirs = (next(r for r in results["rows"] if r["name"] == name)["bpb"]["avg"] for name in ("btx", "seed"))
    assert row.startswith("| seed | ") and f"{theirs - ours:+.3f} (" in row


def test_questions_that_lm_eval_asked_are_in_the_report(report, tmp_path):
    """Files as lm_eval writes them: the later one of a model counts, normalised accuracy where there is one."""

    def write(model, stamp, **tasks):
        folder = tmp_path / "questions" / f"__{model}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"results_{stamp}.json").write_text(json.dumps({"model_name": f"out/{model}/", "results": tasks}))

    plain = {"acc,none": 0.5, "acc_stderr,none": 0.04}
    both = {**plain, "acc_norm,none": 0.625, "acc_norm_stderr,none": 0.03}
    write("seed", "2026-01-01", btx_piqa=plain)
    write("seed", "2026-01-02", btx_piqa=both, other=plain)
    write("btx", "2026-01-01", btx_piqa=plain, other=both)
    folder, done = report()
    must(done)
    text = read(f"{folder}/report.md").decode().split("## Questions")[1]
    assert table_lines(text)[0] == "| model | piqa | other |"
    assert "| seed | 62.5% ± 3.0% | 50.0% ± 4.0% |" in text and "| btx | 50.0% ± 4.0% | 62.5% ± 3.0% |" in text
    assert read_json(f"{folder}/questions.json")["seed"]["piqa"] == [0.625, 0.03]
