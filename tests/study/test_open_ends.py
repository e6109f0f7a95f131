"""The open ends: each case's recipe read back from the commands, one end by its real commands, tables by hand."""

import os

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
                assert {*job.needs} <= made.keys()  # what it starts from comes first
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
        assert (left.mixture, left.remove) == (f"{tmp_path}/open/grow/whole", f"expert-{new}")
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


@pytest.mark.usefixtures("in_this_process")
def test_unequal_branches_by_their_real_commands(chain_configs, tmp_path):
    """Steps and widths differ, and their sums do not; the table's means are those of the scores."""
    flags = f"--configs={chain_configs}", f"--out_dir={tmp_path}", "--domains=math,rain", "--ends=unequal"
    done = run("study/open_ends.py", *flags, "--seeds=1")
    assert done.code == 0, done.err
    steps, widths = [], []
    for order in ("hardest", "easiest"):
        for domain in ("math", "rain"):
            config = read_json(tmp_path / f"open/unequal/{order}-steps/expert-{domain}/run.json")["recipe"]["config"]
            steps.append(config["max_steps"])
            shape = read_json(tmp_path / f"open/unequal/{order}-hidden/expert-{domain}/config.json")
            widths.append(shape["intermediate_size"])
    assert steps == [16, 8, 8, 16] and widths == [64, 32, 32, 64]
    found = read_json(tmp_path / "report/open_ends.json")["unequal"]
    scores = {row["name"]: row["bpb"] for row in read_json(tmp_path / "open/unequal/scores/results.json")["rows"]}
    row = scores["unequal-hardest-hidden-btx"]
    assert found["rows"]["hardest gets more hidden units"]["average"]["mean"] == pytest.approx(row["avg"])
    assert len(scores) == len(found["rows"]) == 5
    assert "| equal branches |" in read(tmp_path / "report/open_ends.md").decode()


def test_values_and_leads_by_hand(chain_configs, tmp_path):
    """Two cases of one label are averaged; a lead is within a chain."""
    chain = chain_of(chain_configs, tmp_path)
    cases, _ = ENDS["top_k"].make(chain), None
    rows = {}
    for i, case in enumerate(cases):
        name = f"grow-whole-{case.label}" if case.label.startswith("top-") else f"top_k-{os.path.basename(case.folder)}"
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
    assert "error: --ends=grow,shrink: shrink is none of grow, unequal, top_k" in done.err
