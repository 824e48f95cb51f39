"""The noise of a sample is a function of (seed, epoch, sample)."""

from __future__ import annotations

import torch

from sgt_titan.data.batch import Document
from sgt_titan.titan.noise import draw

WIDTH, LENGTH = 6, 16


def noise(rows, *, seed=3, length=LENGTH, part=None) -> torch.Tensor:
    part = part or slice(0, length)
    return draw(rows, seed=seed, length=length, width=WIDTH, part=part, device=torch.device("cpu"))


def alone(epoch, sample, length, seed=3) -> torch.Tensor:
    return noise([[Document(epoch, sample, 0, length)]], seed=seed)[0, :length]


def test_same_in_any_row_batch_and_place():
    expected = alone(2, 41, 5)
    rows = [
        [Document(2, 7, 0, 9)],
        [Document(2, 8, 0, 4), Document(2, 41, 4, 5), Document(2, 9, 9, 7)],
        [Document(2, 10, 0, 16)],
    ]
    assert torch.equal(noise(rows)[1, 4:9], expected)
    assert torch.equal(noise(rows[1:2])[0, 4:9], expected)
    assert torch.equal(noise(rows[::-1], length=32)[1, 4:9], expected)
    # and the neighbours in the row have their own
    assert torch.equal(noise(rows)[1, :4], alone(2, 8, 4))
    assert torch.equal(noise(rows)[1, 9:16], alone(2, 9, 7))


def test_slices_are_slices_of_the_whole():
    rows = [[Document(0, 1, 0, 7), Document(0, 2, 7, 9)], [Document(0, 3, 0, 12)]]
    whole = noise(rows)
    for ranks in (2, 4):
        size = LENGTH // ranks
        parts = [noise(rows, part=slice(r * size, (r + 1) * size)) for r in range(ranks)]
        assert all(part.shape == (2, size, WIDTH) for part in parts)
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_other_seed_epoch_or_sample_is_other_noise():
    base = alone(1, 5, 8)
    for other in (alone(2, 5, 8), alone(1, 6, 8), alone(1, 5, 8, seed=4), alone(5, 1, 8)):
        assert not (other == base).any()


def test_independent_of_the_global_generator_and_leaves_it_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = alone(0, 0, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(alone(0, 0, 8), first)


def test_standard_normal_and_zero_where_there_is_no_document():
    rows = [[Document(0, sample, 0, 512)] for sample in range(64)]
    values = draw(rows, seed=0, length=600, width=8, part=slice(0, 600), device=torch.device("cpu"))
    assert not values[:, 512:].any()
    drawn = values[:, :512].double()
    # 262,144 values: standard errors 0.002 of the mean, 0.0028 of the variance; adjacent samples are uncorrelated.
    assert abs(drawn.mean()) < 0.01 and abs(drawn.var() - 1) < 0.015
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 0.01
