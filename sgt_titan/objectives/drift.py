"""How much of a model's weights a rotation would leave recognisable: cosines between invariants of two models.

In a secret basis a weight W (out, in) is L W U^T or U W L^T; what no secret changes is its Gram matrix on the side of
the stream, up to U itself, which spectral matching then solves for (evaluation/attacks/rotation_spectral.py). At the
true U its evidence is the cosine of the two Grams, served and public. Driven to zero, that attack has nothing to match.

Legend: D width, O the other side, S sampled rows of the table.
"""

from __future__ import annotations

import torch


def gram_cosine(ours: torch.Tensor, public: torch.Tensor, *, reads: bool) -> torch.Tensor:
    """Cosine of both weights' Gram matrices (D, D) less their traces, a number in [-1, 1]; differentiable in ``ours``.

    Args:
        ours, public: (O, D) each if ``reads``: the weight reads the stream; (D, O) if it writes it.
    """
    return _cosine(*(_deviation(w.T @ w if reads else w @ w.T) for w in (ours, public)))


def table_cosine(ours_SD: torch.Tensor, public_SD: torch.Tensor) -> torch.Tensor:
    """Cosine of the products between rows of both tables, (S, S) each less its mean: what Gram matching sees."""
    return _cosine(*(gram - gram.mean() for gram in (ours_SD @ ours_SD.T, public_SD @ public_SD.T)))


def _deviation(gram_DD: torch.Tensor) -> torch.Tensor:
    """Less its multiple of the identity, which fits every rotation alike."""
    eye_DD = torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    return gram_DD - gram_DD.trace() / len(gram_DD) * eye_DD


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)
