"""Nearest-neighbour ranks of the true token, and the rates read off them (arXiv 2506.09452, section 6).

Legend: N tokens flat, V vocabulary, D width. All of it is local: a rank of a distributed run ranks its own tokens
against the full table and the caller gathers ``rank_N``, 8 bytes a token, before it takes a rate.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch


class Ranks(NamedTuple):
    """Per token, (N,) int64 each."""

    rank_N: torch.Tensor  # 1 + rows strictly closer than the true row; 1..V
    ties_N: torch.Tensor  # rows besides the true one exactly as close as it
    nearest_N: torch.Tensor  # id of the nearest row, the lowest one of equals


class HistogramEntropy(NamedTuple):
    """Entropy of a rank histogram as a share of ln V, and the most that N tokens could reach."""

    normalised: float
    ceiling: float


@torch.no_grad()
def token_ranks(
    x_tilde_ND: torch.Tensor,
    table_VD: torch.Tensor,
    tokens_N: torch.Tensor,
    *,
    metric: Literal["l2", "cosine"] = "l2",
    chunk_tokens: int = 1024,
    chunk_vocab: int = 4096,
) -> Ranks:
    """Where the true token stands among all rows of the embedding table by distance to its obfuscation.

    Args:
        x_tilde_ND: obfuscated embeddings, any real dtype.
        table_VD: the frozen embedding table, any real dtype, same device.
        tokens_N: true token ids, 0..V-1.
        metric: "l2", or "cosine" (distance 1 - cos; a zero vector has cosine 0 with everything).
        chunk_tokens, chunk_vocab: the largest block of the (N, V) matrix that exists at a time; also blocks of
            (chunk_vocab, D) and (chunk_tokens, D) in float64.

    Ties count in the attacker's favour: a token whose row is duplicated still has rank 1 at its own embedding.

    Works in float64 on ||e||^2 - 2 x~.e (||x~||^2 orders nothing). In float32 that cancels: far from the table the
    differences that decide a rank are smaller than the rounding of the terms, and equal rows in different columns of
    a product come out unequal. Two rows count as equally close when their scores differ by less than the rounding
    error of the float64 product, about 1e-13 of its terms; so do rows nearer to x~ than about 1e-6 of the norms.

    Raises ValueError on an unknown metric, mismatched shapes, token ids outside the table, or embeddings that are not
    finite: NaN is closer to nothing, and would read as rank 1.
    """
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric is {metric!r}, expected 'l2' or 'cosine'")
    if (
        x_tilde_ND.ndim != 2
        or table_VD.ndim != 2
        or x_tilde_ND.shape[1] != table_VD.shape[1]
        or tokens_N.shape != x_tilde_ND.shape[:1]
    ):
        raise ValueError(
            f"expected (N, D), (V, D) and (N,), "
            f"got {tuple(x_tilde_ND.shape)}, {tuple(table_VD.shape)} and {tuple(tokens_N.shape)}"
        )
    if chunk_tokens < 1 or chunk_vocab < 1:
        raise ValueError(f"chunks must be at least 1, got {chunk_tokens} and {chunk_vocab}")
    N, V = x_tilde_ND.shape[0], table_VD.shape[0]
    closer_N = torch.zeros(N, dtype=torch.int64, device=x_tilde_ND.device)
    ties_N, nearest_N = torch.zeros_like(closer_N), torch.zeros_like(closer_N)
    if N == 0:
        return Ranks(closer_N, ties_N, nearest_N)
    if tokens_N.min() < 0 or tokens_N.max() >= V:
        raise ValueError(f"token ids must lie in 0..{V - 1}")
    if not x_tilde_ND.isfinite().all():
        raise ValueError("x_tilde has values that are not finite")

    token_chunks = [slice(start, start + chunk_tokens) for start in range(0, N, chunk_tokens)]
    norm_N = torch.cat([x_tilde_ND[rows].double().norm(dim=-1) for rows in token_chunks])
    true_score_N, true_size_N = torch.empty_like(norm_N), torch.empty_like(norm_N)
    for rows in token_chunks:
        row_ND, offset_N = _prepare(table_VD[tokens_N[rows]], metric)
        true_score_N[rows] = offset_N - 2.0 * (x_tilde_ND[rows].double() * row_ND).sum(-1)
        true_size_N[rows] = offset_N + 2.0 * norm_N[rows] * row_ND.norm(dim=-1)

    # Errors of a dot product of D terms grow like sqrt(D) times the unit roundoff, relative to the product of norms.
    roundoff = 4.0 * math.sqrt(max(table_VD.shape[1], 16)) * torch.finfo(torch.float64).eps
    best_N = torch.full_like(norm_N, torch.inf)
    for start in range(0, V, chunk_vocab):
        # The outer loop, so that each block of the table is widened once.
        rows_VD, offset_V = _prepare(table_VD[start : start + chunk_vocab], metric)
        row_norm_V = rows_VD.norm(dim=-1)
        for rows in token_chunks:
            score_NV = torch.addmm(offset_V, x_tilde_ND[rows].double(), rows_VD.T, alpha=-2.0)
            slack_NV = torch.outer(2.0 * norm_N[rows], row_norm_V).add_(offset_V).add_(true_size_N[rows, None])
            slack_NV.mul_(roundoff)
            _update_nearest(score_NV, slack_NV, start, best_N[rows], nearest_N[rows])

            difference_NV = score_NV.sub_(true_score_N[rows, None])
            # The true row is equal to itself by definition, not by arithmetic.
            own_N = tokens_N[rows] - start
            here_N = (own_N >= 0) & (own_N < difference_NV.shape[1])
            difference_NV[here_N.nonzero()[:, 0], own_N[here_N]] = torch.inf
            closer_NV = difference_NV < -slack_NV
            closer_N[rows] += closer_NV.sum(-1)
            ties_N[rows] += (difference_NV <= slack_NV).sum(-1) - closer_NV.sum(-1)
    return Ranks(closer_N + 1, ties_N, nearest_N)


def _prepare(rows_VD: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows e in float64 and offsets o such that o - 2 x~.e orders the rows by distance."""
    rows_VD = rows_VD.double()
    if metric == "cosine":
        norm_V = rows_VD.norm(dim=-1)
        return rows_VD / norm_V.masked_fill(norm_V == 0, 1.0)[:, None], torch.zeros_like(norm_V)
    return rows_VD, rows_VD.square().sum(-1)


def _update_nearest(
    score_NV: torch.Tensor, slack_NV: torch.Tensor, start: int, best_N: torch.Tensor, nearest_N: torch.Tensor
) -> None:
    """Take this block's nearest row where it beats the blocks before; the lowest id of equals, in place."""
    block_N = score_NV.amin(-1)
    # argmax of equal values is not the first everywhere; the smallest column that qualifies is.
    column_V = torch.arange(score_NV.shape[1], device=score_NV.device)
    is_best_NV = score_NV <= block_N[:, None] + slack_NV
    first_N = torch.where(is_best_NV, column_V, score_NV.shape[1]).amin(-1)
    beaten_N = block_N < best_N - slack_NV.gather(1, first_N[:, None])[:, 0]
    nearest_N.copy_(torch.where(beaten_N, start + first_N, nearest_N))
    best_N.copy_(torch.where(beaten_N, block_N, best_N))


def nn_failure_rate(rank_N: torch.Tensor) -> float:
    """Share of tokens whose true row is not the nearest (NN-FR = TTR-1), 0..1. NaN without tokens."""
    return ttr(rank_N, 1)


def ttr(rank_N: torch.Tensor, k: int) -> float:
    """Token transformation rate TTR-k: share of tokens whose true row is not among the k nearest, 0..1."""
    return (rank_N > k).double().mean().item()


def sym_ttr(rank_N: torch.Tensor, k: int, vocab: int) -> float:
    """SymTTR-k: share of tokens whose true row is neither among the k nearest nor the k farthest of ``vocab``, 0..1."""
    return ((rank_N > k) & (rank_N <= vocab - k)).double().mean().item()


def rank_histogram_entropy(rank_N: torch.Tensor, vocab: int) -> HistogramEntropy:
    """Entropy of the histogram of ranks 1..vocab over ln vocab, and its ceiling ln min(N, vocab) / ln vocab.

    N tokens fill at most N bins, so 10^4 tokens cannot exceed 78% at a vocabulary of 128,256: print both. NaN without
    tokens.

    Raises ValueError if a rank lies outside 1..vocab, or for a vocabulary of fewer than two.
    """
    if vocab < 2:
        raise ValueError(f"a vocabulary of {vocab} has no entropy to normalise by")
    if rank_N.numel() == 0:
        return HistogramEntropy(math.nan, math.nan)
    if rank_N.min() < 1 or rank_N.max() > vocab:
        raise ValueError(f"ranks must lie in 1..{vocab}")
    share = torch.bincount(rank_N.flatten() - 1).double() / rank_N.numel()
    entropy = torch.special.entr(share).sum().item()
    return HistogramEntropy(
        entropy / math.log(vocab),
        math.log(min(rank_N.numel(), vocab)) / math.log(vocab),
    )


def most_probable_rank(rank_N: torch.Tensor) -> int:
    """MRP's r*: the most frequent rank of a calibration set, the lowest of equals (arXiv 2506.09452, section 6.1).

    Raises ValueError without tokens.
    """
    if rank_N.numel() == 0:
        raise ValueError("no token to calibrate on")
    counts = torch.bincount(rank_N.flatten())
    return int((counts == counts.max()).nonzero()[0, 0])
