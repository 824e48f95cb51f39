"""Eq. 3 and its gradient where one rank holds every logit of a token: the same numbers in fewer passes.

``utility.difference`` keeps maxima and sums apart, because ranks that share a vocabulary have to exchange them. With
the whole row at hand torch's softmax does all of that in one kernel. On a CPU the work goes on in blocks of a few rows,
so that every pass but the first finds its numbers in the cache and no temporary is larger than a block.

Legend: N tokens flat, R rows of a block, V vocabulary, J blocks of a row, W their width.
"""

from __future__ import annotations

import torch

BLOCK_CPU = 2**18
"""Logits of a block: 1 MiB in float32, about what a core's own cache holds."""

_WIDTH = 128


def replace_by_difference(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, *, replace: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, teacher's entropy (nats) and agreement (N,), as ``utility.difference`` for finite logits.

    ``replace``: softmax(student) - softmax(teacher), the gradient with respect to the student's logits, takes the place
    of the student's logits, rounded once to their dtype.
    """
    tokens, vocabulary = student_NV.shape
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    rows = max(1, BLOCK_CPU // vocabulary) if student_NV.device.type == "cpu" else tokens
    values_2N = student_NV.new_empty(2, tokens, dtype=dtype)
    agree_N = student_NV.new_empty(tokens, dtype=torch.bool)
    scratch_2RV = student_NV.new_empty(2, min(rows, tokens), vocabulary, dtype=dtype)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        student_RV, teacher_RV = student_NV[part], teacher_NV[part]
        q_RV, work_RV = scratch_2RV[:, : len(student_RV)]
        student_max_R, student_at_R = first_maximum(student_RV)
        teacher_max_R, teacher_at_R = first_maximum(teacher_RV)

        # Both logits less their maximum: what is multiplied by large probabilities is then small.
        torch.softmax(teacher_RV, -1, dtype=dtype, out=q_RV)
        teacher_dot_R = torch.sub(teacher_RV, teacher_max_R[:, None].to(dtype), out=work_RV).mul_(q_RV).sum(-1)
        cross_dot_R = torch.sub(student_RV, student_max_R[:, None].to(dtype), out=work_RV).mul_(q_RV).sum(-1)
        teacher_sum_R = q_RV.sum(-1)  # 1 but for the rounding of the kernel's own sum, which is worth correcting
        p_RV = torch.softmax(student_RV, -1, dtype=dtype, out=work_RV)

        # softmax at the maximum is exp(0) over the sum of all.
        values_2N[0, part] = _log_sum(p_RV, student_at_R, p_RV.sum(-1)) - cross_dot_R / teacher_sum_R
        values_2N[1, part] = _log_sum(q_RV, teacher_at_R, teacher_sum_R) - teacher_dot_R / teacher_sum_R
        agree_N[part] = (student_at_R == teacher_at_R) & student_max_R.isfinite()
        if replace:
            # In float32 before rounding: where the two agree the difference is far smaller than either probability.
            torch.sub(p_RV, q_RV, out=student_RV)
    return values_2N[0], values_2N[1], agree_N


def _log_sum(p_RV: torch.Tensor, at_R: torch.Tensor, sum_R: torch.Tensor) -> torch.Tensor:
    """log sum exp(logits - max) from a softmax, the place of its maximum and what its rounded values add up to."""
    return sum_R.log() - p_RV.gather(1, at_R[:, None])[:, 0].log()


def first_maximum(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum of each row and the lowest token id that has it; NaN, and any id, for a row with a NaN.

    On a CPU ``max`` with an index goes one by one and ``amax`` sixteen at once: so first the block, then the place
    within it.
    """
    rows, vocabulary = logits_NV.shape
    blocks = vocabulary // _WIDTH
    if logits_NV.device.type != "cpu" or blocks < 2:
        max_N, at_N = logits_NV.max(-1)
        return max_N, at_N
    logits_NJW = logits_NV[:, : blocks * _WIDTH].unflatten(1, (blocks, _WIDTH))
    max_N, block_N = logits_NJW.amax(-1).max(-1)
    at_N = block_N * _WIDTH + logits_NJW[torch.arange(rows), block_N].argmax(-1)
    if vocabulary % _WIDTH:
        rest_N, rest_at_N = logits_NV[:, blocks * _WIDTH :].max(-1)
        above_N = (rest_N > max_N) | rest_N.isnan()
        max_N, at_N = torch.where(above_N, rest_N, max_N), torch.where(above_N, rest_at_N + blocks * _WIDTH, at_N)
    return max_N, at_N
