"""Every attack where its success is known by construction, and where it must fail.

identity      the embeddings are sent as they are: all tokens are read
pure noise    what is sent has nothing to do with the prompt: no attack reads more than the prior allows
"""

from __future__ import annotations

import math

import pytest
import torch

from sgt_titan.evaluation.attacks import ATTACKS
from sgt_titan.evaluation.world.mechanisms import constant_noise, nothing
from tests.unit.evaluation.worlds import linear, pure_noise, run, top1, world

# Guess by rank, by going on, or without looking: an identity is not what they are made for.
NOT_FOR_IDENTITY = {"farthest", "echo", "guess", "answer"}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in NOT_FOR_IDENTITY])
def test_identity_is_read(name, trunk):
    here = world(nothing(), trunk, rows=6, corpus=160)
    guess = run(name, here)
    assert guess.top_NK.shape[0] == len(here.truth_N) and guess.top_NK.shape[1] <= 10
    assert top1(guess, here) >= (0.97 if name in ("inverter", "logit_reading") else 1.0)


@pytest.mark.parametrize("name", ATTACKS)
def test_pure_noise_is_not_read(name, trunk):
    """Tokens are uniform over 300 here, so the prior's rate is 1/300; 99.9% of the binomial's mass is below."""
    here = world(pure_noise(), trunk, rows=24, corpus=96)
    N, p = len(here.truth_N), 1 / here.size.vocab
    limit = p + 3.3 * math.sqrt(p * (1 - p) / N) + 1 / N
    assert top1(run(name, here), here) <= limit


def test_no_attack_is_handed_the_truth(trunk):
    """What is granted holds the hidden tokens of no row under attack."""
    here = world(constant_noise(0.1), trunk)
    from sgt_titan.evaluation.world.threat import Corpus, KnownPairs, Observation

    for attack in ATTACKS.values():
        for grant in here.granted(attack.run).values():
            if isinstance(grant, Observation):
                assert all(
                    (tokens[hidden] == -1).all() for tokens, hidden in zip(grant.tokens, grant.hidden, strict=True)
                )
            if isinstance(grant, Corpus):
                assert not any(row is own for row in grant.rows for own in here.rows)
            if isinstance(grant, KnownPairs):
                assert len(grant.tokens_M) == len(grant.x_tilde_MD)


def test_a_linear_sgt_hides_from_neighbours_and_not_from_a_regression(trunk):
    torch.manual_seed(0)
    D = trunk.config.hidden_size
    here = world(linear(torch.linalg.qr(torch.randn(D, D))[0], torch.randn(D), 1e-4), trunk, corpus=160)
    assert top1(run("nearest_l2", here), here) < 0.1
    guess = run("known_plaintext", here)
    assert top1(guess, here) == 1.0
    shares = [(top_N == here.truth_N).double().mean().item() for top_N in guess.curve.top_N]
    enough = [share for m, share in zip(guess.curve.at, shares, strict=True) if m >= 2 * D]
    assert min(enough) > 0.99  # D + 1 pairs fix the map


def test_repeats_with_a_seed(trunk):
    here = world(constant_noise(0.5), trunk)
    for name in ("inverter", "sequence", "autoregressive", "map_search", "nearest_mahalanobis", "averaging"):
        assert torch.equal(run(name, here).top_NK, run(name, here).top_NK), name
