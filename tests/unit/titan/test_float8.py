"""Frozen float8 matrices: rounding, products, and what is kept of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from sgt_titan.titan.float8 import E4M3, Float8Linear, frozen_linear, to_float8, to_float8_layers
from sgt_titan.titan.load_trunk import load_trunk
from sgt_titan.titan.trunks import build, family_of
from sgt_titan.transform.trunk_files import TrunkFiles

MODES = ["weights", "products"]


def dequantized(weight_OI, scale_O1):
    return weight_OI.double() * scale_O1.double()


def test_rounding_is_to_the_nearest_number_of_a_row_s_own_scale():
    torch.manual_seed(0)
    matrix = torch.randn(64, 48) * torch.logspace(-20, 20, 64)[:, None]
    matrix[3] = 0.0
    rounded, scale = to_float8(matrix)
    assert rounded.dtype == E4M3 and scale.shape == (64, 1) and scale.dtype == torch.float32
    # e4m3 has three bits behind the point, so half a step is 1/16; below 2^-6 steps are 2^-9.
    error = (dequantized(rounded, scale) - matrix).abs()
    assert (error <= matrix.abs() / 16 * 1.0001 + scale * 2**-10).all()
    largest = matrix.abs().argmax(-1)
    rows = [row for row in range(64) if row != 3]
    assert (rounded.float().abs()[rows, largest[rows]] == 448).all()
    assert (rounded[3].float() == 0).all() and scale[3] == 1


def test_a_number_that_is_none_stays_visible():
    matrix = torch.ones(2, 16)
    matrix[1, 3] = torch.nan
    rounded, _ = to_float8(matrix)
    assert rounded[0].float().isfinite().all() and rounded[1].float().isnan().any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_value_and_gradient_are_those_of_the_rounded_matrix(mode, shape):
    torch.manual_seed(0)
    dtype = torch.float64 if mode == "weights" else torch.float32
    x, bias = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(48, dtype=dtype)
    weight, scale = to_float8(torch.randn(48, 64) * torch.logspace(-2, 2, 48)[:, None])
    y = frozen_linear(x, weight, scale, bias, mode)
    expected = F.linear(x, dequantized(weight, scale).to(dtype), bias)
    upstream = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, x, upstream)[0] for out in (y, expected))
    for a, b in ((y, expected), (found, wanted)):
        if mode == "weights":
            torch.testing.assert_close(a, b)
        else:  # x and the gradient are rounded too, to three bits
            assert 1e-3 < (a - b).norm() / b.norm() < 0.05


def test_a_product_that_needs_no_rounding_is_exact():
    """Small whole numbers, of which the largest of every row is 7: scales are 7 / 448, a power of two."""
    torch.manual_seed(0)
    x, weight = (torch.randint(-7, 8, shape).float() for shape in ((5, 64), (48, 64)))
    x[:, 0], weight[:, 0] = 7.0, 7.0
    x.requires_grad_()
    y = frozen_linear(x, *to_float8(weight), None, "products")
    assert torch.equal(y, F.linear(x, weight))
    upstream = x.new_zeros(5, 48)
    upstream[:, :7] = 448 / 64  # times the scale a power of two again
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(gradient, upstream @ weight)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_the_float8_matrix_is_kept(mode):
    weight, scale = to_float8(torch.randn(48, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_linear(torch.randn(5, 64, requires_grad=True), weight, scale, None, mode)
    assert [t.dtype for t in kept] == [E4M3, torch.float32]
    assert kept[0].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("mode", MODES)
def test_compiles_whole(mode):
    torch.manual_seed(0)
    weight, scale = to_float8(torch.randn(48, 64))
    x = torch.randn(5, 64, requires_grad=True)
    compiled = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager")
    for run in (frozen_linear, compiled):
        y = run(x, weight, scale, None, mode)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        if run is frozen_linear:
            expected = y, gradient
    torch.testing.assert_close((y, gradient), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_layers_are_loaded_in_float8_and_the_rest_as_it_is(name, trunk_dir):
    hf, files = AutoConfig.from_pretrained(trunk_dir(name)), TrunkFiles(trunk_dir(name))
    plain, rounded = build(hf, "sdpa").build(), to_float8_layers(build(hf, "sdpa"), "weights").build()
    for trunk in (plain, rounded):
        load_trunk(trunk, family_of(hf), files)
    expected, seen = dict(plain.named_parameters()), set()
    for path, module in rounded.named_modules():
        if isinstance(module, Float8Linear):
            assert path.startswith("layers.")
            seen |= {f"{path}.weight", f"{path}.weight_scale"}
            original = expected[f"{path}.weight"]
            assert module.weight.dtype == E4M3
            wanted, scale = to_float8(original)
            assert torch.equal(module.weight.float(), wanted.float()) and torch.equal(module.weight_scale, scale)
    assert len(seen) == 2 * 7 * hf.num_hidden_layers
    for path, weight in rounded.named_parameters():
        if path not in seen:
            assert weight.dtype == torch.float32 and torch.equal(weight, expected[path])
