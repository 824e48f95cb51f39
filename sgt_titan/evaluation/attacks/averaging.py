"""Averaging: the same prompt sent K times. The noise of the mean falls as 1 / sqrt(K); mu(x) does not.

A chat that resends its history every turn, or a retry, gives K for free.

Legend: N hidden tokens flat, D width, K repeats.
"""

from __future__ import annotations

import torch

from sgt_titan.evaluation.attacks.known_plaintext import forward_reading
from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.world.threat import Cost, Curve, Guess, KnownPairs, Observation, Repeats, Size, Table


def averaging(observation: Observation, repeats: Repeats, table: Table, *, most: int = 64) -> Guess:
    """The nearest row to the mean of K obfuscations; a curve over K = 1, 2, 4 ... ``most``."""
    means = running_means(observation, repeats, most)
    guesses = {count: top_rows(mean_ND, table.rows_VD).cpu() for count, mean_ND in means.items()}
    curve = Curve("repeats", tuple(map(float, guesses)), tuple(top_NK[:, 0] for top_NK in guesses.values()))
    flops = 2.0 * len(guesses) * observation.x_tilde_ND.shape[0] * table.rows_VD.numel()
    return Guess(guesses[max(guesses)], curve, flops)


def averaging_regression(
    observation: Observation, repeats: Repeats, table: Table, pairs: KnownPairs, *, most: int = 64, known: int = 65_536
) -> Guess:
    """The same, and mu undone by the forward reading of known pairs: x~ averages to x + mu(x), as in the pairs."""
    means = running_means(observation, repeats, most)
    sent_MD, clean_MD = pairs.x_tilde_MD[:known], table.rows_VD[pairs.tokens_M[:known].to(table.rows_VD.device)]
    read = forward_reading(sent_MD, clean_MD, table.rows_VD)
    guesses = {count: read(mean_ND, 10).cpu() for count, mean_ND in means.items()}
    curve = Curve("repeats", tuple(map(float, guesses)), tuple(top_NK[:, 0] for top_NK in guesses.values()))
    flops = 2.0 * len(guesses) * observation.x_tilde_ND.shape[0] * table.rows_VD.numel()
    return Guess(guesses[max(guesses)], curve, flops)


def running_means(observation: Observation, repeats: Repeats, most: int) -> dict[int, torch.Tensor]:
    """Number of obfuscations -> their mean (N, D) float64, at powers of two up to ``most`` (and the limit)."""
    total_ND, found = observation.x_tilde_ND.double(), {}
    last = min(most, 1 + repeats.limit)
    for count in range(1, last + 1):
        if count > 1:
            total_ND = total_ND + repeats.draw(count - 2).x_tilde_ND.double()
        if count & (count - 1) == 0 or count == last:
            found[count] = total_ND / count
    return found


def cost(size: Size, *, most: int = 64, known: int = 0) -> Cost:
    sends = 2.0 * most * size.rows * size.longest * (size.transform + size.width)
    read = (most.bit_length() + 1.0) * size.tokens * size.vocab
    guesses = 4.0 * read * size.width
    regression = 16.0 * known * size.width**2 + 200.0 * size.width**3 if known else 0.0
    means = 8.0 * (most.bit_length() + 1) * size.tokens * size.width
    memory = means + 32.0 * known * size.width + 24.0 * 1024 * min(size.vocab, 8192)
    return Cost(sends + guesses + regression, memory, numbers=3.0 * read)
