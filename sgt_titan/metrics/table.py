"""What an embedding table itself does to every metric: rows that nobody can tell apart, and rows never trained.

Legend: V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

CLOSE = 1e-2  # distance of near-duplicates, in units of the table's median distance to the nearest other row
CHUNK = 2048


@dataclass(frozen=True)
class NearDuplicates:
    """group_V: int64 (V,), the lowest id of the rows a row cannot be told from (itself where it stands alone).

    rows: how many share a group with another. untrained: how many lie in the largest group, if that has at least three
    members: initial values that training never moved, or unused ids, collapse onto one point; words do not.
    """

    group_V: torch.Tensor = field(repr=False)
    rows: int
    untrained: int


@torch.no_grad()
def near_duplicates(table_VD: torch.Tensor, *, close: float = CLOSE) -> NearDuplicates:
    """Groups of rows nearer to each other than ``close`` times the median nearest-neighbour distance of the table.

    Blocks of (2048, V) at a time, float64 distances of candidate pairs, single linkage.
    """
    table_VD = table_VD.double()
    V = table_VD.shape[0]
    norm_V = table_VD.square().sum(-1)
    nearest_V = torch.empty(V, dtype=torch.float64, device=table_VD.device)
    for start in range(0, V, CHUNK):
        rows = slice(start, min(start + CHUNK, V))
        square_RV = norm_V[rows, None] + norm_V - 2 * table_VD[rows] @ table_VD.T
        square_RV[torch.arange(square_RV.shape[0]), torch.arange(rows.start, rows.stop)] = torch.inf
        nearest_V[rows] = square_RV.amin(-1).clamp_min(0).sqrt()
    # The median of rows that stand apart: a table that is half unused ids has a median of about zero.
    apart_V = nearest_V[nearest_V > 1e-6 * norm_V.median().sqrt()]
    limit = close * (apart_V.median().item() if len(apart_V) else 0.0)
    parent = list(range(V))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    suspects = (nearest_V <= limit + 1e-6 * norm_V.median().sqrt()).nonzero()[:, 0]
    for start in range(0, len(suspects), CHUNK):
        some = suspects[start : start + CHUNK]
        close_RS = torch.cdist(table_VD[some], table_VD[suspects], compute_mode="donot_use_mm_for_euclid_dist") <= limit
        for a, b in close_RS.nonzero().tolist():
            i, j = root(int(some[a])), root(int(suspects[b]))
            parent[max(i, j)] = min(i, j)
    group_V = torch.tensor([root(i) for i in range(V)])
    sizes = torch.bincount(group_V, minlength=V)
    largest = int(sizes.max())
    return NearDuplicates(group_V, int(sizes[sizes > 1].sum()), largest if largest >= 3 else 0)
