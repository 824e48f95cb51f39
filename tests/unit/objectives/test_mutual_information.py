import math
from itertools import pairwise

import pytest
import torch

from sgt_titan.errors import UserError
from sgt_titan.objectives.mutual_information import (
    MI_OFFSET,
    common_positions,
    group_loss,
    group_offset,
    mutual_information,
    mutual_information_loss,
    shifts,
)


def batch(rows=3, length=5, width=4, dtype=torch.float64, seed=0, holes=True):
    """(value, log_std, mask) of some rows; the masks have holes."""
    generator = torch.Generator().manual_seed(seed)
    value, log_std = torch.randn(2, rows, length, width, dtype=torch.float64, generator=generator).to(dtype).unbind(0)
    mask = torch.rand(rows, length, generator=generator) < 0.7 if holes else torch.ones(rows, length, dtype=torch.bool)
    return value, 0.5 * log_std, mask


def brute_force(x_tilde, log_std, mask, y_center, y_log_std, y_mask):
    """Eq. 8 of one pair, one position and feature at a time."""
    total, positions = 0.0, 0
    for t in range(x_tilde.shape[0]):
        if not (mask[t] and y_mask[t]):
            continue
        positions += 1
        for d in range(x_tilde.shape[1]):
            S_x, S_y = math.exp(2 * log_std[t, d].item()), math.exp(2 * y_log_std[t, d].item())
            residual = x_tilde[t, d].item() - y_center[t, d].item()
            total += 0.5 * (math.log(S_y) - math.log(S_x) + residual**2 / S_y)
    return total / (positions * x_tilde.shape[1]) if positions else 0.0


def test_pairs_equal_brute_force_with_holes_in_the_masks():
    x, y = batch(seed=1), batch(seed=2)
    x[2][2], y[2][2] = torch.tensor([1, 1, 0, 0, 0]), torch.tensor([0, 0, 1, 0, 1])  # nothing in common
    assert (x[2] & y[2]).any(1).tolist() == [True, True, False]
    expected = [brute_force(*(part[b] for part in (*x, *y))) for b in range(3)]
    loss = mutual_information_loss(*x, *y)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    assert loss[2] == 0
    reported = mutual_information(*x, *y)
    torch.testing.assert_close(reported[:2], loss[:2] - 0.5)
    assert reported[2] == 0


def test_integer_masks_are_masks():
    x, y = batch(seed=1), batch(seed=2)
    expected = mutual_information(*x, *y)
    assert torch.equal(mutual_information(x[0], x[1], x[2].long() * 3, y[0], y[1], y[2].long()), expected)


def test_algorithm_1_by_log_densities():
    """-log p(x~|y) - h(x~|x) by torch.distributions, per feature: the same number, not only the same expectation."""
    (x_tilde, log_std, mask), (y_center, y_log_std, y_mask) = batch(seed=1), batch(seed=2)
    cross = -torch.distributions.Normal(y_center, y_log_std.exp()).log_prob(x_tilde)
    own = torch.distributions.Normal(torch.zeros_like(log_std), log_std.exp()).entropy()
    common = mask & y_mask
    expected = ((cross - own).mean(-1) * common).sum(-1) / common.sum(-1)
    torch.testing.assert_close(mutual_information(x_tilde, log_std, mask, y_center, y_log_std, y_mask), expected)


@pytest.mark.parametrize("distance", [0.0, 0.5, 3.0])
def test_two_components_of_equal_width(distance):
    """Zero for one component, d^2 / (2 sigma^2) for two at distance d, in expectation over the noise."""
    generator = torch.Generator().manual_seed(0)
    sigma, shape = 0.7, (1, 1000, 400)
    center = torch.randn(shape, generator=generator)
    x_tilde = center + sigma * torch.randn(shape, generator=generator)
    log_std, mask = torch.full(shape, math.log(sigma)), torch.ones(shape[:2], dtype=torch.bool)
    estimate = mutual_information(x_tilde, log_std, mask, center + distance, log_std, mask).item()
    expected = distance**2 / (2 * sigma**2)
    # Variance per feature of 1/2 chi-square with non-centrality (d/sigma)^2.
    error = math.sqrt((0.5 + (distance / sigma) ** 2) / (1000 * 400))
    assert estimate == pytest.approx(expected, abs=5 * error)
    assert error < 0.01


def test_unequal_widths_give_the_divergence_of_the_gaussians():
    generator = torch.Generator().manual_seed(0)
    shape, mask = (1, 1000, 400), torch.ones(1, 1000, dtype=torch.bool)
    wide, narrow = torch.distributions.Normal(0.0, 1.5), torch.distributions.Normal(0.4, 1.0)
    x_tilde = 1.5 * torch.randn(shape, generator=generator)
    estimate = mutual_information(
        x_tilde, torch.full(shape, math.log(1.5)), mask, torch.full(shape, 0.4), torch.zeros(shape), mask
    ).item()
    assert estimate == pytest.approx(torch.distributions.kl_divergence(wide, narrow).item(), abs=0.02)


def test_unnormalised_mahalanobis_term_is_chi_square_with_mean_features_times_positions():
    """METHOD: about 49,000 for T=32, D=1536, which drowns every other term; per feature it is 1."""
    T, D, rows = 32, 1536, 20
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, T, D, generator=generator)
    log_std, center = torch.zeros_like(noise), torch.zeros_like(noise)
    mask = torch.ones(rows, T, dtype=torch.bool)
    loss = mutual_information_loss(noise, log_std, mask, center, log_std, mask)
    chi_square = 2 * T * D * loss.double()
    assert chi_square.mean().item() == pytest.approx(T * D, abs=5 * math.sqrt(2 * T * D / rows))
    assert chi_square.std().item() == pytest.approx(math.sqrt(2 * T * D), rel=0.6)
    assert loss.mean().item() == pytest.approx(MI_OFFSET, abs=0.01)


def test_gradcheck_of_pairs():
    (x_tilde, log_std, mask), (y_center, y_log_std, y_mask) = batch(2, 3, 2, seed=1), batch(2, 3, 2, seed=5)
    mask[0, 0], y_mask[0, 0] = True, False
    inputs = tuple(x.requires_grad_() for x in (x_tilde, log_std, y_center, y_log_std))

    def function(x, ls, y, yls):
        return mutual_information(x, ls, mask, y, yls, y_mask)

    assert (mask & y_mask).any()
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_input_alone(wanted):
    x, y = batch(2, 3, 2, seed=1), batch(3, 3, 2, seed=5)
    arguments = [x[0], x[1], x[2], y[0], y[1], y[2]]
    slot = (0, 1, 3, 4)[wanted]

    def function(value):
        return group_loss(*arguments[:slot], value, *arguments[slot + 1 :], first=1, shifts=(1, 2))

    assert torch.autograd.gradcheck(function, (arguments[slot].requires_grad_(),))


def test_nothing_in_common_is_zero_without_gradient():
    (x_tilde, log_std, _), (y_center, y_log_std, _) = batch(seed=1), batch(seed=2)
    mask = torch.tensor([[True, True, False, False, False]] * 3)
    inputs = [x.requires_grad_() for x in (x_tilde, log_std, y_center, y_log_std)]
    loss = mutual_information_loss(x_tilde, log_std, mask, y_center, y_log_std, ~mask)
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert all(x.grad.abs().max() == 0 for x in inputs)


def test_unread_positions_may_hold_anything():
    x, y = batch(seed=1), batch(seed=2)
    common = (x[2] & y[2])[..., None]
    inputs, clean = [], []
    for value in (x[0], x[1], y[0], y[1]):
        for fill, into in ((torch.nan, inputs), (0.0, clean)):
            into.append(value.masked_fill(~common, fill).requires_grad_())
    losses = [mutual_information_loss(a, b, x[2], c, d, y[2]) for a, b, c, d in (inputs, clean)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.sum().backward()
    for dirty, tidy in zip(inputs, clean, strict=True):
        assert torch.equal(dirty.grad, tidy.grad)
        assert tidy.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_inside(dtype):
    x, y = batch(4, 64, 96, dtype, 1), batch(4, 64, 96, dtype, 2)
    inputs = [value.requires_grad_() for value in (x[0], x[1], y[0], y[1])]
    loss = mutual_information_loss(x[0], x[1], x[2], y[0], y[1], y[2])
    wide = [value.detach().double().requires_grad_() for value in inputs]
    reference = mutual_information_loss(wide[0], wide[1], x[2], wide[2], wide[3], y[2])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, atol=0, rtol=1e-5)
    loss.sum().backward()
    reference.sum().backward()
    for value, other in zip(inputs, wide, strict=True):
        assert value.grad.dtype == dtype
        torch.testing.assert_close(value.grad.double(), other.grad, atol=1e-7, rtol=2 * torch.finfo(dtype).eps)


def test_tiny_sigma_stays_in_range():
    """1 / sigma^2 overflows float32 where the standardised residual is 1."""
    x_tilde, y_log_std = torch.full((1, 1, 2), 1e-22), torch.full((1, 1, 2), math.log(1e-22))
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = mutual_information_loss(x_tilde, y_log_std, mask, torch.zeros(1, 1, 2), y_log_std, mask)
    assert loss.item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("group", range(2, 8))
def test_shifts_visit_every_ordered_pair_once(group):
    pairs = [(i, (i + s) % group) for s in shifts("all", group) for i in range(group)]
    assert sorted(pairs) == [(i, j) for i in range(group) for j in range(group) if i != j]
    assert [(i + s) % group for s in shifts("shift", group) for i in range(group)] == [*range(1, group), 0]


def test_shifts_refuse_what_makes_no_pairs():
    with pytest.raises(UserError, match=r"objective\.mi_group"):
        shifts("all", 1)
    with pytest.raises(UserError, match=r"objective\.mi_pairs"):
        shifts("some", 4)


@pytest.mark.parametrize(("first", "rows"), [(0, 5), (0, 2), (2, 2), (3, 2), (4, 1)])
@pytest.mark.parametrize("pairs", ["all", "shift"])
def test_group_equals_brute_force_over_pairs(first, rows, pairs):
    group = 5
    x, y = batch(rows, seed=1), batch(group, seed=2)
    steps = shifts(pairs, group)
    expected = [
        sum(
            brute_force(*(part[b] for part in x), *(part[j] for part in y))
            for j in range(group)
            if (j != first + b if pairs == "all" else j == (first + b + 1) % group)
        )
        / len(steps)
        for b in range(rows)
    ]
    loss = group_loss(*x, *y, first=first, shifts=steps)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_gradient_of_a_group_in_which_x_and_y_are_the_same_rows():
    """As in training: y_center and log_std of a row serve as x side and as y side."""
    group = 4
    center, log_std, mask = batch(group, 3, 2, seed=3)
    noise = batch(group, 3, 2, seed=4)[0]

    def function(center, log_std):
        x_tilde = center + log_std.exp() * noise
        return group_loss(x_tilde, log_std, mask, center, log_std, mask, first=0, shifts=shifts("all", group))

    assert torch.autograd.gradcheck(function, (center.requires_grad_(), log_std.requires_grad_()))


def test_a_group_split_over_ranks_is_the_group():
    """Values concatenate and gradients of y add up, over row splits and over sequence shards."""
    group, length = 4, 6
    center, log_std, mask = batch(group, length, 3, seed=3)
    mask[0], mask[1] = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()  # no common position
    x_tilde = center + log_std.exp() * batch(group, length, 3, seed=4)[0]
    steps = shifts("all", group)
    inputs = [x.requires_grad_() for x in (x_tilde.detach(), log_std, center)]

    def loss_of(first, last, part, positions=None):
        rows = slice(first, last)
        return group_loss(
            inputs[0][rows, part], inputs[1][rows, part], mask[rows, part],
            inputs[2][:, part], inputs[1][:, part], mask[:, part], first=first, shifts=steps, positions=positions,
        )  # fmt: skip

    whole = loss_of(0, group, slice(None))
    expected = torch.autograd.grad(whole.square().sum(), inputs)
    pieces = []
    for first, last in ((0, 1), (1, 4)):
        positions = common_positions(mask[first:last], mask, first=first, shifts=steps)
        shards = [loss_of(first, last, slice(*edge), list(positions)) for edge in pairwise((0, 1, 4, 6))]
        pieces.append(sum(shards))
    torch.testing.assert_close(torch.cat(pieces), whole)
    gradients = torch.autograd.grad(torch.cat(pieces).square().sum(), inputs)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_positions_of_the_whole_sequence_make_shards_add_up():
    x, y = batch(seed=1), batch(seed=2)
    positions = (x[2] & y[2]).sum(1)
    shards = [
        mutual_information(*(part[:, t : t + 1] for part in (*x, *y)), positions_B=positions)
        for t in range(x[0].shape[1])
    ]
    torch.testing.assert_close(sum(shards), mutual_information(*x, *y))


def test_group_offset_turns_the_loss_into_algorithm_1():
    group, first, steps = 4, 1, shifts("all", 4)
    x, y = batch(2, seed=1), batch(group, seed=2)
    y[2][3] = False  # a row with nothing to pair with
    partners = [[(first + b + s) % group for b in range(2)] for s in steps]
    expected = sum(mutual_information(*x, *(part[index] for part in y)) for index in partners) / len(steps)
    offset = group_offset(x[2], y[2], first=first, shifts=steps)
    torch.testing.assert_close(group_loss(*x, *y, first=first, shifts=steps) - offset, expected)
    assert (offset < MI_OFFSET).all()
    positions = common_positions(x[2], y[2], first=first, shifts=steps)
    shards = [
        group_offset(x[2][:, [t]], y[2][:, [t]], first=first, shifts=steps, positions=positions) for t in range(5)
    ]
    torch.testing.assert_close(sum(shards), offset)


def test_memory_kept_for_backward_does_not_grow_with_the_pairs():
    group = 8
    x = batch(group, seed=1)
    saved = []
    inputs = [value.requires_grad_() for value in x[:2]]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        group_loss(*inputs, x[2], *inputs, x[2], first=0, shifts=shifts("all", group))
    ours = {value.data_ptr() for value in x}
    assert all(tensor.data_ptr() in ours or tensor.numel() <= group * group for tensor in saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 3}, "outside a group"),
        ({"first": -1}, "outside a group"),
        ({"shifts": (0,)}, "with other rows"),
        ({"shifts": (1, 4)}, "with other rows"),
        ({"shifts": ()}, "with other rows"),
        ({"positions": torch.ones(2, 2)}, "positions"),
    ],
)
def test_group_refuses(change, message):
    x, y = batch(2, seed=1), batch(4, seed=2)
    with pytest.raises(ValueError, match=message):
        group_loss(*x, *y, **{"first": 0, "shifts": (1,), **change})


def test_mismatched_shapes_are_refused():
    x, y = batch(3, seed=1), batch(3, seed=2)
    with pytest.raises(ValueError, match="y_mask"):
        mutual_information_loss(*x, y[0], y[1], y[2][:, 1:])
    with pytest.raises(ValueError, match="x is"):
        mutual_information_loss(*x, *(part[:2] for part in y))
    with pytest.raises(ValueError, match="x is"):
        group_loss(*x, *(part[:, :4] for part in y), first=0, shifts=(1,))
