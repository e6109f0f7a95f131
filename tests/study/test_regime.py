"""The study of width and budget: its chains' settings, one small point by its real commands, leads by hand."""

import os

import pytest
from helpers import read, read_json

from common.errors import UserError
from study.draw import plot_regime
from study.regime import RegimeConfig, length_flags, lines_of, measure_point, point_of, points_of, regime_table

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def config(chain_configs, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("regime"))
    return RegimeConfig(configs=chain_configs, out_dir=folder, domains="math,rain", widths="16", scales="0.5")


def test_small_chains_come_first():
    config = RegimeConfig(widths="32,64", scales="0.25,1")
    assert points_of(config) == [(32, 0.25), (64, 0.25), (32, 1.0), (64, 1.0)]


@pytest.mark.parametrize("flags", [{"widths": "20"}, {"scales": "0"}, {"seeds": ""}, {"widths": "wide"}])
def test_grids_that_make_no_sense(flags):
    with pytest.raises(UserError, match="--widths"):
        points_of(RegimeConfig(**flags))


def test_warm_up_keeps_its_proportion(config):
    config.expert_flags = "--learning_rate=1e-3"
    assert length_flags(config, "expert", 2.0) == "--learning_rate=1e-3 --max_steps=24 --warmup_steps=6"


def test_a_point_by_its_real_commands(config, in_this_process):
    found = measure_point(config, 16, 0.5, 4)
    folder = f"{config.out_dir}/regime/width-16/scale-0.5/seed4"
    settings = {
        name: read_json(f"{folder}/{name}/run.json")["recipe"]["config"] for name in ("seed", "expert-math", "btx")
    }
    assert all(one["max_steps"] == 6 and one["warmup_steps"] == 2 and one["seed"] == 4 for one in settings.values())
    shape = read_json(f"{folder}/seed/config.json")
    assert (shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]) == (16, 24, 1)
    assert {row["name"] for row in found["rows"]} == {"btx", "upcycle-cm", "dense-cm"}
    assert found["seed_tokens"] == 6 * 8 * 32
    point = point_of(16, 0.5, {4: found})
    assert point["tokens_per_parameter"] == pytest.approx(4 * 6 * 8 * 32 / point["parameters"])
    path = os.path.join(config.out_dir, "regime.png")
    plot_regime(lines_of([point]), path)
    assert read(path).startswith(b"\x89PNG")


def test_leads_are_means_within_a_seed():
    def rows(btx, upcycled, dense):
        scores = {"btx": btx, "upcycle-cm": upcycled, "dense-cm": dense}
        return [
            {"name": name, "bpb": {"math": bits, "avg": bits}, "bits": {"math": [bits]}, "bytes": {"math": [1]}}
            for name, bits in scores.items()
        ]

    point = {"width": 16, "scale": 1.0, "parameters": 1000, "tokens_per_parameter": 7.0, "seeds": [1, 2]}
    point["chains"] = [rows(1.0, 1.1, 0.9), rows(2.0, 2.1, 1.9)]
    lines = {line["rival"]: line for line in lines_of([point])}
    assert lines["upcycle-cm"]["lead"] == [pytest.approx(0.1)] and lines["dense-cm"]["lead"] == [pytest.approx(-0.1)]
    assert lines["dense-cm"]["x"] == [7.0]
    assert "| +0.100 ± 0.000 | -0.100 ± 0.000 |" in regime_table([point])
