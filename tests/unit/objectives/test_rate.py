"""The rate against closed forms, quadrature and Monte Carlo: never below the true KL, exact where it must be."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from sgt_titan.objectives.rate import (
    broad_rate,
    exchange,
    gaussian_kl,
    learned_rate,
    log_frequencies,
    mixture_rate,
    token_log_probability,
)

SCALE, TAU = 0.05, 0.07


def gaussians(*shape, seed=0):
    """A center and a log std of the size they have in training, float64."""
    generator = torch.Generator().manual_seed(seed)
    center, log_std = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return SCALE * center, math.log(SCALE) + 0.7 * log_std


def normal(center, log_std):
    return Independent(Normal(center, log_std.exp()), 1)


def test_broad_is_the_closed_form():
    center, log_std = gaussians(2, 3, 5)
    prior = normal(torch.zeros(5, dtype=torch.float64), torch.full((5,), math.log(TAU), dtype=torch.float64))
    torch.testing.assert_close(broad_rate(center, log_std, TAU), kl_divergence(normal(center, log_std), prior))


def test_a_hidden_token_costs_nothing_and_a_readable_one_half_a_log_ratio_a_feature():
    width = 64
    hidden = broad_rate(torch.zeros(1, 1, width), torch.full((1, 1, width), math.log(TAU)), TAU)
    assert hidden.abs().item() < 1e-5
    center = torch.full((1, 1, width), TAU)  # one std away, as a token of the table is on average
    readable = broad_rate(center, torch.full((1, 1, width), math.log(TAU / 100)), TAU).item()
    assert readable == pytest.approx(width * math.log(100), rel=1e-3)


def test_gradient_pulls_towards_the_prior():
    center, log_std = (t.requires_grad_() for t in gaussians(1, 1, 8))
    broad_rate(center, log_std, TAU).sum().backward()
    torch.testing.assert_close(center.grad, center.detach() / TAU**2)
    torch.testing.assert_close(log_std.grad, (2 * (log_std.detach() - math.log(TAU))).exp() - 1)


def mixture(table_VD, log_p_V, logit, prior_log_std):
    """pi_0 N(0, tau^2) + (1 - pi_0) sum_v p_v N(e_v, s^2), whole."""
    width = table_VD.shape[1]
    means = torch.cat([torch.zeros(1, width, dtype=torch.float64), table_VD])
    stds = torch.cat([torch.full((1, width), TAU), torch.full_like(table_VD, math.exp(prior_log_std))]).double()
    pi_0 = torch.sigmoid(logit)
    weights = torch.cat([pi_0[None], (1 - pi_0) * log_p_V.exp()])
    return MixtureSameFamily(Categorical(weights), Independent(Normal(means, stds), 1))


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0, 3.0])
def test_never_below_the_true_kl_to_the_whole_mixture(spread):
    """Monte Carlo over q, 4 standard errors; tokens near each other, so that the components left out matter."""
    generator = torch.Generator().manual_seed(1)
    table_VD = SCALE * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    log_p_V = torch.log_softmax(torch.randn(7, generator=generator, dtype=torch.float64), 0)
    logit, prior_log_std = torch.tensor(0.3, dtype=torch.float64), math.log(0.3 * SCALE)
    r = mixture(table_VD, log_p_V, logit, prior_log_std)
    for v in range(7):
        q = normal(table_VD[v] * 0.9, torch.full((3,), math.log(spread * SCALE), dtype=torch.float64))
        torch.manual_seed(v)
        z = q.sample((20_000,))
        log_ratio = q.log_prob(z) - r.log_prob(z)
        true, error = log_ratio.mean(), log_ratio.std() / math.sqrt(len(z))
        token = gaussian_kl(q.mean, q.stddev.log(), table_VD[v], prior_log_std)
        bound = mixture_rate(broad_rate(q.mean, q.stddev.log(), TAU), token, logit, log_p_V[v])
        assert bound > true - 4 * error, (v, bound, true)


def test_exact_where_only_the_token_s_component_reaches():
    """q is the component itself and the others are far away: the KL is -ln((1 - pi_0) p_v), the surprisal and a bit."""
    table_VD = torch.eye(4, dtype=torch.float64) * 50
    log_p_V = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64))
    logit, prior_log_std = torch.tensor(-4.0, dtype=torch.float64), math.log(0.01)
    log_std = torch.full((4,), prior_log_std, dtype=torch.float64)
    for v in range(4):
        token = gaussian_kl(table_VD[v], log_std, table_VD[v], prior_log_std)
        bound = mixture_rate(broad_rate(table_VD[v], log_std, TAU), token, logit, log_p_V[v])
        assert bound.item() == pytest.approx(-log_p_V[v].item() - math.log1p(-torch.sigmoid(logit).item()), rel=1e-9)


def test_exact_where_q_is_broad():
    center, log_std = torch.zeros(64), torch.full((64,), math.log(TAU))
    token = gaussian_kl(center, log_std, torch.full((64,), 5.0), math.log(0.01))
    bound = mixture_rate(broad_rate(center, log_std, TAU), token, torch.tensor(0.0), torch.tensor(-3.0))
    assert bound.item() == pytest.approx(math.log(2), rel=1e-5)


def test_the_bound_holds_for_the_mutual_information_of_a_small_source():
    """I(X; z) by quadrature in one dimension, against the expected rate under each prior."""
    p_X, e_X = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([-0.1, 0.02, 0.15]).double()
    std_X = torch.tensor([0.02, 0.1, 0.05]).double()
    z_Z = torch.linspace(-2, 2, 200_001, dtype=torch.float64)
    q_ZX = Normal(e_X, std_X).log_prob(z_Z[:, None]).exp()
    mixed_Z = (q_ZX * p_X).sum(-1)
    information = (p_X * torch.xlogy(q_ZX, q_ZX / mixed_Z[:, None])).sum() * (z_Z[1] - z_Z[0])
    center, log_std = e_X[:, None], std_X.log()[:, None]
    broad_X = broad_rate(center, log_std, TAU)
    assert (p_X * broad_X).sum() > information
    for logit in (-3.0, 0.0, 2.0):
        rate_X = learned_rate(
            broad_X, center, center, log_std, p_X.log(),
            gain_D=torch.ones(1), shift_D=torch.zeros(1), prior_log_std_D=torch.zeros(1), logit=torch.tensor(logit),
            scale=SCALE,
        )  # fmt: skip
        assert (p_X * rate_X).sum() > information


def test_learned_numbers_are_in_units_of_the_table():
    center, log_std = gaussians(2, 3, 4)
    x, _ = gaussians(2, 3, 4, seed=9)
    gain, shift, prior_log_std = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    prior = normal(gain * x + SCALE * shift, (math.log(SCALE) + prior_log_std).expand(2, 3, 4))
    never_broad = torch.full((2, 3), math.inf, dtype=torch.float64)
    found = learned_rate(
        never_broad, x, center, log_std, torch.zeros(2, 3),
        gain_D=gain, shift_D=shift, prior_log_std_D=prior_log_std, logit=torch.tensor(-60.0), scale=SCALE,
    )  # fmt: skip
    torch.testing.assert_close(found, kl_divergence(normal(center, log_std), prior))


def test_a_context_that_says_nothing_gives_frequencies():
    log_p_V = log_frequencies(torch.tensor([0, 6, 1]))
    torch.testing.assert_close(log_p_V.exp(), torch.tensor([0.1, 0.7, 0.2]))
    targets, up = torch.tensor([1, 1, 0, 2]), torch.randn(3, 2)
    torch.testing.assert_close(token_log_probability(torch.zeros(4, 2), up, log_p_V, targets), log_p_V[targets])
    probabilities = torch.stack(
        [token_log_probability(torch.ones(1, 2), up, log_p_V, torch.tensor([v])).exp() for v in range(3)]
    )
    assert probabilities.sum().item() == pytest.approx(1.0)


def test_exchange_rate():
    """A response half as long as the prompt: a nat of the prompt costs half the weight."""
    assert exchange(0.08, utility_tokens=50, obfuscated_tokens=100) == pytest.approx(0.04)
    assert exchange(0.08, utility_tokens=50, obfuscated_tokens=0) == pytest.approx(4.0)
