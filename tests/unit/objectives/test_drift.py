"""The invariants' cosines: blind to what a secret does, near 0 between unrelated weights, driven down by their
gradient."""

from __future__ import annotations

import pytest
import torch

from sgt_titan.objectives.drift import gram_cosine, table_cosine

RANDOM = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


def orthogonal(size):
    return torch.linalg.qr(normal(size, size)).Q


@pytest.mark.parametrize("reads", (True, False))
def test_secrets_on_the_other_side_change_nothing(reads):
    weight = normal(20, 12) if reads else normal(12, 20)
    secret = orthogonal(20) @ weight if reads else weight @ orthogonal(20)
    torch.testing.assert_close(gram_cosine(3 * secret, weight, reads=reads).item(), 1.0)
    turned = weight @ orthogonal(12) if reads else orthogonal(12) @ weight
    assert abs(gram_cosine(turned, weight, reads=reads)) < 0.5
    assert abs(gram_cosine(normal(*weight.shape), weight, reads=reads)) < 0.5


def test_a_multiple_of_the_identity_is_no_evidence():
    weight = normal(20, 12)
    more = torch.cat([weight, 5 * orthogonal(12)])  # adds 25 I to the Gram matrix
    torch.testing.assert_close(gram_cosine(more, weight, reads=True).item(), 1.0)


def test_a_rotated_table_is_the_same_table():
    table = normal(30, 8)
    torch.testing.assert_close(table_cosine(table @ orthogonal(8), table).item(), 1.0)
    assert abs(table_cosine(normal(30, 8), table)) < 0.7


def test_the_gradient_leads_away():
    public = normal(20, 12)
    ours = public.clone().requires_grad_()
    optimizer = torch.optim.Adam([ours], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        gram_cosine(ours, public, reads=True).square().backward()
        optimizer.step()
    assert abs(gram_cosine(ours, public, reads=True)) < 0.05
