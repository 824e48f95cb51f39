"""Bounds against brute force on sources that can be enumerated, and every attack against the bounds of a known rate."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sgt_titan.evaluation.attacks import ATTACKS
from sgt_titan.evaluation.options import UNSENT
from sgt_titan.evaluation.scores.certificates import (
    SLOPES,
    Source,
    certificate,
    distortion_bound,
    fano_bound,
    messages_bound,
    prior_bound,
    radius_bound,
    rate_distortion_slopes,
    source_from,
    source_of,
)
from sgt_titan.evaluation.world.mechanisms import constant_noise
from sgt_titan.evaluation.world.threat import kind_of
from tests.unit.evaluation.worlds import run, tiny_trunk, top1, world


def entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


# -- each bound against what it says -----------------------------------------------------------------------------------


def test_the_slopes_are_the_minimum_over_q():
    """Against a grid over the simplex of three."""
    torch.manual_seed(0)
    p = torch.softmax(torch.tensor([[0.0, 0.5, 1.0], [3.0, 0.0, -2.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]).double(), -1)
    grid = np.linspace(0, 1, 301)
    q_MX = torch.tensor([[a, b, 1 - a - b] for a in grid for b in grid if a + b <= 1 + 1e-12]).clamp_min(0)
    for s, got_N in zip((0.3, 1.0, 3.0), rate_distortion_slopes(p, (0.3, 1.0, 3.0)).T, strict=True):
        alpha = math.exp(-s)
        values_MN = -(alpha + (1 - alpha) * q_MX).log() @ p.T
        assert torch.allclose(got_N, values_MN.min(0).values, atol=2e-4)
        assert (got_N <= values_MN.min(0).values + 1e-12).all()


def test_the_slopes_give_the_rate_distortion_function_of_a_coin():
    """R(D) = h(p) - h(D) for D <= p: the largest of G_s - s D."""
    for p, distortion in ((0.5, 0.1), (0.3, 0.05), (0.2, 0.15)):
        slopes = [math.log((1 - distortion) / distortion)]
        value = (
            rate_distortion_slopes(torch.tensor([[p, 1 - p]], dtype=torch.float64), slopes)[0, 0].item()
            - slopes[0] * distortion
        )
        assert value == pytest.approx(entropy(p) - entropy(distortion), abs=1e-9)


def test_probabilities_of_zero_are_no_obstacle():
    with_zero = rate_distortion_slopes(torch.tensor([[0.6, 0.4, 0.0, 0.0]]))
    assert torch.allclose(with_zero, rate_distortion_slopes(torch.tensor([[0.6, 0.4]])))
    certain = rate_distortion_slopes(torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(certain, torch.zeros_like(certain), atol=1e-12)


def test_fano_is_met_with_equality_by_symmetric_errors():
    """A uniform source whose posterior is 1 - e on one token and even on the rest."""
    V, e = 50, 0.3
    left = entropy(e) + e * math.log(V - 1)
    assert fano_bound(math.log(V) - left, math.log(V), V) == pytest.approx(1 - e)
    assert fano_bound(0.0, math.log(V), V) == pytest.approx(1 / V)
    assert fano_bound(9.0, 4.0, V) == 1.0


def test_the_prior_bound_is_the_guess_at_rate_zero_and_nothing_at_a_high_one():
    assert prior_bound(0.0, 0.25) == pytest.approx(0.25)
    assert prior_bound(-math.log(0.25), 0.25) == 1.0 and prior_bound(math.inf, 0.25) == 1.0
    a = prior_bound(0.2, 0.25)
    assert a * math.log(a / 0.25) + (1 - a) * math.log((1 - a) / 0.75) == pytest.approx(0.2)


# -- brute force -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_no_attacker_exceeds_the_bounds_on_a_source_that_is_enumerated(seed):
    """Two tokens of three from a random Markov source through a random channel: the exact information is the rate."""
    random = np.random.default_rng(seed)
    V, T, Z = 3, 2, 7
    sharp = random.choice([0.3, 1.0, 3.0])
    first, then = random.dirichlet(np.ones(V) / sharp), random.dirichlet(np.ones(V) / sharp, V)
    rows = list(itertools.product(range(V), repeat=T))
    p_X = np.array([first[a] * then[a, b] for a, b in rows])
    channel_XZ = random.dirichlet(np.ones(Z) * random.choice([0.1, 1.0, 10.0]), len(rows))
    joint_XZ = p_X[:, None] * channel_XZ
    p_Z = joint_XZ.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.nansum(joint_XZ * np.log(joint_XZ / (p_X[:, None] * p_Z)))
    best = np.mean([
        sum(max(joint_XZ[[i for i, x in enumerate(rows) if x[t] == v], z].sum() for v in range(V)) for z in range(Z))
        for t in range(T)
    ])  # fmt: skip
    # The exact source: an expectation over prefixes, each with its weight.
    conditional = [(1.0, first), *zip(first, then, strict=True)]
    weights, p_NV = np.array([w for w, _ in conditional]) / T, torch.tensor(np.array([p for _, p in conditional]))
    m = float((weights * p_NV.max(-1).values.numpy()).sum())
    H = float((weights * -(p_NV * p_NV.clamp_min(1e-300).log()).sum(-1).numpy()).sum())
    slopes = (torch.tensor(weights)[:, None] * rate_distortion_slopes(p_NV)).sum(0).tolist()
    nats = information / T
    for bound in (prior_bound(nats, m), fano_bound(nats, H, V), distortion_bound(nats, slopes)):
        assert best <= bound + 1e-9


def test_a_rate_and_its_bounds_from_prompts():
    V = 40
    uniform = torch.full((10, V), -math.log(V))
    source = source_from(*source_of(uniform, torch.zeros(10, dtype=torch.int64)), V)
    assert source.best_guess == pytest.approx(1 / V) and source.nats == pytest.approx(math.log(V))
    found = certificate([2.0, 4.0, 3.0, 3.0], [10, 10, 10, 10], source)
    assert found.nats_per_token.value == pytest.approx(0.3) and found.nats_per_prompt.value == pytest.approx(3.0)
    assert found.nats_per_token.low < 0.3 < found.nats_per_token.high
    high = found.nats_per_token.high
    assert found.bounds["fano"] == pytest.approx(fano_bound(high, math.log(V), V))
    assert found.smallest == min(found.bounds.values()) and next(iter(found.as_dict()["bounds"])) != "prior"
    twice = certificate([2.0, 4.0, 3.0, 3.0], [10, 10, 10, 10], source, repeats=2)
    assert twice.nats_per_token.value == pytest.approx(0.6) and twice.smallest > found.smallest


def test_what_bounds_nothing_is_said_to():
    source = Source(0.4, 2.0, tuple(0.0 for _ in SLOPES), 100, 10)
    found = certificate([900.0, 800.0], [10, 10], source)
    assert found.bounds == {"prior": None, "fano": None, "distortion": None} and found.smallest is None
    for bad in ([-1.0], [math.nan]):
        with pytest.raises(ValueError, match="non-negative"):
            certificate(bad, [10], source)
    with pytest.raises(ValueError, match="hidden tokens"):
        certificate([1.0], [0], source)


# -- every attack ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(trunk_dir):
    """Uniform tokens through noise of a known rate: KL to the best broad Gaussian, which bounds the information."""
    trunk = tiny_trunk(trunk_dir)
    table_VD = trunk.get_input_embeddings().weight.detach().double()
    std = 10.0 * table_VD.std().item()
    here = world(constant_noise(std), trunk, rows=32, corpus=128)
    mean_D, var_D = table_VD.mean(0), table_VD.var(0, correction=0) + std**2
    rate_V = 0.5 * (((table_VD - mean_D).square() + std**2) / var_D - 1 + (var_D / std**2).log()).sum(-1)
    rates = [rate_V[torch.from_numpy(row.ids[row.obfuscate])].sum().item() for row in here.rows]
    counts = [int(row.obfuscate.sum()) for row in here.rows]
    V = len(table_VD)
    uniform = torch.full((1, V), -math.log(V))
    source = source_from(*source_of(uniform, torch.zeros(1, dtype=torch.int64)), V)
    return here, rates, counts, source


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_above_its_bound_is_a_bug_in_one_of_them(name, noisy):
    here, rates, counts, source = noisy
    repeats = 1 + 3 if kind_of(ATTACKS[name].run) == "repeats" else 1  # SMALL: most = 4
    bound = 1 / source.vocab if name in UNSENT else certificate(rates, counts, source, repeats=repeats).smallest
    assert bound is not None and bound < 0.25
    N = len(here.truth_N)
    assert top1(run(name, here), here) <= bound + 3.3 * math.sqrt(bound * (1 - bound) / N)


# -- one value ---------------------------------------------------------------------------------------------------------


def test_one_value_behind_messages():
    """Brute force: any map of four values to two messages, any guesser of a message."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    for messages in itertools.product(range(2), repeat=4):
        success = sum(max((p[v] for v in range(4) if messages[v] == m), default=0.0) for m in range(2))
        assert success <= messages_bound(0.4, 2) + 1e-12
    assert messages_bound(0.4, 1) == 0.4 and messages_bound(0.4, 3) == 1.0


def test_one_value_behind_a_gaussian():
    """Two equally likely means at distance 2 C on a line: the best guess is right with Phi(C / sigma), exactly."""
    assert radius_bound(0.5, 1.0, 2.0) == pytest.approx(0.5 * (1 + math.erf(0.5 / math.sqrt(2))))
    assert radius_bound(0.3, 0.0, 1.0) == pytest.approx(0.3) and radius_bound(0.3, 1.0, 0.0) == 1.0
