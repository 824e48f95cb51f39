"""The attacker's own text: public rows that he obfuscates himself, as often as he likes, with the public transform.

Legend: B rows, T positions, D width, V vocabulary, M hidden tokens of some rows flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sgt_titan.evaluation.world.mechanisms import Mechanism
from sgt_titan.evaluation.world.samples import Padded, Sample, generator, padded

DRAWN = 8  # batches whose rows are drawn together and sorted by length


def of_a_length(rows: Sequence[Sample], size: int, random: np.random.Generator) -> Iterator[list[Sample]]:
    """Random rows, ``size`` at a time, of which those of a length come together: drawn for several steps at once, since
    a fifth of a batch was padding."""
    while True:
        drawn = [rows[i] for i in random.integers(0, len(rows), size * DRAWN)]
        drawn.sort(key=lambda row: len(row.ids))
        for k in random.permutation(DRAWN):
            yield drawn[size * k : size * (k + 1)]


class Pairs(NamedTuple):
    """What was sent for M hidden tokens, their clean embeddings, and the tokens."""

    sent_MD: torch.Tensor
    clean_MD: torch.Tensor
    tokens_M: torch.Tensor


@dataclass(frozen=True)
class OwnText:
    """rows: none of those under attack. mechanism None: for an attacker who sees nothing of what is sent. noisy: z is
    taken rather than what is sent. times: observations of each row, whose mean is taken. seed: of all the noise."""

    rows: Sequence[Sample]
    mechanism: Mechanism | None
    table_VD: torch.Tensor
    seed: int
    noisy: bool = False
    times: int = 1

    def batch(self, rows: Sequence[Sample], noise: int) -> tuple[Padded, torch.Tensor | None]:
        """As ``obfuscated``; None for one who sees nothing."""
        return (padded(rows, 0, self.table_VD.device), None) if self.mechanism is None else self.obfuscated(rows, noise)

    @torch.no_grad()
    def obfuscated(self, rows: Sequence[Sample], noise: int) -> tuple[Padded, torch.Tensor]:
        """Rows as a batch and what an observer gets of them, (B, T, D) float32. The same ``noise``, the same noise."""
        assert self.mechanism is not None, "one who sees nothing has no observations"
        batch = padded(rows, 0, self.table_VD.device)
        random = generator(noise, self.table_VD.device)
        x_BTD, total_BTD = self.table_VD[batch.tokens_BT], torch.zeros(())
        for sent in self.mechanism.repeats(batch, x_BTD, random, self.times):
            total_BTD = total_BTD + (sent.noisy_BTD if self.noisy else sent.x_tilde_BTD).float()
        return batch, total_BTD / self.times

    def noise(self, step: int) -> int:
        """A generator's seed for a step of this attack; another step or another attack's seed gives another."""
        return (self.seed << 32) + step

    def pairs(self, rows: Sequence[Sample]) -> Pairs:
        """One obfuscation of each row."""
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i, row in enumerate(rows):
            batch, x_BTD = self.obfuscated([row], self.noise((1 << 31) + i))
            found.append((x_BTD[batch.obfuscate_BT], batch.tokens_BT[batch.obfuscate_BT]))
        sent_MD, tokens_M = (torch.cat(column) for column in zip(*found, strict=True))
        return Pairs(sent_MD, self.table_VD[tokens_M], tokens_M)
