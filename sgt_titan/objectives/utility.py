"""Utility: soft cross-entropy between the teacher's and the student's next-token distributions (Eq. 3).

Legend: N tokens flat, V vocabulary (or this rank's shard of it), W ranks of the group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class SoftCrossEntropy(NamedTuple):
    """Per token: (N,) each, cross-entropy and entropy in nats, float32 (float64 for float64 logits)."""

    cross_entropy_N: torch.Tensor  # differentiable with respect to the student's logits
    teacher_entropy_N: torch.Tensor  # detached; KL = cross_entropy_N - teacher_entropy_N
    agree_N: torch.Tensor  # bool, detached: both put their maximum on the same token


def soft_cross_entropy(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> SoftCrossEntropy:
    """-sum_v softmax(teacher)_v log softmax(student)_v for every token (arXiv 2506.09452, Eq. 3), in nats.

    With ``group`` the last dimension is this rank's shard of the vocabulary, starting at ``vocab_start``; shards may
    be uneven or empty, and every rank returns the same values. The forward pass makes two collectives over ``group``
    (one gather of (4, N), one sum of (4, N)), the backward pass none: each rank gets the gradient of its own shard.
    The loss is then replicated over ``group``: do not sum it there.

    Logits of -inf (a padded vocabulary) are allowed where the teacher has them too. Ties of the maximum go to the
    lowest token id. One (N, V) tensor of the student's dtype is kept for the backward pass, none without a gradient.

    Raises ValueError if the two shapes differ or are not (N, V).
    """
    if student_logits_NV.ndim != 2 or student_logits_NV.shape != teacher_logits_NV.shape:
        raise ValueError(
            f"student and teacher logits must both be (N, V), "
            f"got {tuple(student_logits_NV.shape)} and {tuple(teacher_logits_NV.shape)}"
        )
    return SoftCrossEntropy(*_SoftCrossEntropy.apply(student_logits_NV, teacher_logits_NV.detach(), group, vocab_start))


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_NV, teacher_NV, group, vocab_start):
        into_NV = torch.empty_like(student_NV) if ctx.needs_input_grad[0] else None
        values = difference(student_NV, teacher_NV, group, vocab_start, into_NV)
        if into_NV is not None:
            ctx.save_for_backward(into_NV)
        ctx.mark_non_differentiable(*values[1:])
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N, _grad_entropy_N, _grad_agree_N):
        (difference_NV,) = ctx.saved_tensors
        # out= rounds the product once and makes no float32 (N, V) copy.
        grad_NV = torch.mul(difference_NV, grad_N[:, None], out=torch.empty_like(difference_NV))
        return grad_NV, None, None, None


def difference(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    into_NV: torch.Tensor | None,
    finite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, teacher's entropy and agreement (N,). Logits and ``group`` as in ``soft_cross_entropy``.

    ``into_NV``, if given, is filled with softmax(student) - softmax(teacher), the gradient with respect to the
    student's logits; it may be their own memory. ``finite``: no logit is -inf, which saves passes over them.
    """
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    peaks_W4N = gather_ranks(
        torch.stack((*local_peak(student_NV, dtype, vocab_start), *local_peak(teacher_NV, dtype, vocab_start))), group
    )
    student_max_N, student_argmax_N = global_peak(peaks_W4N[:, 0], peaks_W4N[:, 1])
    teacher_max_N, teacher_argmax_N = global_peak(peaks_W4N[:, 2], peaks_W4N[:, 3])

    # In this order at most three float32 (N, V) tensors of ours are alive at a time.
    shifted_NV = teacher_NV - teacher_max_N[:, None]
    teacher_exp_NV = shifted_NV.exp()
    teacher_dot_N = _dot(teacher_exp_NV, shifted_NV, finite)
    del shifted_NV
    shifted_NV = student_NV - student_max_N[:, None]
    cross_dot_N = _dot(teacher_exp_NV, shifted_NV, finite)
    student_exp_NV = shifted_NV.exp_()

    sums_4N = torch.stack((student_exp_NV.sum(-1), teacher_exp_NV.sum(-1), cross_dot_N, teacher_dot_N))
    if group is not None:
        dist.all_reduce(sums_4N, group=group)
    student_sum_N, teacher_sum_N, cross_dot_N, teacher_dot_N = sums_4N.unbind(0)
    # log softmax(s)_v = (s_v - max) - log(sum), and the teacher's probabilities sum to one.
    cross_entropy_N = student_sum_N.log() - cross_dot_N / teacher_sum_N
    teacher_entropy_N = teacher_sum_N.log() - teacher_dot_N / teacher_sum_N
    agree_N = (student_argmax_N == teacher_argmax_N) & student_argmax_N.isfinite()
    if into_NV is not None:
        # The difference is taken before rounding to the student's dtype: where the two agree it is far smaller than
        # either probability.
        student_exp_NV.div_(student_sum_N[:, None]).sub_(teacher_exp_NV.div_(teacher_sum_N[:, None]))
        into_NV.copy_(student_exp_NV)
    return cross_entropy_N, teacher_entropy_N, agree_N


def _dot(weight_NV: torch.Tensor, value_NV: torch.Tensor, finite: bool) -> torch.Tensor:
    """sum_v weight * value, in which a weight of 0 makes 0 of any value, also of -inf. NaN comes out as NaN."""
    product_NV = weight_NV * value_NV
    if not finite:
        product_NV.masked_fill_(weight_NV == 0, 0.0)
    return product_NV.sum(-1)


def local_peak(logits_NV: torch.Tensor, dtype: torch.dtype, vocab_start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This shard's maximum and its token id, both as ``dtype`` so that they travel in one collective.

    float32 holds every integer up to 2^24, well above any vocabulary.
    """
    if logits_NV.shape[1] == 0:
        nothing_N = torch.full((logits_NV.shape[0],), torch.inf, dtype=dtype, device=logits_NV.device)
        return -nothing_N, nothing_N
    max_N, argmax_N = logits_NV.max(-1)
    return max_N.to(dtype), (argmax_N + vocab_start).to(dtype)


def gather_ranks(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's ``local``, stacked in front."""
    if group is None:
        return local[None]
    world_size = dist.get_world_size(group)
    gathered = local.new_empty((world_size * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(world_size, *local.shape)


def global_peak(max_WN: torch.Tensor, argmax_WN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum over shards and the lowest token id that has it (inf where the maximum is NaN)."""
    max_N = max_WN.amax(0)
    return max_N, argmax_WN.masked_fill(max_WN != max_N, torch.inf).amin(0)
