"""Known plaintext: a linear map from what was sent back to the embedding, fitted on known pairs.

Undoes any mean that is about linear in the embedding, with the table and some known tokens alone. Anybody who can make
a client send a text of his choosing has such pairs.

Legend: N hidden tokens flat, M known tokens, V vocabulary, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.threat import Cost, Curve, Guess, KnownPairs, Observation, Size, Table

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0)  # times the mean eigenvalue of x~'s covariance
HELD_OUT = 0.1


class Affine(NamedTuple):
    """x ~ (x~ - from_D) W_DD + to_D, float64."""

    weight_DD: torch.Tensor
    from_D: torch.Tensor
    to_D: torch.Tensor

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        return (x_ND.double() - self.from_D) @ self.weight_DD + self.to_D


def regression(observation: Observation, table: Table, pairs: KnownPairs, *, most: int = 65_536) -> Guess:
    """Ridge regression on m pairs, then the nearest row; a curve over m, the guess with the most."""
    D, M = table.rows_VD.shape[1], min(most, len(pairs.tokens_M))
    counts = sorted({min(M, n) for n in (D // 4, D // 2, D, 2 * D, 4 * D, 16 * D, 64 * D, M)} - {0, 1})
    x_ND, guesses, flops = observation.x_tilde_ND, [], 0.0
    for m in counts:
        inverse = fit(pairs.x_tilde_MD[:m], table.rows_VD[pairs.tokens_M[:m].to(table.rows_VD.device)])
        guesses.append(top_rows(inverse(x_ND), table.rows_VD).cpu())
        flops += 2.0 * m * D * D + 10.0 * D**3 + 2.0 * x_ND.shape[0] * table.rows_VD.numel()
    curve = Curve("known pairs", tuple(map(float, counts)), tuple(top_NK[:, 0] for top_NK in guesses))
    return Guess(guesses[-1], curve, flops)


@torch.no_grad()
def fit(sent_MD: torch.Tensor, clean_MD: torch.Tensor) -> Affine:
    """Ridge regression sent -> clean with an intercept, float64, in closed form.

    The ridge is the one of ``RIDGES`` that predicts a held-out tenth of the pairs best; then all pairs are used.
    """
    sent_MD, clean_MD = sent_MD.double(), clean_MD.double()
    held = max(1, int(HELD_OUT * len(sent_MD)))
    first = _solve(sent_MD[held:], clean_MD[held:])
    errors = [(first(ridge)(sent_MD[:held]) - clean_MD[:held]).square().mean().item() for ridge in RIDGES]
    return _solve(sent_MD, clean_MD)(RIDGES[min(range(len(RIDGES)), key=errors.__getitem__)])


def _solve(sent_MD: torch.Tensor, clean_MD: torch.Tensor):
    """Ridge -> Affine; one eigendecomposition serves all ridges."""
    from_D, to_D = sent_MD.mean(0), clean_MD.mean(0)
    x_MD, y_MD = sent_MD - from_D, clean_MD - to_D
    values_D, vectors_DD = torch.linalg.eigh(x_MD.T @ x_MD)
    target_DD = vectors_DD.T @ (x_MD.T @ y_MD)
    # Without any variance there is nothing to regress on: the intercept alone.
    floor = values_D.clamp_min(0).mean().clamp_min(torch.finfo(torch.float64).tiny)

    def affine(ridge: float) -> Affine:
        inverse_D = 1 / (values_D.clamp_min(0) + ridge * floor)
        return Affine(vectors_DD @ (inverse_D[:, None] * target_DD), from_D, to_D)

    return affine


def cost(size: Size, *, most: int = 65_536) -> Cost:
    flops = 2.0 * most * size.width**2 + 60.0 * size.width**3 + 16.0 * size.tokens * size.vocab * size.width
    return Cost(flops, 32.0 * most * size.width + 80.0 * size.width**2 + 24.0 * 1024 * min(size.vocab, 8192))
