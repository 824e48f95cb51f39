import math
import os
from pathlib import Path

import pytest
import torch

from sgt_titan.errors import UserError
from sgt_titan.objectives.rate import broad_rate
from sgt_titan.transform import gaussian
from sgt_titan.transform.gaussian import (
    Bounds,
    bounded_log_std,
    bounded_mean,
    gated,
    obfuscate,
    secure_noise,
    table_statistics,
)

BOUNDS = Bounds(std_min=1e-4, std_max=10.0, std_init=0.1, mean_bound=2.0, scale=0.03)


def test_zero_raw_is_std_init_and_identity_mean():
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.allclose(bounded_log_std(zero, BOUNDS).exp(), zero + 0.1 * 0.03, rtol=1e-14)
    assert torch.equal(bounded_mean(zero, BOUNDS), zero)


def test_log_std_closed_form():
    # c = logit((ln 0.1 - ln 1e-4) / (ln 10 - ln 1e-4)) = logit(3/5) = ln 1.5; at raw = -ln 1.5 sigma is the
    # geometric mean of the bounds.
    raw = torch.tensor([-math.log(1.5)], dtype=torch.float64)
    assert bounded_log_std(raw, BOUNDS).exp().item() == pytest.approx(math.sqrt(1e-4 * 10.0) * 0.03, rel=1e-12)


def test_log_std_stays_strictly_inside_and_is_monotone():
    raw = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    std = bounded_log_std(raw, BOUNDS).exp() / BOUNDS.scale
    assert (std > 1e-4).all() and (std < 10.0).all() and (std.diff() > 0).all()
    assert std[0].item() == pytest.approx(1e-4, rel=1e-6) and std[-1].item() == pytest.approx(10.0, rel=1e-6)
    assert torch.isfinite(bounded_log_std(torch.tensor([-1e30, 1e30]), BOUNDS)).all()


def test_gradients():
    raw = torch.randn(5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda r: bounded_log_std(r, BOUNDS), raw)
    assert torch.autograd.gradcheck(lambda r: bounded_mean(r, BOUNDS), raw)


def test_mean_bound():
    raw = torch.tensor([-100.0, 1e-6, 100.0], dtype=torch.float64)
    assert torch.allclose(bounded_mean(raw, BOUNDS), torch.tensor([-0.06, 1e-6, 0.06], dtype=torch.float64), atol=1e-12)
    assert torch.equal(bounded_mean(raw, Bounds(1e-4, 10.0, 0.1, 0.0, 0.03)), raw)


GATED = Bounds(std_min=1e-4, std_max=10.0, std_init=0.1, mean_bound=2.0, scale=0.03, closed=1.5)


def drawn(seed=0):
    """x, mu and log sigma of 5 tokens of 4 features, float64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3))


def test_an_open_gate_changes_nothing_and_a_closed_one_says_nothing():
    x, mean, log_std = drawn()
    opened = gated(x, mean, log_std, torch.full((5, 1), 600.0, dtype=torch.float64), GATED)
    assert torch.allclose(opened[0], mean) and torch.allclose(opened[1], log_std)
    center, closed_log_std = gated(x, mean, log_std, torch.full((5, 1), -600.0, dtype=torch.float64), GATED)
    assert torch.allclose(x + center, torch.zeros_like(x), atol=1e-12)
    assert torch.allclose(closed_log_std.exp(), torch.full_like(x, 1.5 * 0.03))
    assert broad_rate(x + center, closed_log_std, 1.5 * 0.03).abs().max() < 1e-12


def test_a_gate_is_of_a_token_and_starts_nearly_open():
    x, mean, log_std = drawn()
    raw = torch.zeros(5, 1, dtype=torch.float64)
    raw[2] = -600.0
    shifted, _ = gated(x, mean, log_std, raw, GATED)
    share = (x + shifted) / (x + mean)
    assert torch.allclose(share[[0, 1, 3, 4]], torch.sigmoid(torch.tensor(3.0, dtype=torch.float64)))
    assert share[2].abs().max() < 1e-12
    closing = [broad_rate(x + m, s, 0.045) for m, s in (gated(x, mean, log_std, raw - k, GATED) for k in (0, 30, 60))]
    assert (closing[0] >= closing[1]).all() and (closing[1] >= closing[2]).all()


def test_a_gates_gradient():
    x, mean, log_std = drawn()
    raw = torch.randn(5, 1, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda r: gated(x, mean, log_std, r, GATED), raw)


def test_bfloat16_heads_give_float32():
    raw = torch.zeros(2, dtype=torch.bfloat16)
    assert bounded_log_std(raw, BOUNDS).dtype == bounded_mean(raw, BOUNDS).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"std_min": 0.0}, "std_min"),
        ({"std_min": -1.0}, "std_min"),
        ({"std_init": 1e-4}, "std_init"),
        ({"std_init": 10.0}, "std_init"),
        ({"std_max": 0.05}, "std_max"),
        ({"std_max": math.inf}, "finite"),
        ({"mean_bound": -1.0}, "mean_bound"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "finite"),
    ],
)
def test_bad_bounds(changes, key):
    with pytest.raises(UserError, match=key) as error:
        Bounds(**(vars(BOUNDS) | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_obfuscate_is_equation_1_under_the_mask_and_exact_elsewhere(dtype):
    generator = torch.Generator().manual_seed(1)
    x, mean, log_std, eps = (torch.randn(2, 5, 4, generator=generator) for _ in range(4))
    x = x.to(dtype)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
    out = obfuscate(x, mean, log_std, eps, mask)
    assert out.dtype == dtype
    for b in range(2):
        for t in range(5):
            if mask[b, t]:
                expected = [
                    x[b, t, d].item() + mean[b, t, d].item() + math.exp(log_std[b, t, d].item()) * eps[b, t, d].item()
                    for d in range(4)
                ]
                tolerance = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
                assert out[b, t].double().tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)
            else:
                assert torch.equal(out[b, t], x[b, t])


def test_obfuscate_refuses_broadcasting():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="shapes"):
        obfuscate(x, x, x, x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="shapes"):
        obfuscate(x, x, x, x[:1], torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("rows", [7, 8, 1])
def test_table_statistics_brute_force(monkeypatch, rows):
    monkeypatch.setattr(gaussian, "_CHUNK_ELEMENTS", 15)  # several uneven chunks
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(rows, 5, generator=generator) * torch.arange(1, 6) + 100.0
    if rows == 1:
        with pytest.raises(UserError, match="all rows are equal"):
            table_statistics(table)
        return
    columns, norms = table.double().T.tolist(), sorted(math.hypot(*row) for row in table.double().tolist())
    variances = [sum((v - sum(c) / rows) ** 2 for v in c) / rows for c in columns]
    middle = norms[rows // 2] if rows % 2 else (norms[rows // 2 - 1] + norms[rows // 2]) / 2
    found = table_statistics(table)
    assert found.scale == pytest.approx(math.sqrt(sum(variances) / 5), rel=1e-12)
    assert found.median_norm == pytest.approx(middle, rel=1e-12)


def test_table_statistics_refuses():
    for bad, message in (
        (torch.tensor([[1.0, math.nan], [1.0, 2.0]]), "NaN"),
        (torch.zeros(0, 4), "shape"),
        (torch.zeros(4), "shape"),
        (torch.ones(4, 4), "all rows are equal"),
    ):
        with pytest.raises(UserError, match=message):
            table_statistics(bad)


@pytest.mark.assets
def test_table_statistics_of_a_real_model():
    assets = os.environ.get("SGT_TITAN_ASSETS")
    if not assets:
        pytest.skip("SGT_TITAN_ASSETS is not set")
    from safetensors import safe_open

    file = Path(assets) / "models/stories3M-hf/model.safetensors"
    with safe_open(file, framework="pt") as handle:
        table = handle.get_tensor("model.embed_tokens.weight")
    found = table_statistics(table)
    assert found.median_norm == pytest.approx(0.492, abs=5e-4)
    # The pooled std over all entries is 0.0362; this table has a common mean vector of norm 0.22, which per-feature
    # variance leaves out.
    assert found.scale == pytest.approx(table.double().var(0).mean().sqrt().item(), rel=1e-3)
    assert found.scale == pytest.approx(0.0326, abs=5e-5)


def test_secure_noise_is_standard_normal(monkeypatch):
    monkeypatch.setattr(gaussian, "_CHUNK_ELEMENTS", 60_001)  # odd chunks
    noise = secure_noise((400, 500)).flatten().double()
    count = noise.numel()
    empirical = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = (torch.special.ndtr(noise.sort().values) - empirical).abs().max().item()
    # Kolmogorov-Smirnov: exceeded by a true normal once in 2e10 runs.
    assert distance < 3.5 / math.sqrt(count)
    for lag in (1, 30_001, 60_001):  # within and across the two Box-Muller halves and the chunks
        assert abs((noise[:-lag] * noise[lag:]).mean().item()) < 7 / math.sqrt(count - lag)


def test_secure_noise_is_box_muller_of_the_systems_bytes(monkeypatch):
    # Words 0x00000000 (int32 0 -> u = 1/2 + 2^-33) everywhere: radius sqrt(-2 ln u), angle 2 pi u.
    monkeypatch.setattr(gaussian.os, "urandom", bytes)
    u = 0.5 + 2.0**-33
    radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * u
    assert secure_noise((3,)).tolist() == pytest.approx(
        [radius * math.cos(angle), radius * math.cos(angle), radius * math.sin(angle)], abs=1e-7
    )


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_secure_noise_is_finite_for_extreme_bytes(monkeypatch, byte):
    monkeypatch.setattr(gaussian.os, "urandom", lambda size: bytes([byte]) * size)
    assert torch.isfinite(secure_noise((9,))).all()
    # int32 minimum and maximum, the ends of the uniform
    monkeypatch.setattr(gaussian.os, "urandom", lambda size: (b"\x00\x00\x00\x80" + b"\xff\xff\xff\x7f") * (size // 8))
    assert torch.isfinite(secure_noise((8,))).all()


def test_secure_noise_never_repeats_and_ignores_torch_seed():
    torch.manual_seed(0)
    first = secure_noise((1000,))
    torch.manual_seed(0)
    assert not torch.equal(first, secure_noise((1000,)))
    assert secure_noise((0, 3)).shape == (0, 3)


def test_torch_cpu_seeds_have_32_bits():
    """The reason for secure_noise. If this ever fails, torch has changed and the docstring is out of date."""
    low = torch.randn(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(low, torch.randn(4, generator=torch.Generator().manual_seed(5 + (7 << 32))))
