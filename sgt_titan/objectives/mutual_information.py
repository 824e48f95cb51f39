"""The mutual-information term: Algorithm 1 and Proposition 5.1 (Eq. 8) of arXiv 2506.09452.

Legend: B rows of x, G rows of a pair group, S shifts, T sequence, D width.

The derivation, and the constant between the two quantities here. Algorithm 1 estimates

    MI(x~; x) = h(x~) - h(x~|x) ~ -log p(x~|y) - h(x~|x),       y independent of x,

with p(.|y) = N(y + mu(y), S(y)), S = diag(sigma^2), and the conditional entropy in closed form. Per feature

    -log p(x~|y) = 1/2 [log 2 pi + log S(y) + (x~ - y - mu(y))^2 / S(y)]
    h(x~|x)      = 1/2 [log 2 pi + log S(x) + 1]
    difference   = 1/2 [log S(y) - log S(x) + (x~ - y - mu(y))^2 / S(y)] - 1/2.

Eq. 8 drops the constant: it is Algorithm 1 plus 1/2 per feature (``MI_OFFSET``). With y = x its expectation is 1/2,
the Mahalanobis term being chi-square. ``mutual_information_loss`` and ``group_loss`` are Eq. 8, what training adds up;
``mutual_information`` is Algorithm 1, what is reported as nats per feature: 0 for a single component, d^2 / (2 sigma^2)
for two components at distance d with equal sigma.

Everything is divided by features and positions: un-normalised, the Mahalanobis term is a chi-square with expectation
T * D, which buries every other term. The estimator averages log densities over y (the vCLUB form), so it is an upper
bound and can exceed ln V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.autograd.function import once_differentiable

from sgt_titan.errors import UserError

MI_OFFSET = 0.5
"""Nats per feature by which Eq. 8 exceeds Algorithm 1: half of E[chi-square with one degree of freedom]."""


def mutual_information_loss(
    x_tilde_BTD: torch.Tensor,
    log_std_BTD: torch.Tensor,
    mask_BT: torch.Tensor,
    y_center_BTD: torch.Tensor,
    y_log_std_BTD: torch.Tensor,
    y_mask_BT: torch.Tensor,
    *,
    positions_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 8 for the pairs (x_b, y_b), (B,), nats per feature and position; differentiable in the four real inputs.

    Args:
        x_tilde_BTD: obfuscations of x.
        log_std_BTD: log sigma(x).
        mask_BT: true where x is obfuscated.
        y_center_BTD: y + mu(y), rows independent of x.
        y_log_std_BTD: log sigma(y).
        y_mask_BT: true where y is obfuscated.
        positions_B: common positions of each pair over the whole sequence, when T is one rank's shard of it: the
            results of all shards then add up. Default: counted here.

    Only positions where both masks hold count; what stands elsewhere is not read, NaN included. A pair without a
    common position gives exactly 0 and no gradient. float32 (float64 for float64 inputs).

    Raises ValueError if shapes do not match.
    """
    _check_shapes(x_tilde_BTD, log_std_BTD, mask_BT, y_center_BTD, y_log_std_BTD, y_mask_BT)
    if y_center_BTD.shape != x_tilde_BTD.shape:
        raise ValueError(f"x is {tuple(x_tilde_BTD.shape)} but y is {tuple(y_center_BTD.shape)}")
    mask_BT, y_mask_BT = mask_BT.bool(), y_mask_BT.bool()
    if positions_B is None:
        positions_B = (mask_BT & y_mask_BT).sum(-1)
    scale_SB = _reciprocal(positions_B, x_tilde_BTD)[None] / x_tilde_BTD.shape[-1]
    return _PairSum.apply(
        x_tilde_BTD, log_std_BTD, mask_BT, y_center_BTD, y_log_std_BTD, y_mask_BT, scale_SB, 0, range(1)
    )


def mutual_information(
    x_tilde_BTD: torch.Tensor,
    log_std_BTD: torch.Tensor,
    mask_BT: torch.Tensor,
    y_center_BTD: torch.Tensor,
    y_log_std_BTD: torch.Tensor,
    y_mask_BT: torch.Tensor,
    *,
    positions_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Algorithm 1 for the pairs (x_b, y_b), (B,), nats per feature: the number to report.

    ``mutual_information_loss`` minus ``MI_OFFSET`` for the positions of this shard. Arguments, masks and errors as
    there; exactly 0 without a common position. One pair's value is one sample of the estimate and may be negative.
    """
    loss_B = mutual_information_loss(
        x_tilde_BTD, log_std_BTD, mask_BT, y_center_BTD, y_log_std_BTD, y_mask_BT, positions_B=positions_B
    )
    here_B = (mask_BT.bool() & y_mask_BT.bool()).sum(-1)
    positions_B = here_B if positions_B is None else positions_B
    return loss_B - MI_OFFSET * here_B * _reciprocal(positions_B, loss_B)


def shifts(pairs: Literal["all", "shift"], group: int) -> range:
    """The shifts s whose pairs (i, (i + s) % group) are the pairs of a group, x never with itself.

    "all": every ordered pair exactly once; "shift": each sample with its successor.

    Raises UserError for a group of fewer than two samples, or an unknown ``pairs``.
    """
    if group < 2:
        raise UserError(f"objective.mi_group: {group} samples make no pair of different samples; at least 2 are needed")
    if pairs == "all":
        return range(1, group)
    if pairs == "shift":
        return range(1, 2)
    raise UserError(f"objective.mi_pairs: {pairs!r} is unknown; use 'all' or 'shift'")


def common_positions(
    mask_BT: torch.Tensor, y_mask_GT: torch.Tensor, *, first: int, shifts: Sequence[int]
) -> torch.Tensor:
    """Positions where both masks hold, for every shift and row of ``group_loss``: (S, B) int64.

    From masks of the whole sequence it is the ``positions`` of every shard.
    """
    _check_group(mask_BT.shape[0], y_mask_GT.shape[0], first, shifts)
    row_B = first + torch.arange(mask_BT.shape[0], device=y_mask_GT.device)
    counts = [(mask_BT.bool() & y_mask_GT.bool()[(row_B + shift) % y_mask_GT.shape[0]]).sum(-1) for shift in shifts]
    return torch.stack(counts)


def group_loss(
    x_tilde_BTD: torch.Tensor,
    log_std_BTD: torch.Tensor,
    mask_BT: torch.Tensor,
    y_center_GTD: torch.Tensor,
    y_log_std_GTD: torch.Tensor,
    y_mask_GT: torch.Tensor,
    *,
    first: int,
    shifts: Sequence[int],
    positions: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Eq. 8 averaged over each row's pairs in its group, (B,), nats per feature and position.

    Row b of x is row ``first + b`` of the group of G rows that the y tensors hold in full; it is paired with row
    ``(first + b + s) % G`` for every s of ``shifts``. The result is the sum over pairs divided by ``len(shifts)``, so
    a pair without a common position counts as 0. Both sides may carry gradients; within a group the x rows of one
    rank are also y rows of others.

    Whatever the number of shifts, forward and backward need a few (B, T, D) temporaries beside the inputs and their
    gradients: pairs are recomputed in the backward pass, not saved.

    Args:
        positions: for each shift the (B,) common positions over the whole sequence, when T is one rank's shard of it
            (``common_positions`` of the whole masks). Default: counted here.

    Raises ValueError if shapes do not match, rows lie outside the group, or a shift pairs a row with itself.
    """
    _check_shapes(x_tilde_BTD, log_std_BTD, mask_BT, y_center_GTD, y_log_std_GTD, y_mask_GT)
    _check_group(x_tilde_BTD.shape[0], y_center_GTD.shape[0], first, shifts)
    mask_BT, y_mask_GT = mask_BT.bool(), y_mask_GT.bool()
    positions_SB = _stack(positions, common_positions(mask_BT, y_mask_GT, first=first, shifts=shifts))
    scale_SB = _reciprocal(positions_SB, x_tilde_BTD) / (x_tilde_BTD.shape[-1] * len(shifts))
    return _PairSum.apply(
        x_tilde_BTD, log_std_BTD, mask_BT, y_center_GTD, y_log_std_GTD, y_mask_GT, scale_SB, first, shifts
    )


def group_offset(
    mask_BT: torch.Tensor,
    y_mask_GT: torch.Tensor,
    *,
    first: int,
    shifts: Sequence[int],
    positions: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """What ``group_loss`` exceeds Algorithm 1 by, (B,) float32: ``group_loss - group_offset`` is the MI to report.

    ``MI_OFFSET`` unless a pair has no common position or T is a shard. Arguments and errors as in ``group_loss``.
    """
    here_SB = common_positions(mask_BT, y_mask_GT, first=first, shifts=shifts)
    positions_SB = _stack(positions, here_SB)
    like = here_SB.new_empty((), dtype=torch.float32)
    return MI_OFFSET * (here_SB * _reciprocal(positions_SB, like)).sum(0) / len(shifts)


class _PairSum(torch.autograd.Function):
    """sum_s scale[s, b] * sum_{common t, d} [log sigma(y) - log sigma(x) + 1/2 ((x~ - y_center) / sigma(y))^2].

    Written out because autograd would keep several (B, T, D) tensors for every shift, and because slices of y give
    gradients the size of the whole group each.
    """

    @staticmethod
    def forward(ctx, x_tilde, log_std, mask, y_center, y_log_std, y_mask, scale_SB, first, shifts):
        total_B = scale_SB.new_zeros(x_tilde.shape[0])
        for index, shift in enumerate(shifts):
            for rows, y_rows in _segments(first + shift, x_tilde.shape[0], y_center.shape[0]):
                z_BTD, y_log_std_BTD, _ = _standardised(x_tilde[rows], y_center[y_rows], y_log_std[y_rows], total_B)
                value_BT = z_BTD.square_().mul_(0.5).add_(y_log_std_BTD).sub_(log_std[rows]).sum(-1)
                value_BT.masked_fill_(~(mask[rows] & y_mask[y_rows]), 0.0)
                total_B[rows] += value_BT.sum(-1) * scale_SB[index, rows]
        ctx.save_for_backward(x_tilde, log_std, mask, y_center, y_log_std, y_mask, scale_SB)
        ctx.first, ctx.shifts = first, shifts
        return total_B

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B):
        x_tilde, log_std, mask, y_center, y_log_std, y_mask, scale_SB = ctx.saved_tensors
        need_x, need_log_std, _, need_y, need_y_log_std, *_ = ctx.needs_input_grad
        grad_x = torch.zeros_like(x_tilde, dtype=grad_B.dtype) if need_x else None
        grad_y = torch.zeros_like(y_center, dtype=grad_B.dtype) if need_y else None
        grad_y_log_std = torch.zeros_like(y_log_std, dtype=grad_B.dtype) if need_y_log_std else None
        weight_sum_BT = grad_B.new_zeros(mask.shape)
        for index, shift in enumerate(ctx.shifts):
            for rows, y_rows in _segments(ctx.first + shift, x_tilde.shape[0], y_center.shape[0]):
                uncommon_BT = ~(mask[rows] & y_mask[y_rows])
                weight_BT = (grad_B[rows] * scale_SB[index, rows])[:, None].masked_fill(uncommon_BT, 0.0)
                weight_sum_BT[rows] += weight_BT
                if not (need_x or need_y or need_y_log_std):
                    continue
                z_BTD, _, inverse_std_BTD = _standardised(x_tilde[rows], y_center[y_rows], y_log_std[y_rows], weight_BT)
                # Not by the zero weight alone: 0 * NaN from an unread position is NaN.
                z_BTD.masked_fill_(uncommon_BT[..., None], 0.0)
                if grad_y_log_std is not None:
                    grad_y_log_std[y_rows] += weight_BT[..., None] * (1.0 - z_BTD.square())
                if need_x or need_y:
                    inverse_std_BTD.masked_fill_(uncommon_BT[..., None], 0.0)
                    slope_BTD = z_BTD.mul_(inverse_std_BTD).mul_(weight_BT[..., None])
                    if grad_x is not None:
                        grad_x[rows] += slope_BTD
                    if grad_y is not None:
                        grad_y[y_rows] -= slope_BTD
        return (
            grad_x.to(x_tilde.dtype) if grad_x is not None else None,
            (-weight_sum_BT)[..., None].to(log_std.dtype).expand_as(log_std) if need_log_std else None,
            None,
            grad_y.to(y_center.dtype) if grad_y is not None else None,
            grad_y_log_std.to(y_log_std.dtype) if grad_y_log_std is not None else None,
            None,
            None,
            None,
            None,
        )


def _standardised(
    x_tilde: torch.Tensor, y_center: torch.Tensor, y_log_std: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x~ - y_center) / sigma(y), log sigma(y) and 1 / sigma(y) in the dtype of ``like``.

    The residual is scaled before it is squared: 1 / sigma^2 leaves the range of float32 long before the quotient does.
    """
    y_log_std = y_log_std.to(like.dtype)
    inverse_std = torch.exp(-y_log_std)
    return x_tilde.to(like.dtype).sub(y_center.to(like.dtype)).mul_(inverse_std), y_log_std, inverse_std


def _segments(start: int, count: int, group: int) -> Iterator[tuple[slice, slice]]:
    """Rows 0..count of x against rows start..start+count of the ring of y, as slices: views, where an index copies."""
    start %= group
    head = min(count, group - start)
    yield slice(0, head), slice(start, start + head)
    if head < count:
        yield slice(head, count), slice(0, count - head)


def _stack(positions: torch.Tensor | Sequence[torch.Tensor] | None, here_SB: torch.Tensor) -> torch.Tensor:
    """The caller's counts as (S, B), or those counted here."""
    if positions is None:
        return here_SB
    positions_SB = positions if isinstance(positions, torch.Tensor) else torch.stack(list(positions))
    if positions_SB.shape != here_SB.shape:
        raise ValueError(f"positions are {tuple(positions_SB.shape)}, expected {tuple(here_SB.shape)}: shifts, rows")
    return positions_SB


def _reciprocal(positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """1 / positions in at least float32, and 0 for no position."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.where(positions > 0, 1.0 / positions.clamp_min(1).to(dtype), 0.0)


def _check_shapes(x_tilde, log_std, mask, y_center, y_log_std, y_mask) -> None:
    for name, tensor, shape in (
        ("log_std", log_std, x_tilde.shape),
        ("mask", mask, x_tilde.shape[:-1]),
        ("y_log_std", y_log_std, y_center.shape),
        ("y_mask", y_mask, y_center.shape[:-1]),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(shape)}")
    if x_tilde.ndim != 3 or x_tilde.shape[1:] != y_center.shape[1:]:
        raise ValueError(f"x is {tuple(x_tilde.shape)} and y {tuple(y_center.shape)}, expected (B, T, D) and (G, T, D)")


def _check_group(count: int, group: int, first: int, shifts: Sequence[int]) -> None:
    if first < 0 or first + count > group:
        raise ValueError(f"rows {first} to {first + count - 1} lie outside a group of {group}")
    if not shifts or any(shift % group == 0 for shift in shifts):
        raise ValueError(f"shifts {list(shifts)} must pair rows of a group of {group} with other rows")
