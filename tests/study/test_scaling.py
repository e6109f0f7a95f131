"""The formulas of study/scaling.py by hand, and docs/scaling.md: its tables, picture and scripts."""

import math
import os
import re
import subprocess

import pytest
from helpers import ROOT

from study import scaling
from study.cost import exchange_bytes, step_bytes
from study.scaling import (
    Model,
    Site,
    Size,
    crossing,
    curves,
    expert_bytes,
    hours,
    level_tokens,
    plan,
    shard_size,
    stage_seconds,
    terabytes,
)

SITE = Site("toy", flops=100.0, memory=160.0, price=1.0)  # room for the state of ten parameters
DENSE, MIXTURE = Model(10, 5.0, 1.0), Model(30, 10.0, 0.5)
SIZE = Size(DENSE, MIXTURE, branch_tokens=800, finetune_tokens=200, batch=20, micro_batch=2, site=SITE)
GIGABITS = 8e-9  # a byte a second


@pytest.fixture(scope="module")
def page():
    with open(os.path.join(ROOT, "docs/scaling.md"), encoding="utf-8") as file:
        return file.read()


def test_bytes_of_a_step_with_copies_and_pieces():
    assert step_bytes(1000, workers=8) == 2 * 7 * 1000 * 4
    assert (
        step_bytes(1000, workers=8, shard_size=8, micro_batches=5) == 5 * 3 * 7 * 1000 * 4
    )  # one copy: nothing across
    # two copies of four pieces: in each, three passes of 3 P; across, four rings of two workers with P / 4 each
    assert step_bytes(1000, workers=8, shard_size=4) == (2 * 3 * 3 + 2) * 1000 * 4
    assert step_bytes(1000, workers=1) == step_bytes(1000, workers=0.5) == 0


def test_bytes_of_rows_that_travel_to_experts():
    """On each of four cards 5 tokens, with 6 rows of 2 numbers; a quarter of the rows stay at home."""
    assert exchange_bytes(10, width=3, expert_parallel=2) == 4 * 10 * 3 * 4 / 2
    mixture = Model(30, 10.0, 0.5, experts=20, rows=6, width=2)
    rows = 4 * 6 * 2 * 2 * 3 / 4  # of a token: four passes in bfloat16
    assert expert_bytes(mixture, 5) == (3 * 3 / 4 * 30 * 4, 3 * 3 / 4 * 10 * 4 + 5 * rows)
    assert level_tokens(mixture) * rows == pytest.approx(3 * 3 / 4 * 20 * 4)


def test_workers_that_hold_a_copy():
    assert [shard_size(Model(n, 1.0, 1.0), SITE) for n in (1, 10, 11, 20, 21, 79)] == [1, 1, 2, 2, 4, 8]


def test_a_stage_takes_its_computation_or_its_messages():
    assert stage_seconds(DENSE, 800, 4, 1e9, SIZE) == 800 * 5 / (4 * 100)
    assert stage_seconds(MIXTURE, 800, 4, 1e9, SIZE) == 800 * 10 / (4 * 100 * 0.5)
    assert stage_seconds(DENSE, 800, 4, GIGABITS, SIZE) == pytest.approx(40 * 2 * 3 / 4 * 10 * 4)  # 40 steps
    # the mixture needs four workers for a copy, and 20 tokens over four workers are two micro-batches
    assert stage_seconds(MIXTURE, 800, 4, GIGABITS, SIZE) == pytest.approx(40 * 2 * 3 * 3 / 4 * 30 * 4)
    assert stage_seconds(MIXTURE, 800, 2, GIGABITS, SIZE) == math.inf


def test_the_three_ways_spend_the_same_flops():
    for workers in (4, 8):
        stages = plan(SIZE, workers)
        share = stages["BTX"][0]
        assert share == (DENSE, 200.0, workers / 4)
        flops = {name: sum(model.flops * tokens for model, tokens, _ in found) for name, found in stages.items()}
        flops["BTX"] += 3 * share[0].flops * share[1]  # the other branches
        assert len({round(value, 6) for value in flops.values()}) == 1
    assert hours(plan(SIZE, 4)["BTX"], 1e9, SIZE) == pytest.approx((200 * 5 / 100 + 200 * 10 / 200) / 3600)
    # a branch on one worker sends nothing
    assert terabytes(plan(SIZE, 4)["BTX"][:1], SIZE) == 0 < terabytes(plan(SIZE, 8)["BTX"][:1], SIZE)


def test_at_the_crossing_both_are_done_together():
    """Dense training has 60 steps of 70 bytes a worker; BTX's finetuning 10 of 300, after 5 s in which the branches
    compute: 4200 / x = 5 + 3000 / x."""
    found = crossing(SIZE, 8, "dense")
    assert found == pytest.approx(240 * GIGABITS)
    btx, dense = (hours(plan(SIZE, 8)[name], found, SIZE) for name in ("BTX", "dense"))
    assert [btx, dense] == pytest.approx([17.5 / 3600] * 2)
    assert hours(plan(SIZE, 8)["BTX"], found / 2, SIZE) < hours(plan(SIZE, 8)["dense"], found / 2, SIZE)
    assert crossing(SIZE, 8, "upcycling") == math.inf
    assert crossing(SIZE, 4, "dense") == 0  # there the mixture is one copy in four pieces, gathered again and again


def test_the_page_shows_what_the_command_prints(page):
    found = scaling.sizes()
    for heading, table in scaling.tables(found).items():
        assert f"### {heading}\n\n{table}\n" in page, heading
    assert found["7 B"].dense.parameters == 6_738_415_616  # Llama 2's
    mixture = found["7 B"].mixture
    assert level_tokens(mixture) == pytest.approx(9 * 11008)
    # eight GPUs, with a copy of the experts on each, or an expert on each and rows of 6 F tokens
    saved = step_bytes(mixture.experts, 8) - step_bytes(mixture.experts, 8 / 4)
    assert exchange_bytes(8 * 6 * 11008 * mixture.rows, mixture.width, 4, number_bytes=2) == pytest.approx(saved)
    lines = curves(found, "7 B", 64, points=5)
    assert all(times == sorted(times, reverse=True) for times in ([y for _, y in line] for line in lines.values()))
    assert "![Hours over network speed](scaling.png)" in page and os.path.exists(os.path.join(ROOT, "docs/scaling.png"))


def test_the_scripts_of_the_page_are_bash(page):
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr == ""
        for script, config in re.findall(r"(\w+\.py) (config/\S+\.py)", block):
            assert os.path.exists(os.path.join(ROOT, script)) and os.path.exists(os.path.join(ROOT, config))
