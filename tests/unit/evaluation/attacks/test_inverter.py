import torch

from sgt_titan.evaluation.attacks import own_text as module
from sgt_titan.evaluation.attacks.inverter import inverter
from sgt_titan.evaluation.attacks.known_plaintext import fit
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated
from tests.unit.evaluation.worlds import linear, world

SMALL = {"layers": 1, "width": 64, "batch_rows": 32}


def folding(strength: float) -> Mechanism:
    """x~ = strength * |x|: no linear map undoes it, a small network can see through most of it."""

    def obfuscate(batch, x_BTD, random):
        center_BTD = strength * x_BTD.abs() + 0.3 * x_BTD.roll(1, -1)
        sent_BTD = torch.where(batch.obfuscate_BT[..., None], center_BTD, x_BTD)
        return Obfuscated(sent_BTD, center_BTD, None)

    return Mechanism("folding", "folding", obfuscate)


def test_it_learns_what_no_linear_map_can(trunk):
    here = world(folding(1.0), trunk, rows=10, corpus=300)
    guess = inverter(**here.granted(inverter), steps=150, lr=3e-3, **SMALL)
    shares = [(top_N == here.truth_N).double().mean().item() for top_N in guess.curve.top_N]
    assert shares[-1] > shares[0] + 0.1 and shares[-1] > 0.8
    assert guess.curve.at[0] == 0 and guess.curve.at[-1] == 150 and len(guess.curve.extra) == len(shares)
    assert guess.curve.extra[-1] < guess.curve.extra[0] and guess.flops > 0


def test_it_starts_where_the_regression_ends(trunk):
    torch.manual_seed(0)
    D = trunk.config.hidden_size
    here = world(linear(torch.linalg.qr(torch.randn(D, D))[0], torch.randn(D), 0.01), trunk, corpus=300)
    guess = inverter(**here.granted(inverter), steps=1, **SMALL)
    assert (guess.curve.top_N[0] == here.truth_N).double().mean().item() > 0.99


def test_one_that_still_rises_is_said_to(trunk):
    here = world(folding(1.0), trunk, rows=4, corpus=300)
    guess = inverter(**here.granted(inverter), steps=24, lr=3e-3, **SMALL)
    assert any("has not converged" in note for note in guess.notes)


def test_its_own_noise_is_fresh_every_step(trunk, monkeypatch):
    seeds = []
    original = module.generator
    monkeypatch.setattr(module, "generator", lambda seed, device: seeds.append(seed) or original(seed, device))
    here = world(folding(1.0), trunk, rows=2, corpus=60)
    inverter(**here.granted(inverter), steps=10, **SMALL)
    training = [seed for seed in seeds if 0 < seed <= 10]
    assert sorted(training) == list(range(1, 11))


def test_the_global_random_state_is_left_alone(trunk):
    here = world(folding(1.0), trunk, rows=2, corpus=60)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    inverter(**here.granted(inverter), steps=2, **SMALL)
    assert torch.equal(torch.rand(1), expected)


def test_ridge_against_lstsq():
    torch.manual_seed(0)
    x, a = torch.randn(400, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    y = x @ a + 2.0
    affine = fit(x, y)
    assert torch.allclose(affine(x), y, atol=1e-4)
    assert torch.allclose(affine.weight_DD, a, atol=1e-4)
