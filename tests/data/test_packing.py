"""Packing: every sample once, no row over-full, as tight as best-fit decreasing, and quick."""

from __future__ import annotations

import random
import time

import pytest

from mla_tune.data.packing import PackingReport, pack, packing_report
from mla_tune.errors import InputError


def best_fit_decreasing(lengths: list[int], size: int) -> int:
    """The number of rows, by the textbook's quadratic search."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [space for space in left if space >= length]
        if fits:
            left[left.index(min(fits))] -= length
        else:
            left.append(size - length)
    return len(left)


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_sample_once_and_match_the_textbook(seed):
    rng = random.Random(seed)
    size = rng.choice([1, 7, 64, 100])
    lengths = [rng.randint(1, size) for _ in range(rng.randint(0, 300))]
    rows = pack(lengths, size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= size for row in rows)
    assert len(rows) == best_fit_decreasing(lengths, size)
    assert rows == pack(list(lengths), size)


def test_a_known_case_and_its_report():
    lengths = [4, 8, 1, 4, 2, 1]
    assert pack(lengths, 10) == [[0, 3, 4], [1, 2, 5]]
    assert packing_report(lengths, 2, 10) == PackingReport(samples=6, rows=2, fill_before=20 / 60, fill=1.0)
    assert packing_report([], 0, 10).fill == 0.0


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_samples_that_fit_no_row(lengths):
    with pytest.raises(InputError, match=rf"sample 1 has {lengths[1]} tokens; a row takes 1 to 10"):
        pack(lengths, 10)


def test_a_hundred_thousand_samples_take_seconds():
    rng = random.Random(0)
    lengths = [rng.randint(1, 4096) for _ in range(100_000)]
    began = time.process_time()
    pack(lengths, 4096)
    assert time.process_time() - began < 5
