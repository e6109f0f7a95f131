"""The pages' tables are the committed results, to the letter, and the code that README quotes is the source."""

import glob
import inspect
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from helpers import prose

from common.config import parse
from data.prepare import DataConfig
from mix import mix
from model import on_meta
from study import bench, compare, open_ends, report, tables
from study.damage import damage_table
from study.drift import drift_table
from study.regime import regime_table
from train import TrainConfig, build_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(*path):
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


def cells_of(table):
    return [line[2:-2].split(" | ") for line in table.splitlines()]


def part(table, *columns, rows=None):
    """Some columns of a Markdown table, and of its rows all or those whose first cell is among `rows`."""
    header, _, *body = cells_of(table)
    numbers = [header.index(column) for column in columns]
    kept = [line for line in body if rows is None or line[0] in rows]
    return tables.markdown_table(list(columns), [[line[number] for number in numbers] for line in kept])


def test_the_ablations_come_from_their_rows():
    table = tables.ablation_table(json.loads(read("results", "cpu", "ablations.json"))["rows"])
    assert table in read("results", "cpu", "ablations.md")
    assert part(table, "variant", "avg bpb", "paper", "order as in the paper") in read("docs", "variants.md")


@pytest.mark.parametrize("text, seeds", [("cpu", 5), ("text", 3)])
def test_the_comparison_comes_from_its_chains(text, seeds):
    found = json.loads(read("results", text, "compare.json"))
    rows, chains = found["rows"], found["chains"]
    assert compare.mean_rows(chains) == rows and len(chains) == seeds
    page, results = read("results", text, "compare.md"), read("docs", "results.md")
    assert tables.score_table(rows, ("active_params",)) in page and tables.cost_table(rows) in page
    assert tables.verdict_table(rows, chains) in page and tables.comparison_table(rows) in page
    if text == "cpu":
        table = tables.comparison_table(rows)
        assert part(table, *(column for column in cells_of(table)[0] if column != "training FLOPs")) in results
        spent = {line[0]: float(line[-1]) for line in cells_of(table)[2:]}  # said in words
        assert f"{spent.pop('seed model'):.1e}".replace("+", "") in results
        more = [name for name, flops in spent.items() if f"{flops:.1e}" != "2.7e+13"]
        assert "2.7e13" in results and more == ["sparse upcycling, 1.5 times the FLOPs"]
        ahead = [tables.difference(chains, rival, "spliced", "avg") for rival in ("dense-cm", "upcycle-cm")]
        dense, upcycling = (f"{lead:.3f} ± {half:.3f}" for lead, half in ahead)
        said = f"ahead of dense training by {dense} bits per byte, and of upcycling by {upcycling}"
        assert said in " ".join(results.split())
        leads = [tables.difference(chains, "dense-cm", "bpb", domain) for domain in ("wiki", "math", "code")]
        wiki, sums, code = (lead / half for lead, half in leads)
        assert wiki > 1 and sums < -1 and abs(code) <= 1
    else:  # "the ensemble of all experts does best"
        assert min(rows, key=lambda row: row["bpb"]["avg"])["name"] == "btm-share-cm"
    contrasts = [(one["ours"], one["theirs"]) for one in found["primary"]]
    assert found["primary"] == tables.primary_contrasts(chains, contrasts)
    assert tables.primary_table(found["primary"]) in page and tables.primary_table(found["primary"]) in results


def test_the_contrasts_are_those_decided_before_the_run():
    config = parse(compare.CompareConfig, [os.path.join(ROOT, "config", "cpu", "compare.py")])
    for text in ("cpu", "text"):
        primary = json.loads(read("results", text, "compare.json"))["primary"]
        assert [(one["ours"], one["theirs"]) for one in primary] == config.primary


SAID = [
    ("ahead of the seed model by {} bits per byte", "btx", "seed"),
    ("runs all four models for each token, by {}.", "btm-share-cm", "btx"),
    ("the nearest expert alone is ahead by {},", "btm-top1-cm", "btx"),
    ("As printed it is behind dense training by {}.", "dense-cm", "btx-paper"),
    ("on the built-in domains, {} bits per byte in all", "btx", "btx-paper"),
]


def readmes_numbers():
    """{what README's prose says: the numbers in it, from the results}"""
    found = json.loads(read("results", "cpu", "compare.json"))
    said = {}
    for words, ours, theirs in SAID:
        ahead, half = tables.difference(found["chains"], theirs, "bpb", "avg", ours)
        said[words] = f"{ahead:.3f} ± {half:.3f}"
    rows = {row["name"]: row for row in found["rows"]}
    active = rows["btx"]["active_params"] / rows["seed"]["active_params"]
    said["at {} times its parameters per token"] = f"{active:.1f}"
    row = json.loads(read("results", "bench", "bench.json"))["rows"][0]
    times = row["times"]["train"]
    assert row["width"] == 64
    mixtral = (bench.ratio(times, "mixture", f"HF Mixtral, {way}") for way in ("eager", "grouped_mm"))
    said["({} times its speed dense,"] = f"{bench.ratio(times, 'dense', 'HF Llama'):.2f}"
    said["{} as a mixture)"] = f"{min(mixtral):.2f}"
    said["at {} of nanoGPT"] = f"{bench.ratio(times, 'dense', 'nanoGPT'):.2f}"
    assert round(bench.ratio(times, "mixture", "nanoMoE")) == 8  # "eight times as fast"
    config, text = (os.path.join(ROOT, "config", "gpu", name) for name in ("seed.py", "data.py"))
    vocabulary = parse(DataConfig, [text]).vocab_size
    corpus = SimpleNamespace(encoding=SimpleNamespace(n_vocab=vocabulary, eot_token=0))
    with on_meta():
        weights = build_model(parse(TrainConfig, [config]), corpus).parameters()
    said["`bash run.sh gpu` is {} M parameters"] = f"{sum(weight.numel() for weight in weights) / 1e6:.1f}"
    return said


def test_every_number_in_readmes_prose_comes_from_the_results():
    words = " ".join(re.sub(r"^\|.*$", "", prose(read("README.md")), flags=re.M).split())
    numbers = readmes_numbers()
    for said, number in numbers.items():
        assert said.format(number) in words
    known = {part for number in numbers.values() for part in number.split(" ± ")} | {"3.10"}  # of Python
    plain = re.sub(r"\]\(.*?\)|`.*?`", "", words)
    assert set(re.findall(r"\d+\.\d+", plain)) == known


def test_what_readme_says_of_the_results_in_words():
    found = json.loads(read("results", "cpu", "compare.json"))
    assert tables.comparison_table(found["rows"]) in read("README.md") and len(found["chains"]) == 5
    for rival in ("dense-cm", "upcycle-cm"):  # "level ..., a little ahead of both where domains meet"
        ahead, half = tables.difference(found["chains"], rival, "spliced", "avg")
        assert ahead > half
        assert next(one for one in found["primary"] if one["theirs"] == rival)["holm"] > 0.05
    text = json.loads(read("results", "text", "compare.json"))
    assert len(text["chains"]) == 3 and all(one["holm"] > 0.05 for one in text["primary"])  # "do not settle that"
    behind = [tables.difference(text["chains"], "dense-cm", "bpb", "avg", ours)[0] for ours in ("btx", "btx-paper")]
    assert behind[0] < behind[1] < 0  # "both forms trail it", "the printed recipe did better"
    rows = {row["name"]: row for row in json.loads(read("results", "smollm", "results.json"))["rows"]}
    seed, dense, btx = (rows[name]["unread"]["avg"] for name in ("seed", "dense-cm", "btx"))
    assert btx - seed < (dense - seed) / 4  # "keeps most of what dense training forgets"
    groups = json.loads(read("results", "smollm", "damage.json"))["groups"]
    own, mixed = (groups[name]["averaged"]["avg"] for name in ("nothing", "all but feed-forward (mixing)"))
    assert 0 < mixed - own < 0.03 * (rows["seed"]["bpb"]["avg"] - own)  # "averaging costs next to nothing"


def test_the_questions_for_two_experts_come_from_the_comparison():
    found = json.loads(read("results", "cpu", "compare.json"))
    right = [row["together"]["avg"] for row in found["rows"]]
    said = (
        f"All rows get {min(right):.0%} to {max(right):.0%} of the choices right, BTX ties with every rival, and no row"
    )
    assert f"{said} writes a right answer".replace("%", " %") in " ".join(read("docs", "results.md").split())
    verdicts = cells_of(tables.verdict_table(found["rows"], found["chains"]))
    column = verdicts[0].index("avg choice accuracy, two experts needed")
    assert len(verdicts) > 20 and all(line[column].startswith("tie") for line in verdicts[2:])
    assert all(share == 0 for row in found["rows"] for share in row["together_written"].values())


def test_the_page_of_one_run_comes_from_it(tmp_path):
    """All of it but what came from logs, which are not kept: each run's costs and their picture."""
    shutil.copy(os.path.join(ROOT, "results", "run", "routing.json"), tmp_path)
    found = json.loads(read("results", "run", "results.json"))
    rows = tables.in_order(found["rows"])
    report.write_report(tmp_path, {**found, "rows": rows})
    page = read("results", "run", "report.md")
    costs, logs, routers = re.split(r"(\n\nEach run by itself:\n.*?)(?=\n\n## )", page, flags=re.S)
    assert costs + routers == (tmp_path / "report.md").read_text() and "![training curves](curves.png)" in logs
    assert page.startswith(f"# Results\n\n{tables.headline_table(rows)}\n")
    assert sorted(sum(report.TOPICS.values(), ())) == sorted(tables.METRICS)  # no score is left out
    assert max(line.count(" | ") for line in page.splitlines() if line.startswith("|")) <= 8


def test_the_settings_that_were_tried_come_from_the_sweep():
    """All scores of the rivals stand in the page's table, and each row's best is bold."""
    rows = json.loads(read("results", "cpu", "sweep.json"))["rows"]
    table = read("results", "cpu", "sweep.md")
    for name in ("dense-cm", "upcycle-cm"):
        assert all(f"{bits:.3f}" in table for bits in rows[name].values())
    for scores in rows.values():
        assert f"**{min(scores.values()):.3f}**" in table


def test_what_routers_tell_comes_from_their_mixtures():
    models = json.loads(read("results", "cpu", "routing-starts.json"))["models"]
    page = read("results", "cpu", "routing-starts.md")
    for model in models:
        assert " | ".join(f"{bits:.2f}" for bits in model["mutual_information"]) in page


def test_the_real_model_comes_from_its_rows():
    rows = tables.in_order(json.loads(read("results", "smollm", "results.json"))["rows"])
    page = read("docs", "real.md")
    assert tables.headline_table(rows) in page and tables.headline_table(rows) in read("README.md")
    scores, ahead = tables.score_table(rows, ("active_params", "train_flops")), tables.resampled_table(rows)
    assert scores in read("results", "smollm", "scores.md") and ahead in read("results", "smollm", "scores.md")
    shown = "dense-cm", "upcycle-cm", "soup", "btm-posterior-prefix", "mixed", "btx-held", "btx-paper"
    assert part(ahead, *cells_of(ahead)[0], rows=shown) in page
    questions = json.loads(read("results", "smollm", "questions.json"))
    assert tables.question_table(questions) in read("results", "smollm", "scores.md")
    some = [scores["questions"] for scores in questions.values()]  # "no difference is twice its error"
    assert all(abs(a[0] - b[0]) < 2 * math.hypot(a[1], b[1]) for a in some for b in some)


@pytest.mark.parametrize("path", ["cpu/damage", "cpu/damage-held", "smollm/damage", "smollm/damage-held"])
def test_the_damage_comes_from_its_groups(path):
    table = damage_table(json.loads(read("results", f"{path}.json"))["groups"])
    assert table in read("results", f"{path}.md")
    if path == "smollm/damage":
        columns = "replaced by the average", "avg", "avg with the seed's instead", "drift"
        assert part(table, *columns) in read("docs", "mixing.md")
    if path == "cpu/damage":  # what the page says of its picture
        [nothing, embeddings] = [line for line in cells_of(table) if line[0] in ("nothing", "embeddings")]
        assert f"cost {float(embeddings[-2]) - float(nothing[-2]):.3f}." in read("docs", "mixing.md")


@pytest.mark.parametrize("size", ["cpu", "smollm"])
def test_the_drift_comes_from_its_points(size):
    points = json.loads(read("results", size, "drift.json"))["points"]
    assert drift_table(points) in read("results", size, "drift.md")
    if size == "cpu":  # what the page says of it, and no more: "a third of its gain at a drift of 1 %", "Go slowly"
        assert all(p["lost"] is None or p["lost"] > 1 for p in points if p["drift"] > 0.105)
        assert {f"{p['lost']:.0%}" for p in points if p["lost"] and 0.01 < p["drift"] < 0.014} == {"33%"}
        slow, fast = (p for p in points if (p["rate"], p["steps"]) in ((3e-4, 800), (3e-3, 200)))
        assert abs(slow["branch"] - fast["branch"]) < 0.002
        assert slow["drift"] < 0.6 * fast["drift"] and slow["lost"] <= 0.5 * fast["lost"]


def test_the_study_comes_from_its_points():
    points = json.loads(read("results", "cpu", "regime.json"))["points"]
    points.sort(key=lambda point: (point["width"], point["scale"]))
    table = regime_table(points)
    columns = [column for column in cells_of(table)[0] if column != "parameters"]
    assert part(table, *columns) in read("docs", "regime.md")


@pytest.mark.parametrize("path", sorted(glob.glob("results/*/open_ends.json", root_dir=ROOT)))
def test_the_open_ends_come_from_their_chains(path):
    """The page shows a table of each, with some of its rows and columns."""
    found = json.loads(read(path))
    page = read("docs", "open_ends.md")
    shown = [cells_of(table.rstrip()) for table in re.findall(r"^(?:\|.*\n)+", page, re.M)]
    for one in found.values():
        assert open_ends.summary(one["chains"], one["base"]) == one["rows"] and len(one["chains"]) == 3
        table = open_ends.table(one["rows"])
        assert table in read(path.replace(".json", ".md"))
        if not path.startswith("results/cpu"):
            continue  # the page says it in a sentence
        [(columns, _, *lines)] = [lines for lines in shown if any(line[0] == one["base"] for line in lines)]
        names = [line[0] for line in lines]
        assert len(names) >= 3 and part(table, *columns, rows=names) in page


def test_what_the_open_ends_say_in_words():
    found = json.loads(read("results", "cpu", "open_ends.json"))
    words = " ".join(read("docs", "open_ends.md").split())
    own = {label: one["the domain itself"]["mean"] for label, one in found["grow"]["rows"].items()}
    held, anew = "shared weights held", own[found["grow"]["base"]]
    way = own[f"before it joins, {held}"] - anew
    left = [own[f"joined, {held}{steps}"] - anew for steps in ("", ", 100 steps of the routers")]
    assert f"four fifths of the way at once, and {1 - left[1] / way:.0%} after".replace("%", " %") in words
    assert 0.75 < 1 - left[0] / way < 0.85
    back = own["the same, without it again"] - own["seed model"]
    assert f"near the seed's, {back:.2f} above it" in words
    answers = {label: one["answers"]["mean"] for label, one in found["chats"]["rows"].items()}
    btx, told = answers["Branch-Train-MiX"], answers["Branch-Train-MiX, instructed"]
    dense = answers["dense training, instructed"]
    assert f"answers in {told:.3f} bits per byte, the dense model in {dense:.3f}" in words
    assert 0.75 < (btx - answers["Branch-Train-MiX, routers instructed alone"]) / (btx - told) < 0.85  # four fifths
    text = {label: one["text"]["mean"] for label, one in found["chats"]["rows"].items()}
    forgot = [
        text[f"Branch-Train-MiX, {who}"] - text["Branch-Train-MiX"]
        for who in ("routers instructed alone", "instructed")
    ]
    assert forgot[0] < forgot[1] / 2  # "less than half as much"
    behind = {label: -one["average"].get("lead", 0.0) for label, one in found["clusters"]["rows"].items()}
    assert 2.5 < behind["4 random parts"] / behind["4 clusters"] < 3.5  # "three times as much"
    agreement = json.loads(read("results", "cpu", "clusters.json"))
    two, four, control = (
        {f"{one['nmi']:.2f}" for one in agreement[name]} for name in ("tfidf-2", "tfidf-4", "random-4")
    )
    assert f"is {min(two)} with two" in words and len(two) == 1
    assert f"and {min(four)} with four; a random split has {min(control)}" in words and control == {"0.00"}


def test_readme_quotes_the_method():
    quoted = re.findall(r"```python\n(.*?)```", read("README.md"), re.S)
    assert quoted and quoted[0] == inspect.getsource(mix)


def anchors(text):
    """GitHub's: a heading in lower case, punctuation out, each space a dash; a repeated one gets -1, -2 and so on."""
    found, times = set(), {}
    for heading in re.findall(r"^#+ +(.+?) *$", prose(text), re.M):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)  # of a link, what one reads
        name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(f"{name}-{times[name]}" if name in times else name)
        times[name] = times.get(name, 0) + 1
    return found


def test_anchors_are_githubs():
    page = "# A `b_c`: d, e?\n## [Same](x.md)\n```sh\n# no heading\n```\n## Same\n### One - two\n"
    assert anchors(page) == {"a-b_c-d-e", "same", "same-1", "one---two"}


PAGES = "*.md", "docs/*.md", "exercises/**/*.md", "config/**/*.md", "results/**/*.md"


@pytest.mark.parametrize(
    "page", sorted({page for kind in PAGES for page in glob.glob(kind, root_dir=ROOT, recursive=True)})
)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)", prose(read(page))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), name)) if name else page
        assert os.path.exists(os.path.join(ROOT, target)), link
        assert not anchor or anchor in anchors(read(target)), link


def test_the_logs_index_has_every_section_with_a_negative_result():
    index, *sections = re.split(r"^## ", read("LOG.md").split("## What did not work\n")[1], flags=re.M)
    for section in sections:
        [anchor] = anchors(f"# {section.splitlines()[0]}")
        assert ("negative" in section.lower()) <= (f"](#{anchor})" in index), anchor
