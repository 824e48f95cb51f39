"""Eq. 3 against what a teacher said before: its k most probable tokens and the mass of all others.

The tail is one event. With p the teacher's and q the student's probabilities, K the k tokens and t = 1 - sum_K p,

    loss = - sum_K p_v log q_v - t log(1 - sum_K q_v)

Minus the entropy of (p_K, t) it is a KL divergence that never exceeds the full one (log-sum inequality), and equals it
at k = V. What the student does within the tail is not asked.

Legend: N tokens flat, K stored tokens, V vocabulary (or this rank's shard of it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from .utility import gather_ranks, global_peak, local_peak


class Targets(NamedTuple):
    """A teacher's distribution per token, most probable first."""

    ids_NK: torch.Tensor  # int64, of the whole vocabulary
    probabilities_NK: torch.Tensor  # float32 (float64 for float64 logits)
    tail_N: torch.Tensor  # mass of all other tokens, exactly 0 at k = V

    def part(self, tokens: slice) -> Targets:
        """Of some tokens."""
        return Targets(*(tensor[tokens] for tensor in self))


def top_k(logits_NV: torch.Tensor, k: int, *, group: dist.ProcessGroup | None = None, vocab_start: int = 0) -> Targets:
    """The ``k`` largest probabilities of each row; ``group`` and ``vocab_start`` as in ``soft_cross_entropy``.

    The same on every rank of ``group``: two collectives. ``k`` above the vocabulary is an error of the caller's.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    mine = min(k, logits_NV.shape[1])
    values_NK, ids_NK = logits_NV.topk(mine, dim=-1)
    ids_NK = ids_NK + vocab_start
    if group is None:
        total_N = logits_NV.logsumexp(-1)
    else:
        # Shards may be shorter than k, and all must send the same shape.
        values_NK = torch.nn.functional.pad(values_NK, (0, k - mine), value=-torch.inf)
        ids_NK = torch.nn.functional.pad(ids_NK, (0, k - mine), value=-1)
        values_NK = torch.cat(tuple(gather_ranks(values_NK, group)), -1)
        ids_NK = torch.cat(tuple(gather_ranks(ids_NK, group)), -1)
        values_NK, order_NK = values_NK.topk(k, dim=-1)
        ids_NK = ids_NK.gather(-1, order_NK)
        peak_N = values_NK[:, 0]
        sum_N = (logits_NV - peak_N[:, None]).exp().sum(-1)
        dist.all_reduce(sum_N, group=group)
        total_N = peak_N + sum_N.log()
    probabilities_NK = (values_NK - total_N[:, None]).exp()
    vocabulary = torch.tensor(logits_NV.shape[1], device=logits_NV.device)
    if group is not None:
        dist.all_reduce(vocabulary, group=group)
    tail_N = (1.0 - probabilities_NK.double().sum(-1)).clamp_min(0.0).to(probabilities_NK.dtype)
    return Targets(ids_NK, probabilities_NK, torch.zeros_like(tail_N) if k >= int(vocabulary) else tail_N)


def difference_from(
    student_NV: torch.Tensor,
    targets: Targets,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    into_NV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``utility.difference`` against stored targets: loss, entropy of (p_K, t) and agreement (N,)."""
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    width = student_NV.shape[1]
    peaks_W2N = gather_ranks(torch.stack(local_peak(student_NV, dtype, vocab_start)), group)
    max_N, argmax_N = global_peak(peaks_W2N[:, 0], peaks_W2N[:, 1])

    p_NK, tail_N = targets.probabilities_NK.to(dtype), targets.tail_N.to(dtype)
    here_NK = (targets.ids_NK >= vocab_start) & (targets.ids_NK < vocab_start + width)
    at_NK = torch.where(here_NK, targets.ids_NK - vocab_start, 0)
    shifted_NV = student_NV - max_N[:, None]
    exp_NV = shifted_NV.exp()
    if width:
        shifted_NK = shifted_NV.gather(1, at_NK)
        dot_N = (shifted_NK * p_NK).masked_fill(~here_NK | (p_NK == 0), 0.0).sum(-1)
        stored_NV = torch.zeros_like(exp_NV, dtype=torch.bool)
        stored_NV.scatter_reduce_(1, at_NK, here_NK, "amax")
    else:
        dot_N, stored_NV = torch.zeros_like(max_N), torch.zeros_like(exp_NV, dtype=torch.bool)
    # The tail's sum by itself: one minus the others would cancel.
    sums_3N = torch.stack((exp_NV.sum(-1), dot_N, exp_NV.masked_fill(stored_NV, 0.0).sum(-1)))
    if group is not None:
        dist.all_reduce(sums_3N, group=group)
    sum_N, dot_N, tail_sum_N = sums_3N.unbind(0)

    top_N = p_NK.sum(-1)
    no_tail_N = tail_N == 0
    tail_term_N = (tail_N * (tail_sum_N.log() - sum_N.log())).masked_fill(no_tail_N, 0.0)
    loss_N = top_N * sum_N.log() - dot_N - tail_term_N
    entropy_N = torch.special.entr(p_NK).sum(-1) + torch.special.entr(tail_N)
    # Ties of the teacher's maximum go to the lowest id, as where the teacher is asked itself.
    first_N = targets.ids_NK.masked_fill(p_NK != p_NK.amax(-1, keepdim=True), torch.iinfo(torch.int64).max).amin(-1)
    agree_N = argmax_N == first_N.to(dtype)
    if into_NV is None:
        return loss_N, entropy_N, agree_N
    # q_v (p_K's mass + t) - p_v for stored tokens; for others q_v less t in the proportions of the student's own tail.
    ratio_N = torch.where(no_tail_N, 0.0, tail_N / tail_sum_N.clamp_min(torch.finfo(dtype).tiny))
    tail_NV = (exp_NV * ratio_N[:, None]).masked_fill_(stored_NV, 0.0)
    gradient_NV = exp_NV.mul_(((top_N + tail_N) / sum_N)[:, None]).sub_(tail_NV)
    if width:
        gradient_NV.scatter_add_(1, at_NK, torch.where(here_NK, -p_NK, 0.0))
    into_NV.copy_(gradient_NV)
    return loss_N, entropy_N, agree_N
