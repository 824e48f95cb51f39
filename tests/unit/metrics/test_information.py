import math

import pytest
import torch

from sgt_titan.metrics.information import log_mean_exp_information, pac_advantage

# MI in nats per feature, vocabulary, PAC-Adv in percent: arXiv 2506.09452, Tables I and II, from their own MI column.
PUBLISHED = [
    (1.48, 128256, 16.37), (1.91, 128256, 20.56), (1.11, 128256, 12.67),
    (0.26, 128256, 3.50), (0.28, 128256, 3.74), (0.23, 151936, 3.08),
]  # fmt: skip


@pytest.mark.parametrize(("mi", "vocab", "expected"), PUBLISHED)
def test_pac_advantage_reproduces_the_published_column(mi, vocab, expected):
    assert 100 * pac_advantage(mi, 1 / vocab) == pytest.approx(expected, abs=0.005)


def test_pac_advantage_solves_its_equation():
    for q in (1e-6, 0.01, 0.5):
        for mi in (0.01, 0.3):
            p = pac_advantage(mi, q)
            assert p >= q
            assert p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) == pytest.approx(mi, rel=1e-9)


def test_pac_advantage_at_its_edges():
    assert pac_advantage(0.0, 0.25) == pac_advantage(-1.0, 0.25) == 0.25
    assert pac_advantage(math.log(4), 0.25) == pac_advantage(math.inf, 0.25) == 1.0
    assert pac_advantage(0.0, 1.0) == 1.0
    values = [pac_advantage(0.1 * k, 1e-3) for k in range(60)]
    assert values == sorted(values)
    for bad in ((math.nan, 0.5), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(ValueError):
            pac_advantage(*bad)


def brute_force(x, center, log_std, mask):
    """One row and position at a time, in a loop."""
    M, N, _ = x.shape
    out = torch.zeros(M, N, dtype=torch.float64)
    for n in range(N):
        rows = [m for m in range(M) if mask[m, n]]
        for i in rows:
            densities = [
                torch.distributions.Normal(center[j, n].double(), log_std[j, n].double().exp())
                .log_prob(x[i, n].double())
                .sum()
                for j in rows
            ]
            mixture = torch.logsumexp(torch.stack(densities), 0) - math.log(len(rows))
            out[i, n] = densities[rows.index(i)] - mixture
    return out


def test_log_mean_exp_against_a_loop():
    torch.manual_seed(0)
    x, center, log_std = torch.randn(5, 3, 4), torch.randn(5, 3, 4), 0.3 * torch.randn(5, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 0]], dtype=torch.bool)
    x[1, 2] = torch.nan  # not obfuscated there: not read
    found, count = log_mean_exp_information(x, center, log_std, mask)
    assert torch.allclose(found, brute_force(x, center, log_std, mask), atol=1e-10)
    assert count.tolist() == [4, 4, 1]
    assert found[3, 2] == 0  # alone: nothing to tell it from


def test_log_mean_exp_of_a_known_mixture():
    """512 components far apart: ln 512 = 6.24 nats, where averaging the logs reads thousands."""
    torch.manual_seed(0)
    center, log_std = 3 * torch.randn(512, 1, 192), torch.zeros(512, 1, 192)
    x = center + torch.randn(512, 1, 192)
    found, _ = log_mean_exp_information(x, center, log_std, torch.ones(512, 1, dtype=torch.bool))
    assert found.mean().item() == pytest.approx(math.log(512), abs=1e-6)
    averaged_logs = 0.5 * ((x - center.roll(1, 0)).square() - (x - center).square()).sum(-1).mean().item()
    assert averaged_logs > 1000


def test_log_mean_exp_of_components_that_are_one():
    """Nothing is told apart: 0, and never above ln M."""
    torch.manual_seed(0)
    center, log_std = torch.zeros(64, 1, 8), torch.zeros(64, 1, 8)
    found, _ = log_mean_exp_information(torch.randn(64, 1, 8), center, log_std, torch.ones(64, 1, dtype=torch.bool))
    assert found.abs().max().item() < 1e-9


def test_log_mean_exp_of_two_components_against_the_integral():
    """Two unit Gaussians at distance d: the information between the sample and its component, by quadrature."""
    d = 1.5
    grid = torch.linspace(-12, 12 + d, 40001, dtype=torch.float64)
    first = torch.distributions.Normal(0.0, 1.0).log_prob(grid)
    second = torch.distributions.Normal(d, 1.0).log_prob(grid)
    mixture = torch.logsumexp(torch.stack([first, second]), 0) - math.log(2)
    truth = torch.trapezoid(first.exp() * (first - mixture), grid).item()  # by symmetry that of either component
    torch.manual_seed(0)
    N = 200_000
    center = torch.tensor([0.0, d]).view(2, 1, 1).expand(2, N // 2, 1)
    x = center + torch.randn(2, N // 2, 1)
    # Positions one by one would take minutes: the estimator is a mean over positions, so one position of many rows of
    # each component gives the same in expectation.
    value = []
    for part in range(20):
        here = slice(part * 50, part * 50 + 50)
        rows = torch.cat([x[0, here], x[1, here]])[:, None]
        centers = torch.cat([center[0, here], center[1, here]])[:, None]
        found, _ = log_mean_exp_information(rows, centers, torch.zeros_like(rows), torch.ones(100, 1, dtype=torch.bool))
        value.append(found.mean().item())
    assert sum(value) / len(value) == pytest.approx(truth, abs=0.05)
