"""What held-out text shares with training text, against Python's own search."""

import numpy as np
import pytest
from helpers import must, read_json, run

from study.overlap import known, share_of_copies


@pytest.mark.parametrize("length", [1, 3, 8])
def test_stretches_against_a_plain_search(length):
    random = np.random.default_rng(0)
    train, held_out = (random.integers(0, 4, n).astype(np.uint16) for n in (300, 120))
    held_out[40:70] = train[100:130]  # a copy
    there = {tuple(train[i : i + length]) for i in range(len(train) - length + 1)}
    expected = [tuple(held_out[i : i + length]) in there for i in range(len(held_out) - length + 1)]
    assert known(train, held_out, length).tolist() == expected
    assert sum(expected) > 0


def test_windows_count_as_copies_by_more_than_half():
    assert share_of_copies(np.array([1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=bool), 4) == 0.5  # the ninth makes no window
    assert share_of_copies(np.array([1, 1], dtype=bool), 4) == 0


def test_the_command_on_prepared_data(data, tmp_path):
    must(run("study/overlap.py", f"--data_dir={data}", f"--out_dir={tmp_path}", "--sequence_length=32"))
    rows = read_json(f"{tmp_path}/overlap.json")["rows"]
    assert rows.keys() == {"math", "rain"}
    for row in rows.values():
        shares = list(row["stretches"].values())
        assert sorted(shares, reverse=True) == shares and 0 <= shares[-1] <= 1  # longer stretches are rarer
    assert rows["math"]["questions"] == 0  # no question comes twice
