"""Geometric and demonstrative terms of arXiv 2506.09452 (Eq. 9, 10, 12, 13), one value per token.

Legend: B batch, T sequence, D width. Inputs are (..., D), here (B, T, D); results are float32 (float64 for float64
inputs). Values and gradients are finite at zero vectors: padding embeds to exact zeros in some trunks.
"""

from __future__ import annotations

import torch

# Below this product of norms a cosine is taken as 0. Embedding norms are 0.1 to 10, so only zero vectors come near it.
_TINY = 1e-12


def cosine(x_BTD: torch.Tensor, x_tilde_BTD: torch.Tensor) -> torch.Tensor:
    """Cosine between each embedding and its obfuscation, (B, T) in [-1, 1] (Eq. 13, CosSim).

    0 with zero gradient where either vector is zero.
    """
    x_BTD, x_tilde_BTD = widen(x_BTD), widen(x_tilde_BTD)
    norms_BT = torch.linalg.vector_norm(x_BTD, dim=-1) * torch.linalg.vector_norm(x_tilde_BTD, dim=-1)
    # The division must not see the zero even where its result is discarded: 0 * inf in the backward pass is NaN.
    zero_BT = norms_BT < _TINY
    cosine_BT = (x_BTD * x_tilde_BTD).sum(-1) / norms_BT.masked_fill(zero_BT, 1.0)
    return cosine_BT.masked_fill(zero_BT, 0.0)


def absolute_cosine(x_BTD: torch.Tensor, x_tilde_BTD: torch.Tensor) -> torch.Tensor:
    """|cos(x, x~)|, (B, T) in [0, 1] (Eq. 9, AbsCos). 0 with zero gradient where either vector is zero."""
    return cosine(x_BTD, x_tilde_BTD).abs()


def norm_deviation(x_BTD: torch.Tensor, mean_BTD: torch.Tensor, median_norm: float | torch.Tensor) -> torch.Tensor:
    """| ||x + mu(x)|| - median_norm |, (B, T), in units of the embeddings (Eq. 10, Norm).

    ``mean_BTD`` is mu(x), the shift alone; ``median_norm`` the median of ||E_v|| over the embedding table's rows.
    """
    norm_BT = torch.linalg.vector_norm(widen(x_BTD) + widen(mean_BTD), dim=-1)
    return (norm_BT - median_norm).abs()


def component_entropy(log_std_BTD: torch.Tensor) -> torch.Tensor:
    """Minus the mean log sigma over the features, (B, T), nats per feature (Eq. 12, Comp.Entr.).

    Eq. 12 is -1/2 log|S(x)| = -sum log sigma; divided by D here, like the MI term. It is minus the Gaussian's entropy
    per feature up to the constant (1 + log 2 pi) / 2.
    """
    return -widen(log_std_BTD).mean(-1)


def widen(x: torch.Tensor) -> torch.Tensor:
    """float32, or float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
