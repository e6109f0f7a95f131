"""Time: what is worked out from step times against numbers computed by hand, and a measurement of tiny models."""

import shutil

import pytest
from helpers import must, read, read_json, run

from common.corpus import Corpus
from study.clock import KINDS, ClockConfig, Schedule, Settings, crossing, matched_steps, models_of, schedule_of, where
from study.clock import schedules as schedules_of

SECONDS = {"dense": 0.1, "branch": 0.08, "mixture": 0.2, "frozen mixture": 0.15}


def test_steps_matched_by_device_time():
    """BTX takes 300 x 0.08 + 30 x 0.2 = 30 seconds: 150 steps of the mixture, 300 of the dense model."""
    matched = matched_steps({"branch": 300, "mixture": 30}, SECONDS)
    assert matched == {"dense": 300, "branch": 375, "mixture": 150, "frozen mixture": 200}


def test_a_schedule_over_a_network():
    """Four workers, 1,000 gradients of 4 bytes: each worker sends 6 parts of 250, so 6,000 bytes a step."""
    found = schedule_of(10, 4, 0.5, 1000)
    assert found == Schedule(5.0, 10 * 6000 * 8)
    assert found.at(48_000) == 5 + 10


def test_where_two_schedules_cross():
    """100 s without a bit, and 60 s with 8,000 bits: level when sending takes 40 s."""
    quiet, chatty = Schedule(100.0, 0.0), Schedule(60.0, 8000.0)
    assert crossing(quiet, chatty) == crossing(chatty, quiet) == 200
    assert quiet.at(200) == chatty.at(200) == 100
    assert quiet.at(199) < chatty.at(199) and quiet.at(201) > chatty.at(201)
    assert where(quiet, chatty).startswith("below 200 bit/s") and where(chatty, quiet).startswith("above 200 bit/s")


def test_some_never_cross():
    cheap, dear = Schedule(1.0, 10.0), Schedule(2.0, 20.0)
    assert crossing(cheap, dear) is None
    assert (where(cheap, dear), where(dear, cheap)) == ("at every bandwidth", "at none")


@pytest.fixture(scope="module")
def tiny(configs, work, tmp_path_factory):
    """The session's configs with frozen branches and a mixture of three."""
    folder = str(tmp_path_factory.mktemp("clock"))
    shutil.copytree(configs, f"{folder}/configs")
    with open(f"{folder}/configs/expert.py", "a") as file:
        file.write("freeze = 'embeddings,attention,norms'\n")
    with open(f"{folder}/configs/mix.py", "w") as file:
        file.write("experts = 'a,b,seed'\n")
    return folder


def test_schedules_by_hand(tiny, data):
    """Two branches of 12 steps on a machine each, side by side; FLOPs and gradients are the models' own."""
    settings = Settings.of(ClockConfig(configs=f"{tiny}/configs", out_dir=tiny))
    models = models_of(settings, Corpus(data))
    part = {kind: seconds / 2 for kind, seconds in SECONDS.items()}
    found = schedules_of(settings, models, SECONDS, part, workers=2)
    per_token = {kind: model.flops_per_token(32) for kind, (_, model) in models.items()}
    numbers = {
        kind: sum(p.numel() for p in model.parameters() if p.requires_grad) for kind, (_, model) in models.items()
    }
    steps = (2 * 12 * per_token["branch"] + 12 * per_token["mixture"]) / per_token["dense"]
    assert found["btx"].seconds == pytest.approx(12 * 0.08 + 12 * 0.1)
    assert found["btx"].bits == 12 * numbers["mixture"] * 4 * 8  # two workers: each sends half a gradient twice
    assert found["dense-cm"] == pytest.approx((steps * 0.05, steps * numbers["dense"] * 32))
    assert numbers["branch"] < numbers["dense"] < numbers["mixture"]
    assert numbers["frozen mixture"] < numbers["mixture"] and per_token["frozen mixture"] < per_token["mixture"]


def test_the_command_measures_and_draws(tiny):
    flags = f"--configs={tiny}/configs", f"--out_dir={tiny}", "--workers=2", "--turns=2", "--clock=cpu", "--threads=1"
    out = must(run("study/clock.py", *flags)).out
    found, network = (read_json(f"{tiny}/report/{name}.json") for name in ("step_times", "network"))
    assert tuple(found["seconds"]) == KINDS and all(seconds > 0 for seconds in found["seconds"].values())
    assert all(found["minima"][kind] <= found["seconds"][kind] for kind in KINDS)
    matched = matched_steps({"branch": 24, "mixture": 12}, found["seconds"])
    assert found["matched_steps"] == {"upcycle-tm": matched["mixture"], "dense-tm": matched["dense"]}
    assert set(network["schedules"]) == {"btx", "upcycle-cm", "dense-cm"} and network["workers"] == 2
    assert "btx is done before dense-cm" in out and f"dense-tm: {matched['dense']} steps" in out
    assert read(f"{tiny}/report/network.png").startswith(b"\x89PNG")
