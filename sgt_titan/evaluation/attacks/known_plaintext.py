"""Known plaintext: a linear relation between embeddings and what is sent, fitted on known pairs.

Undoes any mean that is about linear in the embedding, with the table and some known tokens alone. Anybody who can make
a client send a text of his choosing has such pairs. Two readings of the same pairs, and the better one on pairs kept
aside is used:

    backward   x ~ x~ W + c, then the nearest row: forgives a mean that is not quite linear
    forward    x~ ~ N(x A + b, S), then the most likely row: exact for a linear mean under noise, which the backward map
               would shrink towards the middle of the table

Legend: N hidden tokens flat, M known tokens, V vocabulary, D width, K guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.world.threat import Cost, Curve, Guess, KnownPairs, Observation, Size, Table

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0)  # times the mean eigenvalue of x~'s covariance
HELD_OUT, MAX_HELD = 0.1, 1024
SHRINK = 1e-2  # of a residual's covariance towards the identity
GUESSES = 10


class Affine(NamedTuple):
    """x ~ (x~ - from_D) W_DD + to_D, float64."""

    weight_DD: torch.Tensor
    from_D: torch.Tensor
    to_D: torch.Tensor

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        return (x_ND.double() - self.from_D) @ self.weight_DD + self.to_D


def regression(observation: Observation, table: Table, pairs: KnownPairs, *, most: int = 65_536) -> Guess:
    """Both readings on m pairs, the better one's guesses; a curve over m, the guess with the most."""
    D, M = table.rows_VD.shape[1], min(most, len(pairs.tokens_M))
    counts = sorted({min(M, n) for n in (D // 4, D // 2, D, 2 * D, 4 * D, 16 * D, 64 * D, M)} - {0, 1})
    x_ND, tokens_M = observation.x_tilde_ND, pairs.tokens_M.to(table.rows_VD.device)
    guesses, flops, names = [], 0.0, []
    for m in counts:
        held = max(1, min(MAX_HELD, int(HELD_OUT * m)))
        sent_MD, clean_MD = pairs.x_tilde_MD[:m], table.rows_VD[tokens_M[:m]]
        scores = {
            name: (read(sent_MD[held:], clean_MD[held:], sent_MD[:held], table.rows_VD, 1)[:, 0] == tokens_M[:held])
            for name, read in READINGS.items()
        }
        name = max(scores, key=lambda name: scores[name].double().mean().item())
        names.append(name)
        guesses.append(READINGS[name](sent_MD, clean_MD, x_ND, table.rows_VD, GUESSES).cpu())
        flops += 6.0 * m * D * D + 20.0 * D**3 + 2.0 * (x_ND.shape[0] + 2 * held) * table.rows_VD.numel()
    curve = Curve("known pairs", tuple(map(float, counts)), tuple(top_NK[:, 0] for top_NK in guesses))
    return Guess(guesses[-1], curve, flops, (f"the {names[-1]} reading of {counts[-1]} pairs",))


def backward(
    sent_MD: torch.Tensor, clean_MD: torch.Tensor, x_ND: torch.Tensor, rows_VD: torch.Tensor, k: int
) -> torch.Tensor:
    """The rows nearest to the regression's estimate, (N, k)."""
    return top_rows(fit(sent_MD, clean_MD)(x_ND), rows_VD, k)


def forward(
    sent_MD: torch.Tensor, clean_MD: torch.Tensor, x_ND: torch.Tensor, rows_VD: torch.Tensor, k: int
) -> torch.Tensor:
    """The rows that most likely led to what was sent, (N, k). Of a mean of K repeats, the order is the same."""
    return forward_reading(sent_MD, clean_MD, rows_VD)(x_ND, k)


def forward_reading(
    sent_MD: torch.Tensor, clean_MD: torch.Tensor, rows_VD: torch.Tensor
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """``forward`` fitted once: (N, D), k -> (N, k)."""
    affine = fit(clean_MD, sent_MD)
    residual_MD = sent_MD.double() - affine(clean_MD)
    cov_DD = residual_MD.T @ residual_MD / len(residual_MD)
    # The covariance of few pairs has directions of no spread at all, which would decide everything.
    floor = (SHRINK * cov_DD.diagonal().mean()).clamp_min(1e-12 * rows_VD.double().var())
    values_D, vectors_DD = torch.linalg.eigh(cov_DD)
    white_DD = vectors_DD / (values_D.clamp_min(0) + floor).sqrt()
    white_VD = affine(rows_VD) @ white_DD
    return lambda x_ND, k: top_rows(x_ND.double() @ white_DD, white_VD, k)


READINGS = {"backward": backward, "forward": forward}


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
    pairs, counts = most * 1.2, 8  # of all points of the curve together
    read = counts * (size.tokens + 2.0 * MAX_HELD) * size.vocab
    flops = 48.0 * pairs * size.width**2 + 2_000.0 * counts * size.width**3 + 4.0 * read * size.width
    memory = 32.0 * most * size.width + 80.0 * size.width**2 + 24.0 * 1024 * min(size.vocab, 8192)
    return Cost(flops, memory, numbers=3.0 * read + 20.0 * pairs * size.width)
