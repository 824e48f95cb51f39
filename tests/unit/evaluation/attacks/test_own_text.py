"""What an attacker gets of his own text, again and again."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
import torch

from sgt_titan.evaluation.attacks import own_text
from sgt_titan.evaluation.attacks.own_text import OwnText
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated
from sgt_titan.evaluation.world.samples import Sample

TIMES = 4


def rows() -> list[Sample]:
    return [Sample(np.arange(n), np.ones(n, dtype=bool), np.zeros(n, dtype=bool)) for n in (3, 5, 4)]


def counting() -> Mechanism:
    """The n-th observation is 2^n everywhere, so that a sum says which are in it."""
    numbers = count()

    def obfuscate(batch, x_BTD, random):
        return Obfuscated(torch.full_like(x_BTD, 2.0 ** next(numbers)), x_BTD, None)

    return Mechanism("counting", "counting", obfuscate)


def visits(own: OwnText, batches: list[list[Sample]]) -> dict[int, list[set[int]]]:
    """Length of a row -> the numbers of the observations in each of its means."""
    found: dict[int, list[set[int]]] = {}
    for batch in batches:
        _, mean_BTD = own.again(batch, 0)
        for row, mean_TD in zip(batch, mean_BTD, strict=True):
            (total,) = set((mean_TD[: len(row.ids)] * own.times).unique().tolist())
            found.setdefault(len(row.ids), []).append({n for n in range(24) if int(total) >> n & 1})
    return found


@pytest.mark.parametrize("fresh", [0, 1, 2, 4])
def test_old_observations_serve_again_and_no_mean_has_one_twice(fresh):
    a, b, c = mine = rows()
    own = OwnText(mine, counting(), torch.zeros(8, 2), 0, times=TIMES, fresh=fresh)
    means = visits(own, [[a, b], [b], [b, a], [b], [b, c]])
    assert all(len(mean) == TIMES for of_row in means.values() for mean in of_row)
    for i, one in enumerate(means[5]):
        for k, later in enumerate(means[5][i + 1 :], 1):
            assert len(one & later) == max(0, TIMES - k * (fresh or TIMES))
    assert len(means[3][0] & means[3][1]) == TIMES - (fresh or TIMES)


def test_a_row_that_is_there_twice_has_other_observations():
    a, *_ = mine = rows()
    own = OwnText(mine, counting(), torch.zeros(8, 2), 0, times=TIMES, fresh=2)
    _, mean_BTD = own.again([a], 0)
    _, mean_BTD = own.again([a, a], 0)
    assert mean_BTD[0].unique().tolist() != mean_BTD[1].unique().tolist()


def test_what_finds_no_room_is_observed_anew(monkeypatch):
    monkeypatch.setattr(own_text, "KEPT_BYTES", 0)
    a, *_ = mine = rows()
    own = OwnText(mine, counting(), torch.zeros(8, 2), 0, times=TIMES, fresh=2)
    first, second = visits(own, [[a], [a]])[3]
    assert not own.kept and len(first) == len(second) == TIMES and not first & second
