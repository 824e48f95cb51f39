"""Guessing by rank: the farthest rows, and the most probable rank (MRP; arXiv 2506.09452, section 6.1).

An objective that only moves an embedding away from its row can end at sending every token to its farthest one, which
is as good a giveaway as sending it unchanged.

Legend: N hidden tokens flat, V vocabulary, K guesses.
"""

from __future__ import annotations

import torch

from sgt_titan.evaluation.attacks.nearest import GUESSES, distances, top_rows
from sgt_titan.evaluation.world.threat import Cost, Guess, KnownPairs, Observation, Size, Table
from sgt_titan.metrics.ranks import token_ranks

CHUNK = 256  # tokens whose distances to the whole table are sorted at a time


def farthest(observation: Observation, table: Table) -> Guess:
    """The ten farthest rows in L2, the farthest first."""
    top_NK = top_rows(observation.x_tilde_ND, table.rows_VD, farthest=True)
    return Guess(top_NK.cpu(), flops=2.0 * observation.x_tilde_ND.shape[0] * table.rows_VD.numel())


def most_probable_rank(observation: Observation, table: Table, pairs: KnownPairs, *, known: int = 8192) -> Guess:
    """The rows at the ten ranks that were most frequent among known pairs, the most frequent first."""
    rank_M = token_ranks(
        pairs.x_tilde_MD[:known], table.rows_VD, pairs.tokens_M[:known].to(table.rows_VD.device)
    ).rank_N
    counts = torch.bincount(rank_M.cpu(), minlength=table.rows_VD.shape[0] + 1)
    # A stable sort of descending counts: of equally frequent ranks the nearer first.
    ranks_K = counts.sort(descending=True, stable=True).indices[:GUESSES]
    top_NK = rows_at_ranks(observation.x_tilde_ND, table.rows_VD, ranks_K)
    share = counts[ranks_K[0]].item() / max(len(rank_M), 1)
    note = f"the most probable rank is {int(ranks_K[0])}, that of {share:.1%} of {len(rank_M)} known pairs"
    return Guess(top_NK.cpu(), flops=4.0 * observation.x_tilde_ND.shape[0] * table.rows_VD.numel(), notes=(note,))


@torch.no_grad()
def rows_at_ranks(x_ND: torch.Tensor, table_VD: torch.Tensor, ranks_K: torch.Tensor) -> torch.Tensor:
    """The rows that are the r-th nearest, for every r of ``ranks_K`` (from 1): (N, K) int64."""
    at_K = (ranks_K.clamp(1, table_VD.shape[0]) - 1).to(table_VD.device)
    parts = [distances(part_CD, table_VD).argsort(-1)[:, at_K] for part_CD in x_ND.split(CHUNK)]
    return torch.cat(parts)


def cost(size: Size, *, known: int = 0) -> Cost:
    flops = 4.0 * (size.tokens + known) * size.vocab * size.width
    numbers = (20.0 * known + (40.0 if known else 3.0) * size.tokens) * size.vocab  # ranks, and a sort
    memory = 40.0 * CHUNK * size.vocab + 16.0 * (size.tokens + known + size.vocab) * size.width
    return Cost(flops, memory, numbers=numbers)
