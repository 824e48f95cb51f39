from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sgt_titan.data.packing import efficiency, pack


def rows_of(lengths, seq_len):
    offsets, ids = pack(lengths, seq_len)
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


def one_by_one(lengths, seq_len):
    """Best-fit decreasing, literally. Sums only: between rows with equal room the algorithm leaves the choice."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rows if sum(r) + length <= seq_len]
        if fitting:
            max(fitting, key=sum).append(int(length))
        else:
            rows.append([int(length)])
    return sorted(sum(r) for r in rows)


@pytest.mark.parametrize("seed", range(20))
def test_equals_one_by_one_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(1, 60))
    lengths = rng.integers(1, seq_len + 1, size=int(rng.integers(1, 200)))
    rows = rows_of(lengths, seq_len)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    assert sorted(int(lengths[r].sum()) for r in rows) == one_by_one(lengths, seq_len)


def test_no_row_overflows_and_two_rows_never_fit_in_one():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.8, 20_000).astype(int), 1, 512)
    sums = np.array([lengths[r].sum() for r in rows_of(lengths, 512)])
    assert sums.max() <= 512
    assert np.sort(sums)[:2].sum() > 512
    offsets, _ = pack(lengths, 512)
    assert efficiency(lengths, offsets, 512) == pytest.approx(lengths.sum() / (len(sums) * 512))
    assert efficiency(lengths, offsets, 512) > 0.99


def test_is_deterministic_and_pinned():
    lengths = np.array([3, 5, 2, 2, 4, 1, 6, 3])
    first, second = pack(lengths, 8), pack(lengths, 8)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert rows_of(lengths, 8) == PINNED


PINNED = [[3, 6], [0, 1], [5, 4, 7], [2]]


def test_equal_samples_fill_rows_exactly():
    assert sorted(len(r) for r in rows_of(np.full(10, 3), 10)) == [1, 3, 3, 3]
    assert rows_of(np.array([4]), 4) == [[0]]
    assert [len(a) for a in pack(np.array([], dtype=int), 4)] == [1, 0]


@pytest.mark.parametrize("lengths", [[0, 1], [5, 6]])
def test_impossible_lengths(lengths):
    with pytest.raises(ValueError, match=r"must be in 1\.\.5"):
        pack(np.array(lengths), 5)
