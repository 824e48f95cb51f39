import math

import pytest
import torch

from sgt_titan.evaluation.attacks import averaging as averaging_module
from sgt_titan.evaluation.attacks import farthest, nearest
from sgt_titan.evaluation.attacks.averaging import averaging, averaging_regression, running_means
from sgt_titan.evaluation.world.mechanisms import constant_noise
from sgt_titan.evaluation.world.threat import Observation, Repeats, Table
from tests.unit.evaluation.worlds import linear, top1, world


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("far", [False, True])
def test_top_rows_against_the_whole_matrix(metric, far, monkeypatch):
    torch.manual_seed(0)
    x, table = torch.randn(37, 8), torch.randn(53, 8)
    whole = torch.cdist(x.double(), table.double())
    if metric == "cosine":
        whole = 1 - torch.nn.functional.cosine_similarity(x[:, None].double(), table[None].double(), dim=-1)
    expected = whole.topk(10, largest=far).indices
    monkeypatch.setattr(nearest, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(nearest, "CHUNK_VOCAB", 7)
    assert torch.equal(nearest.top_rows(x, table, metric=metric, farthest=far), expected)
    assert nearest.top_rows(x, table[:4], 10).shape == (37, 4)


def test_success_under_gaussian_noise_is_that_of_theory():
    """Two rows at distance d under noise s: right with probability Phi(d / 2s)."""
    d, s, N = 2.0, 1.3, 40_000
    table = torch.tensor([[0.0, 0.0], [d, 0.0]])
    tokens = torch.arange(N) % 2
    x = table[tokens] + s * torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    share = (nearest.top_rows(x, table)[:, 0] == tokens).double().mean().item()
    expected = 0.5 * (1 + math.erf(d / (2 * s) / math.sqrt(2)))
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / N))


def test_mahalanobis_weighs_features_by_their_noise(trunk):
    """Half of the features drown: L2 listens to them, Mahalanobis does not."""
    D = trunk.config.hidden_size
    scale = torch.where(torch.arange(D) < D // 2, 30.0, 0.01)

    mechanism = linear(torch.eye(D), torch.full((D,), 0.7), 1.0)
    original = mechanism.obfuscate

    def obfuscate(batch, x_BTD, random):
        sent = original(batch, x_BTD, random)
        noisy = sent.center_BTD + scale * (sent.x_tilde_BTD - sent.center_BTD)
        return sent._replace(x_tilde_BTD=torch.where(batch.obfuscate_BT[..., None], noisy, x_BTD))

    here = world(type(mechanism)("uneven", "uneven", obfuscate), trunk, rows=12)
    for attack, floor, ceiling in ((nearest.mahalanobis, 0.99, 1.0), (nearest.l2, 0.0, 0.2)):
        assert floor <= top1(attack(**here.granted(attack)), here) <= ceiling


def test_farthest_reads_what_is_sent_to_the_opposite_side(trunk):
    D = trunk.config.hidden_size
    here = world(linear(-torch.eye(D) * 50, torch.zeros(D), 1e-3), trunk)
    # x~ = -50 x: of all rows, that of the token itself is about the farthest along x.
    assert top1(farthest.farthest(**here.granted(farthest.farthest)), here) > 0.9
    assert top1(nearest.l2(**here.granted(nearest.l2)), here) < 0.1


def test_most_probable_rank_reads_what_always_lands_at_one_rank(trunk):
    """A client that sends each token's 5th neighbour: its own row is then at some rank, often the same."""
    here = world(linear(torch.eye(trunk.config.hidden_size), torch.zeros(trunk.config.hidden_size), 1e-6), trunk)
    seen = here.observation.x_tilde_ND
    order = farthest.rows_at_ranks(seen, here.table_VD, torch.tensor([1, 2, 300]))
    assert torch.equal(order[:, 0], here.truth_N)
    whole = torch.cdist(seen.double(), here.table_VD.double()).argsort(-1)
    assert torch.equal(order[:, 1:], whole[:, [1, 299]])
    guess = farthest.most_probable_rank(**here.granted(farthest.most_probable_rank))
    assert top1(guess, here) == 1.0 and "rank is 1, that of 100.0%" in guess.notes[0]


def test_averaging_is_as_good_as_less_noise(trunk):
    """K = 16 at sigma reads what K = 1 reads at sigma / 4."""
    sigma = 1.2
    noisy = world(constant_noise(sigma), trunk, rows=60)
    quiet = world(constant_noise(sigma / 4), trunk, rows=60)
    guess = averaging(**noisy.granted(averaging), most=16)
    assert guess.curve.at == (1.0, 2.0, 4.0, 8.0, 16.0)
    expected = top1(nearest.l2(**quiet.granted(nearest.l2)), quiet)
    assert top1(guess, noisy) == pytest.approx(expected, abs=0.06) and expected > 0.2
    single = (guess.curve.top_N[0] == noisy.truth_N).double().mean().item()
    assert single == top1(nearest.l2(**noisy.granted(nearest.l2)), noisy) < expected - 0.1


def test_means_are_means():
    def draw(k):
        return Observation((torch.full((2, 3), float(k + 1)),), (torch.ones(2, dtype=torch.bool),), (torch.zeros(2),))

    first = Observation((torch.zeros(2, 3),), (torch.ones(2, dtype=torch.bool),), (torch.zeros(2),))
    means = running_means(first, Repeats(10, draw), 5)
    assert {count: mean[0, 0].item() for count, mean in means.items()} == {1: 0.0, 2: 0.5, 4: 1.5, 5: 2.0}


def test_averaging_does_not_undo_a_mean_and_a_regression_does(trunk):
    torch.manual_seed(0)
    D = trunk.config.hidden_size
    here = world(linear(torch.linalg.qr(torch.randn(D, D))[0], torch.zeros(D), 0.5), trunk, rows=20, corpus=200)
    assert top1(averaging(**here.granted(averaging), most=32), here) < 0.1
    assert top1(averaging_regression(**here.granted(averaging_regression), most=32), here) > 0.9


def test_one_fit_reads_every_number_of_repeats(trunk, monkeypatch):
    """As a fit for each would: the pairs are the same whatever is averaged."""
    here, fits, original = world(constant_noise(0.3), trunk), [], averaging_module.forward_reading
    monkeypatch.setattr(averaging_module, "forward_reading", lambda *a: fits.append(a) or original(*a))
    granted = here.granted(averaging_regression)
    curve = averaging_regression(**granted, most=8).curve
    pairs, rows_VD = granted["pairs"], here.table_VD
    assert len(fits) == 1 and curve.at == (1.0, 2.0, 4.0, 8.0)
    for (_, mean_ND), top_N in zip(
        running_means(*(granted[n] for n in ("observation", "repeats")), 8).items(), curve.top_N, strict=True
    ):
        alone = original(pairs.x_tilde_MD, rows_VD[pairs.tokens_M], rows_VD)
        assert torch.equal(alone(mean_ND, 1)[:, 0].cpu(), top_N)


def test_table_of_one_row_per_kind_of_grant():
    assert Table(torch.zeros(2, 3)).title and Observation.title
