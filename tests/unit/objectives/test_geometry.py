import math

import pytest
import torch

from sgt_titan.objectives.geometry import absolute_cosine, component_entropy, cosine, norm_deviation


def test_cosine_against_angles():
    angle = torch.tensor([[0.0, 30.0, 90.0, 120.0, 180.0]]).deg2rad()
    x = torch.tensor([3.0, 0.0]).expand(1, 5, 2)
    x_tilde = 0.2 * torch.stack((angle.cos(), angle.sin()), dim=-1)
    expected = torch.tensor([[1.0, math.sqrt(3) / 2, 0.0, -0.5, -1.0]])
    torch.testing.assert_close(cosine(x, x_tilde), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(absolute_cosine(x, x_tilde), expected.abs(), atol=1e-6, rtol=0)


def test_cosine_equals_torch_away_from_zero():
    x, x_tilde = torch.randn(2, 3, 17, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(cosine(x, x_tilde), torch.nn.functional.cosine_similarity(x, x_tilde, dim=-1))


def test_cosine_does_not_underflow_at_small_scales():
    x = torch.full((1, 1, 4), 1e-5)
    assert cosine(x, x).item() == pytest.approx(1.0)


@pytest.mark.parametrize("function", [cosine, absolute_cosine])
def test_zero_vectors_have_zero_value_and_gradient(function):
    x = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]]], requires_grad=True)
    x_tilde = torch.tensor([[[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]], requires_grad=True)
    value = function(x, x_tilde)
    value.sum().backward()
    assert value.tolist() == [[0.0, 0.0, 0.0]]
    assert x.grad.abs().max() == 0
    assert x_tilde.grad.abs().max() == 0


def test_norm_deviation_is_symmetric_around_the_median():
    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]], requires_grad=True)
    mean = torch.tensor([[[0.0, 4.0], [0.0, 1.0], [0.0, 0.0]]])
    value = norm_deviation(x, mean, 3.0)
    assert value.tolist() == [[2.0, 1.0, 3.0]]
    value.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]]]))


def test_component_entropy_is_minus_the_normal_entropy_per_feature():
    log_std = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(torch.zeros_like(log_std), log_std.exp())
    torch.testing.assert_close(
        component_entropy(log_std), 0.5 * (1 + math.log(2 * math.pi)) - normal.entropy().mean(-1)
    )


@pytest.mark.parametrize("function", [cosine, absolute_cosine])
def test_gradients(function):
    generator = torch.Generator().manual_seed(0)
    x, x_tilde = (torch.randn(2, 3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(function, (x, x_tilde))
    assert torch.autograd.gradcheck(lambda a, b: norm_deviation(a, b, 1.5), (x, x_tilde))
    assert torch.autograd.gradcheck(component_entropy, (x,))


def test_half_precision_inputs_are_computed_in_float32():
    x, x_tilde = torch.randn(2, 1, 3, 4096, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(0)
    for value, reference in (
        (cosine(x, x_tilde), cosine(x.double(), x_tilde.double())),
        (norm_deviation(x, x_tilde, 1.0), norm_deviation(x.double(), x_tilde.double(), 1.0)),
        (component_entropy(x), component_entropy(x.double())),
    ):
        assert value.dtype == torch.float32
        assert reference.dtype == torch.float64
        torch.testing.assert_close(value.double(), reference, atol=1e-6, rtol=1e-5)
