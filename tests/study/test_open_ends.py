"""The open ends: each case's recipe read back from the commands, one end by its real commands, tables by hand."""

import os
import shutil

import pytest
import torch
from helpers import read, read_json, run

from common.config import parse
from finetune import FinetuneConfig
from mix import MixConfig
from model import Transformer
from study.compare import chain_with
from study.draw import plot_experts_per_token
from study.open_ends import ENDS, OpenConfig, resized, summary, table, values_of
from train import TrainConfig

PARSERS = {"mix.py": MixConfig, "train.py": TrainConfig, "finetune.py": FinetuneConfig}


def chain_of(configs, folder):
    return chain_with(OpenConfig(configs=configs, out_dir=str(folder), domains="math,rain"), "1")


@pytest.fixture
def recipes(chain_configs, tmp_path):
    """Function(end) -> (its cases, {folder: the config of the job that makes it})."""

    def make(name):
        chain = chain_of(chain_configs, tmp_path)
        cases = ENDS[name].make(chain)
        made = {}
        for job in chain.jobs:
            if job.arguments[0] in PARSERS:
                found = parse(PARSERS[job.arguments[0]], list(job.arguments[1:]))
                made[os.path.relpath(found.out_dir, tmp_path)] = found
                needed = {name for name in job.needs if not name.endswith("/data")} - made.keys()
                assert all(os.path.exists(tmp_path / name) for name in needed)  # what it starts from comes first
        assert all(os.path.relpath(case.folder, tmp_path) in made for case in cases)
        return cases, made

    return make


def test_what_joins_and_leaves(recipes, tmp_path):
    cases, made = recipes("grow")
    for new, other in (("math", "rain"), ("rain", "math")):
        before, joined = made[f"open/grow/{new}/before"], made[f"open/grow/{new}/joined"]
        assert before.domain == other and before.freeze == "none"
        assert made[f"open/grow/{new}/before-held"].freeze == "embeddings,attention,norms"
        assert made[f"open/grow/{new}/mixed"].experts == f"{tmp_path}/expert-{other},{tmp_path}/seed"
        assert (joined.mixture, joined.add) == (before.out_dir, f"{tmp_path}/expert-{new}")
        for steps in (20, 100):
            routers = made[f"open/grow/{new}/joined-{steps}"]
            assert (routers.max_steps, routers.freeze, routers.init_from) == (steps, "all-but-router", joined.out_dir)
            assert routers.domain == "math,rain"
        left = made[f"open/grow/{new}/left"]
        assert (left.mixture, left.remove) == (f"{tmp_path}/btx", f"expert-{new}")
        shown = [case.shown for case in cases if case.folder == joined.out_dir]
        assert shown == [{"the other domains": ("bpb", (other,)), "the domain itself": ("bpb", (new,))}]
    assert ENDS["grow"].base in {case.label for case in cases}


def test_experts_per_token_and_experts_to_do_without(recipes):
    cases, made = recipes("top_k")
    assert [case.label for case in cases[:3]] == ["top-1", "top-2", "top-3"]
    assert len({case.folder for case in cases[:3]}) == 1
    assert made["open/top_k/math"].remove == "expert-rain" and made["open/top_k/rain"].remove == "expert-math"
    assert [case.shown["average"][1] for case in cases[3:]] == [("math",), ("rain",)]


@pytest.mark.parametrize("width", [32, 64])
def test_a_model_of_another_width(seed, tmp_path, width):
    """Wider it computes the same; narrower it is the model whose smallest hidden units are switched off."""
    resized(seed, width, tmp_path / "resized")
    expected = Transformer.from_pretrained(seed)
    for layer in expected.model.layers:
        weight = layer.mlp.down_proj.weight.data  # (D, F)
        weight[:, weight.norm(dim=0) < weight.norm(dim=0).sort(descending=True).values[:width][-1]] = 0.0
    found = Transformer.from_pretrained(tmp_path / "resized")
    assert found.config.intermediate_size == width
    ids = torch.randint(0, 300, (2, 50))
    assert (found(ids).logits - expected(ids).logits).abs().max() < 1e-4


def test_unequal_branches(recipes, seed, tmp_path):
    """Steps and widths differ, and their sums do not."""
    shutil.copytree(seed, tmp_path / "seed")
    cases, made = recipes("unequal")
    steps, widths = [], []
    for order in ("hardest", "easiest"):
        for domain in ("math", "rain"):
            steps.append(made[f"open/unequal/{order}-steps/expert-{domain}"].max_steps)
            wide = made[f"open/unequal/{order}-hidden/expert-{domain}"]
            widths.append(read_json(f"{wide.init_from}/config.json")["intermediate_size"])
            assert wide.max_steps == made[f"expert-{domain}"].max_steps == 12
    assert steps == [16, 8, 8, 16] and widths == [64, 32, 32, 64]
    assert len({case.folder for case in cases}) == 5
    ends = [made[os.path.relpath(case.folder, tmp_path)].init_from for case in cases]
    experts = made[os.path.relpath(ends[1], tmp_path)].experts.split(",")
    assert [os.path.relpath(folder, tmp_path) for folder in experts] == [
        "open/unequal/hardest-steps/expert-math",
        "open/unequal/hardest-steps/expert-rain",
        "seed",
    ]


@pytest.mark.usefixtures("in_this_process")
def test_an_end_by_its_real_commands(chain_configs, tmp_path):
    """The table's means are those of the scores; with one expert per token they are others than with two."""
    flags = f"--configs={chain_configs}", f"--out_dir={tmp_path}", "--domains=math,rain", "--ends=top_k"
    done = run("study/open_ends.py", *flags, "--seeds=1")
    assert done.code == 0, done.err
    found = read_json(tmp_path / "report/open_ends.json")["top_k"]
    scores = {row["name"]: row["bpb"] for row in read_json(tmp_path / "open/top_k/scores/results.json")["rows"]}
    for k in (1, 2, 3):
        assert found["rows"][f"top-{k}"]["average"]["mean"] == pytest.approx(scores[f"btx-top-{k}"]["avg"])
    assert scores["btx-top-1"] != scores["btx-top-2"]
    own = (scores["top_k-math"]["math"] + scores["top_k-rain"]["rain"]) / 2
    assert found["rows"]["its own expert and the seed"]["average"]["mean"] == pytest.approx(own)
    assert list(found["speed"]) == ["1", "2", "3"] and min(found["speed"].values()) > 0
    assert "| top-1 |" in read(tmp_path / "report/open_ends.md").decode()
    assert (tmp_path / "report/top_k.png").exists()


def test_values_and_leads_by_hand(chain_configs, tmp_path):
    """Two cases of one label are averaged; a lead is within a chain."""
    chain = chain_of(chain_configs, tmp_path)
    cases, _ = ENDS["top_k"].make(chain), None
    rows = {}
    for i, case in enumerate(cases):
        name = f"btx-{case.label}" if case.label.startswith("top-") else f"top_k-{os.path.basename(case.folder)}"
        rows[name] = {"bpb": {"math": 1.0 + i, "rain": 2.0 + i}}
    values = values_of(cases, rows, chain)
    assert values["top-1"] == {"average": 1.5, "math": 1.0, "rain": 2.0}
    # cases 3 and 4: math's own expert scores 4 on math, rain's scores 6 on rain
    assert values["its own expert and the seed"] == {"average": 5.0, "math": 4.0, "rain": 6.0}
    chains = [{"a": {"x": 1.0}, "b": {"x": 1.5}}, {"a": {"x": 3.0}, "b": {"x": 3.7}}]
    found = summary(chains, "a")
    assert found["a"]["x"] == {"mean": 2.0}
    # leads -0.5 and -0.7: deviation 0.1414, error 0.1, t = 12.706 with one degree of freedom
    assert found["b"]["x"]["lead"] == pytest.approx(-0.6) and found["b"]["x"]["half"] == pytest.approx(1.2706, 1e-3)
    assert "| b | 2.600 (+0.600 ± 1.271) |" in table(found)


def test_the_picture(tmp_path):
    row = {"average": {"mean": 1.0}, "math": {"mean": 2.0}}
    found = {"rows": {f"top-{k}": row for k in (1, 2, 3)}, "speed": {"1": 3.0, "2": 2.0, "3": 1.0}}
    plot_experts_per_token(found, tmp_path / "top_k.png")
    assert read(tmp_path / "top_k.png").startswith(b"\x89PNG")


def test_an_end_that_is_none(tmp_path):
    done = run("study/open_ends.py", "--ends=grow,shrink", f"--out_dir={tmp_path}")
    assert "error: --ends=grow,shrink: there is no shrink; choose from grow, unequal, top_k" in done.err


def test_branches_of_clusters_read_as_much_as_those_of_labels(recipes, tmp_path):
    os.makedirs(tmp_path / "seed")  # to be copied
    cases, made = recipes("clusters")
    labels = ["a branch for each label", "2 clusters", "4 clusters", "8 clusters", "4 random parts"]
    assert [case.label for case in cases] == labels
    for name, k in (("tfidf-2", 2), ("tfidf-4", 4), ("tfidf-8", 8), ("random-4", 4)):
        folder = f"open/clusters/{name}"
        branches = [made[f"{folder}/expert-c{i}"] for i in range(k)]
        assert [branch.domain for branch in branches] == [f"c{i}" for i in range(k)]
        assert {branch.data_dir for branch in branches} == {f"{tmp_path}/{folder}/data"}
        assert sum(branch.max_steps for branch in branches) == made["expert-math"].max_steps * 2
        mixed = made[f"{folder}/mixed"]
        assert mixed.data_dir == f"{tmp_path}/{folder}/data" and mixed.experts.endswith("open/generalist")
        assert len(mixed.experts.split(",")) == k + 1
        assert made[f"{folder}/btx"].domain == "math,rain"


def test_who_is_instructed_and_for_how_long(recipes, chain_configs, tmp_path):
    """Equal FLOPs for the dense model and the mixture; routers alone read a twentieth."""
    os.makedirs(tmp_path / "seed")
    cases, made = recipes("chats")
    told = {name: one for name, one in made.items() if getattr(one, "loss_on", "") == "answers"}
    assert all(one.splice == 0.0 for one in told.values())
    dense, btx = told["open/chats/dense"], told["open/chats/btx"]
    assert dense.freeze == "none" and btx.freeze == "none" and dense.init_from == f"{tmp_path}/compare/dense-cm"
    budget = chain_of(chain_configs, tmp_path).budget
    assert btx.max_steps * budget.mixture_flops == pytest.approx(dense.max_steps * budget.dense_flops, rel=0.01)
    assert told["open/chats/bar"].freeze == "all-but-router"
    assert told["open/chats/bar"].max_steps == round(btx.max_steps / 20)
    assert told["open/chats/expert-math"].domain == "math-chat"
    assert {case.folder for case in cases} >= {f"{tmp_path}/open/chats/{name}" for name in ("dense", "btx", "bar")}
