"""The comparison's statistics: against closed forms, sympy's Student t, and a bootstrap in plain Python."""

import random
import statistics

import numpy as np
import pytest
import sympy
from sympy.stats import StudentT, cdf

from study.tables import T_95, difference, holm, lead, p_value, primary_contrasts, primary_table


def row(name, saved, sizes):
    """A row of results.json with the given bits below 100 on each window of each domain."""
    bits = {domain: [100 - value for value in values] for domain, values in saved.items()}
    bpb = {domain: sum(bits[domain]) / sum(sizes[domain]) for domain in bits}
    return {"name": name, "bpb": {**bpb, "avg": statistics.mean(bpb.values())}, "bits": bits, "bytes": sizes}


def chains_of(saved, sizes):
    """For each chain {domain: bits that btx saves on each window}: its rows btx and other."""
    zeros = {domain: [0.0] * len(some) for domain, some in sizes.items()}
    return [[row("btx", one, sizes), row("other", zeros, sizes)] for one in saved]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("t", [0.0, 0.3, -1.0, 2.5, 40.0])
def test_p_values_are_those_of_students_t(t, freedom):
    x = sympy.Rational(str(abs(t)))
    expected = float(2 * (1 - cdf(StudentT("t", freedom))(x)))
    assert p_value(t, freedom) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("freedom", range(1, len(T_95) + 1))
def test_the_table_of_t_holds_95_percent(freedom):
    assert p_value(T_95[freedom - 1], freedom) == pytest.approx(0.05, rel=0.01)


def test_holm_by_hand():
    """0.005 * 4, 0.01 * 3, 0.03 * 2; then 0.04 * 1, which may not be below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_error_of_equal_windows_is_that_of_the_random_seeds():
    """Windows that all say the same leave the chains alone to differ: their sample deviation over sqrt(n)."""
    means = [1.0, 2.0, 4.0, 5.0]
    chains = chains_of([{"math": [mean] * 30} for mean in means], {"math": [10] * 30})
    ahead, error = lead(chains, "other", "bpb", "avg", draws=20_000)
    assert ahead == pytest.approx(0.3)  # of 10 bytes each
    assert error == pytest.approx(statistics.stdev(means) / 10 / 2, rel=0.02)
    assert difference(chains, "other", "bpb", "avg")[1] == pytest.approx(3.18 * error, rel=0.03)


@pytest.mark.parametrize("n", [1, 3])
def test_the_error_of_equal_chains_is_that_of_the_text(n):
    saved = np.random.default_rng(1).normal(3, 2, 50).tolist()
    chains = chains_of([{"math": saved}] * n, {"math": [10] * 50})
    _, error = lead(chains, "other", "bpb", "avg", draws=20_000)
    factor = (n / (n - 1)) ** 0.5 if n > 1 else 1.0
    assert error == pytest.approx(factor * statistics.pstdev(saved) / 10 / 50**0.5, rel=0.02)


def test_the_error_equals_a_bootstrap_in_plain_python():
    """Two domains of unequal windows, three chains: chains and windows drawn anew, the same windows for all chains."""
    numbers = np.random.default_rng(2)
    sizes = {"math": numbers.integers(5, 20, 12).tolist(), "rain": numbers.integers(5, 20, 7).tolist()}
    saved = [
        {domain: (numbers.normal(level, 1.0, len(some))).tolist() for domain, some in sizes.items()}
        for level in (0.0, 1.0, 3.0)
    ]
    draws, chosen = [], random.Random(3)
    for _ in range(6000):
        places = {domain: chosen.choices(range(len(some)), k=len(some)) for domain, some in sizes.items()}
        means = []
        for one in chosen.choices(saved, k=3):
            each = [sum(one[d][i] for i in at) / sum(sizes[d][i] for i in at) for d, at in places.items()]
            means.append(statistics.mean(each))
        draws.append(statistics.mean(means))
    chains = chains_of(saved, sizes)
    ahead, error = lead(chains, "other", "bpb", "avg", draws=20_000)
    assert error == pytest.approx(statistics.pstdev(draws) * (3 / 2) ** 0.5, rel=0.05)
    assert ahead == pytest.approx(
        statistics.mean(chain[1]["bpb"]["avg"] - chain[0]["bpb"]["avg"] for chain in chains), rel=1e-9
    )
    own = lead(chains, "other", "bpb", "rain")[0]
    assert own == pytest.approx(statistics.mean(c[1]["bpb"]["rain"] - c[0]["bpb"]["rain"] for c in chains), rel=1e-9)


def test_answers_count_a_question_each_and_more_is_better():
    marks = [[1, 1, 0, 1], [0, 1, 0, 0]]
    rows = [
        {"name": name, "choice": {"math": 0.5, "avg": 0.5}, "marks": {"choice": {"math": some}}}
        for name, some in zip(("btx", "other"), marks, strict=True)
    ]
    assert lead([rows], "other", "choice", "avg")[0] == pytest.approx(0.5)
    assert lead([rows], "btx", "choice", "avg", ours="other")[0] == pytest.approx(-0.5)


def test_primary_contrasts_hold_together():
    """A clear lead, a lead within the noise, a clear lag: Holm's correction counts all of them."""
    sizes = {"math": [10] * 40}
    numbers = np.random.default_rng(4)
    shifts = {"btx": 2.0, "dense-cm": 1.0, "upcycle-cm": 2.0, "btm-top1-cm": 3.0}
    chains = [
        [row(name, {"math": (shift + numbers.normal(0, 0.02, 40)).tolist()}, sizes) for name, shift in shifts.items()]
        for _ in range(5)
    ]
    pairs = [("btx", "dense-cm"), ("btx", "upcycle-cm"), ("btx", "btm-top1-cm")]
    found = primary_contrasts(chains, pairs)
    assert [round(one["lead"], 2) for one in found] == [0.1, 0.0, -0.1]
    assert [one["holm"] for one in found] == pytest.approx(holm([one["p"] for one in found]))
    for one, pair in zip(found, pairs, strict=True):
        ahead, error = lead(chains, pair[1], "bpb", "avg", pair[0])
        assert one["p"] == pytest.approx(p_value(ahead / error, 4)) and one["half"] == pytest.approx(2.78 * error)
    lines = primary_table(found).splitlines()[2:]
    assert [line.split(" | ")[-1].strip("| ") for line in lines] == ["ahead", "not told apart", "**behind**"]
