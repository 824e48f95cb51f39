"""Eq. 3 from hidden states: lm_head and soft cross-entropy in chunks of tokens, no (N, V) tensor alive.

The gradient of Eq. 3 with respect to the student's logits, softmax(student) - softmax(teacher), is known as soon as the
logits are. So it is multiplied by lm_head's weight at once, chunk by chunk, and what is kept for the backward pass is
the (N, D) gradient of the hidden states. lm_head is frozen: it needs no gradient, and is not needed again either.

Legend: N tokens flat, C tokens of a chunk, S streams, X = S * C, D width, V vocabulary (or this rank's shard of it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .top_k import Targets, difference_from, top_k
from .utility import SoftCrossEntropy, difference
from .whole_vocabulary import replace_by_difference

CHUNK_LOGITS = 2**26
"""Logits of a chunk where its size is not given: 64 Mi of them take about 1 GiB in bfloat16, temporaries included."""

CHUNK_LOGITS_CPU, CHUNK_TOKENS_CPU = 2**22, 128
"""The same on a CPU, which is busy with a small product too; with fewer tokens than these it reads lm_head's weight
more often than its arithmetic hides."""


class Distilled(NamedTuple):
    """Values per token as in ``SoftCrossEntropy``, without a graph, and the gradient of the cross-entropy."""

    cross_entropy_N: torch.Tensor
    teacher_entropy_N: torch.Tensor
    agree_N: torch.Tensor
    gradient_ND: torch.Tensor | None
    """d cross_entropy_N / d student_ND in its dtype; with ``group`` this rank's part of a sum over the group."""
    targets: Targets | None
    """What to store of the teacher, where it was asked for."""


def by_parts(student_CV, teacher_CV, group: dist.ProcessGroup | None, vocab_start: int, replace: bool):
    """Against the teacher's own logits; ``replace``: the student's make room for the difference of probabilities."""
    return difference(student_CV, teacher_CV, group, vocab_start, student_CV if replace else None, finite=True)


def asked(student_CV, teacher_CV, group: dist.ProcessGroup | None, vocab_start: int, replace: bool):
    """The same by the quicker way where no other rank has a part of the vocabulary."""
    if group is None:
        return replace_by_difference(student_CV, teacher_CV, replace=replace)
    return by_parts(student_CV, teacher_CV, group, vocab_start, replace)


def stored(student_CV, targets: Targets, group: dist.ProcessGroup | None, vocab_start: int, replace: bool):
    """Against stored targets."""
    return difference_from(student_CV, targets, group, vocab_start, student_CV if replace else None)


def in_blocks(logits_CV: torch.Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether ``asked`` works in blocks that a CPU's cache holds."""
    return group is None and logits_CV.device.type == "cpu"


class Kernels(NamedTuple):
    """What is done to a chunk of logits: against the teacher's own, and against stored targets."""

    asked: Callable = asked
    stored: Callable = stored


EAGER = Kernels()


@cache
def compiled_kernels(backend: str = "inductor") -> Kernels:
    """``Kernels`` by torch.compile: the same arithmetic in a few passes over the logits instead of 15.

    Not where a CPU has the whole vocabulary: there compiled passes over a chunk are slower than eager ones over blocks
    that stay in its cache.
    """

    def compiled(function: Callable) -> Callable:
        fused = torch.compile(function, backend=backend)

        def call(student_NV: torch.Tensor, other, group, *rest):
            if function is by_parts and in_blocks(student_NV, group):
                return asked(student_NV, other, group, *rest)
            for tensor in (student_NV, other):  # the last chunk of a step has a size of its own
                for part in tensor if isinstance(tensor, tuple) else (tensor,):
                    if isinstance(part, torch.Tensor):
                        torch._dynamo.maybe_mark_dynamic(part, 0)
            return fused(student_NV, other, group, *rest)

        return call

    return Kernels(compiled(by_parts), compiled(stored))


def chunk_size(vocabulary: int, device: str) -> int:
    """Tokens of a chunk for ``vocabulary`` logits a token on a type of device: a power of two, at least 64 or 128."""
    logits, least = (CHUNK_LOGITS_CPU, CHUNK_TOKENS_CPU) if device == "cpu" else (CHUNK_LOGITS, 64)
    return max(least, 1 << max(0, (logits // max(vocabulary, 1)).bit_length() - 1))


@torch.no_grad()
def distil(
    student_ND: torch.Tensor,
    teacher_ND: torch.Tensor | None,
    weight_VD: torch.Tensor,
    *,
    targets: Targets | None = None,
    keep: int = 0,
    chunk: int = 0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    want_gradient: bool = True,
    kernels: Kernels = EAGER,
) -> Distilled:
    """Soft cross-entropy (arXiv 2506.09452, Eq. 3) of ``hidden @ weight_VD.T`` for both streams, and its gradient.

    Args:
        student_ND, teacher_ND: hidden states before lm_head, one dtype, the same on every rank of ``group``.
        targets: the teacher's stored distributions, in place of ``teacher_ND``.
        keep: how many of the teacher's most probable tokens to hand back as ``targets``.
        weight_VD: lm_head's weight, or this rank's rows of it, which start at ``vocab_start``; may be empty.
        chunk: tokens worked on at a time; 0: ``chunk_size``. Values do not depend on it but for the order in which a
            matrix product adds up.
        group: ranks that share the vocabulary; two small collectives a chunk.
        kernels: ``compiled_kernels()`` for speed.

    Raises ValueError if shapes do not match or ``chunk`` is negative.
    """
    if teacher_ND is not None:
        teacher, streams_SND = tuple(teacher_ND.shape), [student_ND, teacher_ND]
    elif targets is not None:
        teacher, streams_SND = (targets.tail_N.shape[0], student_ND.shape[-1]), [student_ND]
    else:
        raise ValueError("neither the teacher's hidden states nor its stored distributions are given")
    if student_ND.ndim != 2 or student_ND.shape != teacher or student_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"student and teacher must both be (N, D) and the weight (V, D), got {tuple(student_ND.shape)}, "
            f"{teacher} and {tuple(weight_VD.shape)}"
        )
    if chunk < 0:
        raise ValueError(f"chunk must be 0 or more, got {chunk}")
    tokens, vocabulary = student_ND.shape[0], weight_VD.shape[0]
    chunk = max(1, min(chunk or chunk_size(vocabulary, weight_VD.device.type), tokens))
    dtype = torch.promote_types(student_ND.dtype, torch.float32)
    cross_entropy_N, entropy_N = (torch.empty(tokens, dtype=dtype, device=student_ND.device) for _ in range(2))
    agree_N = torch.empty(tokens, dtype=torch.bool, device=student_ND.device)
    kept: list[Targets] = []
    # Both streams in one product, written where the chunk before was: fresh pages cost a CPU a fifth of the product.
    logits_XV = student_ND.new_empty(len(streams_SND) * chunk, vocabulary)
    gradient_ND = torch.empty_like(student_ND) if want_gradient else None
    for start in range(0, tokens, chunk):
        size = min(chunk, tokens - start)
        part = slice(start, start + size)
        hidden_XD = torch.cat([stream_ND[part] for stream_ND in streams_SND])
        student_CV, *teacher_CV = torch.mm(hidden_XD, weight_VD.T, out=logits_XV[: len(hidden_XD)]).split(size)
        if targets is None:
            found = kernels.asked(student_CV, *teacher_CV, group, vocab_start, want_gradient)
            if keep:
                kept.append(top_k(teacher_CV[0], keep, group=group, vocab_start=vocab_start))
        else:
            found = kernels.stored(student_CV, targets.part(part), group, vocab_start, want_gradient)
        cross_entropy_N[part], entropy_N[part], agree_N[part] = found
        if gradient_ND is not None:
            torch.mm(student_CV, weight_VD, out=gradient_ND[part])  # no logits any more: their gradient
    stored = Targets(*map(torch.cat, zip(*kept, strict=True))) if kept else None
    return Distilled(cross_entropy_N, entropy_N, agree_N, gradient_ND, stored)


def attach(distilled: Distilled, student_ND: torch.Tensor) -> SoftCrossEntropy:
    """The values of ``distil``, differentiable with respect to the hidden states they were computed from.

    With a ``group`` the gradient that arrives at ``student_ND`` is this rank's part of a sum over the group.
    """
    cross_entropy_N = distilled.cross_entropy_N
    if distilled.gradient_ND is not None:
        cross_entropy_N = _Attached.apply(student_ND, cross_entropy_N, distilled.gradient_ND)
    return SoftCrossEntropy(cross_entropy_N, distilled.teacher_entropy_N, distilled.agree_N)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_ND, cross_entropy_N, gradient_ND):
        ctx.save_for_backward(gradient_ND)
        return cross_entropy_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        (gradient_ND,) = ctx.saved_tensors
        # out= rounds the product once and makes no float32 (N, D) copy.
        return torch.mul(gradient_ND, grad_N[:, None], out=torch.empty_like(gradient_ND)), None, None
