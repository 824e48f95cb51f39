"""Procrustes: the rotation from m known pairs, in closed form, then the nearest row.

Anybody who knows some of the text (a template, a quotation, a document that the client summarised) has such pairs.
Legend: N hidden tokens flat, M known tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch

from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.world.threat import Cost, Curve, Guess, KnownPairs, Observation, Size, Table

GUESSES = 10


def orthogonal(product_DD: torch.Tensor) -> torch.Tensor:
    """The orthogonal U that maximises trace(U^T product): its polar factor (Schoenemann, 1966)."""
    left_DD, _, right_DD = torch.linalg.svd(product_DD)
    return left_DD @ right_DD


def procrustes(observation: Observation, table: Table, pairs: KnownPairs, *, most: int = 4096) -> Guess:
    """A curve over m up to ``most``; distinct tokens count, repetitions of a pair say nothing new without noise."""
    rows_VD, D = table.rows_VD.double(), table.rows_VD.shape[1]
    M = min(most, len(pairs.tokens_M))
    counts = sorted({min(M, n) for n in (D // 8, D // 4, D // 2, D, 2 * D, 4 * D, M)} - {0})
    tokens_M, sent_MD = pairs.tokens_M.to(rows_VD.device), pairs.x_tilde_MD.double()
    found, distinct = [], []
    for m in counts:
        U_DD = orthogonal(sent_MD[:m].T @ rows_VD[tokens_M[:m]])
        found.append(top_rows(observation.x_tilde_ND.double() @ U_DD, rows_VD, GUESSES).cpu())
        distinct.append(float(tokens_M[:m].unique().numel()))
    curve = Curve(
        "known pairs", tuple(map(float, counts)), tuple(top_NK[:, 0] for top_NK in found), tuple(distinct), "distinct"
    )
    flops = len(counts) * (20.0 * D**3 + 2.0 * observation.x_tilde_ND.shape[0] * table.rows_VD.numel())
    return Guess(found[-1], curve, flops, (f"{counts[-1]} pairs, {distinct[-1]:.0f} distinct tokens",))


def cost(size: Size, *, most: int = 4096) -> Cost:
    flops = 7.0 * (20.0 * size.width**3 + 2.0 * size.tokens * size.vocab * size.width)
    return Cost(flops, 16.0 * most * size.width + 64.0 * size.width**2)
