import math

import numpy as np
import pytest
import torch

from sgt_titan.evaluation.world import mechanisms
from sgt_titan.evaluation.world.mechanisms import (
    DELTA,
    classical_epsilon,
    gaussian_epsilon,
    largest_distance,
    learned,
    noise_grid,
    nothing,
    redaction,
)
from sgt_titan.evaluation.world.samples import Sample, Span, padded
from sgt_titan.transform import ExportedTransform, SGTConfig, estimator_config
from tests.unit.evaluation.worlds import random_rows, tiny_trunk


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("shift", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_epsilon_solves_the_analytic_condition(shift, delta):
    """Balle and Wang, Theorem 8, with the ordinary functions where they do not overflow."""
    epsilon = gaussian_epsilon(shift, delta)
    left = phi(shift / 2 - epsilon / shift) - math.exp(epsilon) * phi(-shift / 2 - epsilon / shift)
    assert left == pytest.approx(delta, rel=1e-6) if epsilon > 0 else left <= delta


def test_epsilon_is_below_the_classical_one_where_that_is_proven_and_grows_with_less_noise():
    for shift in (0.01, 0.05, 0.2):
        if classical_epsilon(shift, DELTA) < 1:
            assert gaussian_epsilon(shift, DELTA) < classical_epsilon(shift, DELTA)
    values = [gaussian_epsilon(shift, DELTA) for shift in (0.01, 0.1, 1, 10, 50, 200)]
    assert values == sorted(values) and math.isfinite(values[-1])
    assert values[-1] == pytest.approx(200**2 / 2, rel=0.1), "far out the privacy loss is about shift^2 / 2"
    assert gaussian_epsilon(1e-7, 0.1) == 0.0


def test_sensitivity_is_the_largest_distance():
    torch.manual_seed(0)
    table = torch.randn(300, 16)
    assert largest_distance(table, chunk=37) == pytest.approx(torch.cdist(table, table).max().item(), rel=1e-6)


def test_the_grid_states_what_it_is(trunk_dir):
    table = tiny_trunk(trunk_dir).get_input_embeddings().weight
    grid = noise_grid(table, 0.5, (0.7, 1.0, 2.0))
    assert [m.name for m in grid] == ["noise", "noise-1", "noise-2"]
    assert [m.std for m in grid] == [0.35, 0.5, 1.0]
    assert grid[1].facts["epsilon"] > grid[2].facts["epsilon"] > 0
    assert grid[1].facts["epsilon"] == pytest.approx(gaussian_epsilon(largest_distance(table) / 0.5, DELTA))


def test_redaction_replaces_marked_tokens_and_nothing_else(trunk_dir):
    table = tiny_trunk(trunk_dir).get_input_embeddings().weight
    row = Sample(
        np.arange(10, 16), np.array([0, 1, 1, 1, 1, 0], bool), np.zeros(6, bool), (Span(2, 4, "x"), Span(5, 6, "y"))
    )
    batch = padded([row, row.cut(5)], 0, torch.device("cpu"))
    x = table[batch.tokens_BT]
    sent = redaction(table[7]).obfuscate(batch, x, torch.Generator())
    assert sent.log_std_BTD is None
    assert torch.equal(sent.x_tilde_BTD[0, [2, 3]], table[[7, 7]])
    assert torch.equal(sent.x_tilde_BTD[0, [0, 1, 4, 5]], x[0, [0, 1, 4, 5]]), "what is sent in clear anyway stays"


def random_transform(trunk, embeddings: bool) -> ExportedTransform:
    torch.manual_seed(0)
    config = SGTConfig(
        trunk_config=estimator_config(trunk.config, 1), denoiser_layers=1, format_version=2, vocab_size=300,
        hidden_size=32, embeddings=embeddings,
    )  # fmt: skip
    transform = ExportedTransform(config).eval().requires_grad_(False)
    for head in (transform.mean_head, transform.log_std_head, transform.denoiser.head):
        head.weight.normal_(0, 0.1)
    return transform


def test_repeats_are_as_many_calls_that_share_the_moments(trunk_dir):
    trunk = tiny_trunk(trunk_dir)
    transform = random_transform(trunk, embeddings=False)
    sgt = learned(transform)
    batch = padded(random_rows(3, 9, 300, 0), 0, torch.device("cpu"))
    x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
    one, passes = torch.Generator().manual_seed(1), []
    wanted = [sgt.obfuscate(batch, x_BTD, one) for _ in range(3)]
    transform.bodies[0].register_forward_hook(lambda *_: passes.append(1))
    found = sgt.repeats(batch, x_BTD, torch.Generator().manual_seed(1), 3)
    assert all(torch.equal(a, b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f, w, strict=True))
    assert len(passes) == 1 and not torch.equal(found[0].x_tilde_BTD, found[1].x_tilde_BTD)
    assert len(nothing().repeats(batch, x_BTD, torch.Generator(), 2)) == 2


@pytest.mark.parametrize("room", [1 << 20, 0])
def test_the_moments_of_a_row_are_found_once_for_all_batches(trunk_dir, monkeypatch, room):
    monkeypatch.setattr(mechanisms, "KEPT_BYTES", room)
    transform = random_transform(tiny_trunk(trunk_dir), embeddings=True)
    sgt, passes = learned(transform), []
    rows = [row.cut(length) for row, length in zip(random_rows(4, 9, 300, 0), (9, 4, 6, 9), strict=True)]
    for part in ([0, 1], [2, 1, 3], [3, 0], [1, 2]):
        batch = padded([rows[i] for i in part], 0, torch.device("cpu"))
        x_BTD = transform.embed_tokens(batch.tokens_BT)
        one = torch.Generator().manual_seed(1)
        wanted = [sgt.obfuscate(batch, x_BTD, one) for _ in range(2)]
        hook = transform.bodies[0].register_forward_hook(lambda module, given, out: passes.append(len(out[0])))
        found = sgt.repeats(batch, x_BTD, torch.Generator().manual_seed(1), 2)
        hook.remove()
        for f, w in zip(found, wanted, strict=True):
            for got, want in zip(f, w, strict=True):
                torch.testing.assert_close(got[batch.valid_BT], want[batch.valid_BT], rtol=1e-5, atol=1e-6)
    assert passes == ([2, 2] if room else [2, 3, 2, 2])
