"""Nearest neighbour: the row of the embedding table closest to what was sent.

L2 and cosine see the table alone. Mahalanobis also has the SGT, and so its typical displacement and its noise per
feature; a learned sigma depends on the token it hides, which this attack does not know, so it uses the average.

Legend: N hidden tokens flat, V vocabulary, D width, K guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from sgt_titan.evaluation.world.samples import Padded, Sample, batched, generator, padded
from sgt_titan.evaluation.world.threat import Corpus, Cost, Guess, Observation, Seed, Size, Table, Transform

GUESSES = 10
CHUNK_TOKENS, CHUNK_VOCAB = 1024, 8192


def l2(observation: Observation, table: Table) -> Guess:
    """arg min ||x~ - e||."""
    top_NK = top_rows(observation.x_tilde_ND, table.rows_VD)
    return Guess(top_NK.cpu(), flops=2.0 * observation.x_tilde_ND.shape[0] * table.rows_VD.numel())


def cosine(observation: Observation, table: Table) -> Guess:
    """arg max cos(x~, e)."""
    top_NK = top_rows(observation.x_tilde_ND, table.rows_VD, metric="cosine")
    return Guess(top_NK.cpu(), flops=2.0 * observation.x_tilde_ND.shape[0] * table.rows_VD.numel())


def mahalanobis(
    observation: Observation, table: Table, transform: Transform, corpus: Corpus, seed: Seed, *, rows: int = 64
) -> Guess:
    """arg min sum_d ((x~ - m - e) / s)_d^2, m and s^2 the mean and variance of x~ - x over ``rows`` public rows.

    s^2 is the whole variance, noise and movement of the mean together. Without noise and movement s is floored at a
    millionth of the table's std: the attack is then L2.
    """
    moved_MD = displacements(transform, corpus.rows[:rows], table, seed)
    mean_D, std_D = moved_MD.mean(0), moved_MD.std(0).clamp_min(1e-6 * table.rows_VD.double().std())
    top_NK = top_rows((observation.x_tilde_ND.double() - mean_D) / std_D, table.rows_VD.double() / std_D)
    return Guess(top_NK.cpu(), flops=2.0 * observation.x_tilde_ND.shape[0] * table.rows_VD.numel())


def displacements(transform: Transform, rows: Sequence[Sample], table: Table, seed: Seed) -> torch.Tensor:
    """x~ - x at the hidden positions of public rows, obfuscated by the attacker himself: (M, D) float64."""
    random, found = generator(seed.value, table.rows_VD.device), []
    for batch, x_BTD in embedded(rows, table):
        sent = transform.mechanism.obfuscate(batch, x_BTD, random)
        found.append((sent.x_tilde_BTD - x_BTD)[batch.obfuscate_BT].double())
    return torch.cat(found)


def embedded(rows: Sequence[Sample], table: Table) -> list[tuple[Padded, torch.Tensor]]:
    """Rows as batches with their embeddings."""
    device = table.rows_VD.device
    batches = [padded(part, 0, device) for part in batched(rows, table.rows_VD.shape[0])]
    return [(batch, table.rows_VD[batch.tokens_BT]) for batch in batches]


@torch.no_grad()
def top_rows(
    x_ND: torch.Tensor,
    table_VD: torch.Tensor,
    k: int = GUESSES,
    *,
    metric: Literal["l2", "cosine"] = "l2",
    farthest: bool = False,
) -> torch.Tensor:
    """The k nearest (or farthest) rows of the table, (N, k) int64, best first; k at most V.

    float64 blocks of (1024, 8192). Of rows at equal distance the order is not defined.
    """
    k = min(k, table_VD.shape[0])
    found = []
    for start in range(0, x_ND.shape[0], CHUNK_TOKENS):
        x_CD = x_ND[start : start + CHUNK_TOKENS].double()
        best_CK = torch.empty(x_CD.shape[0], 0, dtype=torch.float64, device=x_CD.device)
        ids_CK = torch.empty(x_CD.shape[0], 0, dtype=torch.int64, device=x_CD.device)
        for first in range(0, table_VD.shape[0], CHUNK_VOCAB):
            score_CV = distances(x_CD, table_VD[first : first + CHUNK_VOCAB], metric)
            score_CV = -score_CV if farthest else score_CV
            near_CK, at_CK = score_CV.topk(min(k, score_CV.shape[1]), largest=False)
            best_CK, ids_CK = torch.cat([best_CK, near_CK], 1), torch.cat([ids_CK, at_CK + first], 1)
            best_CK, order_CK = best_CK.topk(min(k, best_CK.shape[1]), largest=False)
            ids_CK = ids_CK.gather(1, order_CK)
        found.append(ids_CK)
    return torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64)


def distances(x_CD: torch.Tensor, rows_VD: torch.Tensor, metric: str = "l2") -> torch.Tensor:
    """What orders the rows by distance to x, (C, V) float64: squared L2 less a constant per row of x, or 1 - cosine."""
    x_CD, rows_VD = x_CD.double(), rows_VD.double()
    if metric == "cosine":
        return 1 - torch.nn.functional.normalize(x_CD, dim=-1) @ torch.nn.functional.normalize(rows_VD, dim=-1).T
    return torch.addmm(rows_VD.square().sum(-1), x_CD, rows_VD.T, alpha=-2.0)


def cost(size: Size, *, rows: int = 0) -> Cost:
    """A distance matrix, streamed, and the SGT over ``rows`` public rows."""
    sampled = rows * size.longest
    # A float64 product costs two of the trunk's.
    flops = 4.0 * size.tokens * size.vocab * size.width + 2.0 * sampled * (size.transform + size.width)
    block = min(size.tokens, CHUNK_TOKENS) * min(size.vocab, CHUNK_VOCAB)
    memory = 24.0 * block + 16.0 * (size.tokens + sampled + size.vocab) * size.width
    return Cost(flops, memory, numbers=3.0 * size.tokens * size.vocab)
