"""The attacker's own text: public rows that he obfuscates himself, as often as he likes, with the public transform.

Legend: B rows, T positions, D width, V vocabulary, M hidden tokens of some rows flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from sgt_titan.evaluation.world.mechanisms import KEPT_BYTES, Mechanism
from sgt_titan.evaluation.world.samples import Padded, Sample, generator, padded

DRAWN = 8  # batches whose rows are drawn together and sorted by length


def of_a_length(rows: Sequence[Sample], size: int, random: np.random.Generator) -> Iterator[list[Sample]]:
    """Random rows, ``size`` at a time, of which those of a length come together: drawn for several steps at once, since
    a fifth of a batch was padding. Of these no row comes twice, where there are enough."""
    count = size * DRAWN
    while True:
        drawn = [rows[i] for i in random.choice(len(rows), count, replace=count > len(rows))]
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
    taken rather than what is sent. times: observations of each row, whose mean is taken; fresh: how many of these
    are made for a look at a row, the others being of its last looks (0: all). seed: of all the noise."""

    rows: Sequence[Sample]
    mechanism: Mechanism | None
    table_VD: torch.Tensor
    seed: int
    noisy: bool = False
    times: int = 1
    fresh: int = 0
    kept: dict[int, list[torch.Tensor]] = field(default_factory=dict, repr=False)  # id of a row -> sums (T, D), a look

    def batch(self, rows: Sequence[Sample], noise: int) -> tuple[Padded, torch.Tensor | None]:
        """As ``obfuscated``; None for one who sees nothing."""
        return (padded(rows, 0, self.table_VD.device), None) if self.mechanism is None else self.obfuscated(rows, noise)

    def obfuscated(self, rows: Sequence[Sample], noise: int) -> tuple[Padded, torch.Tensor]:
        """Rows as a batch and what an observer gets of them, (B, T, D) float32. The same ``noise``, the same noise."""
        batch = padded(rows, 0, self.table_VD.device)
        (total_BTD,) = self._sums(batch, generator(noise, self.table_VD.device), self.times)
        return batch, total_BTD / self.times

    def again(self, rows: Sequence[Sample], noise: int) -> tuple[Padded, torch.Tensor | None]:
        """As ``batch``, for one who looks at each row many times: ``fresh`` of its observations are new, the others are
        of his last looks. He gets the mean of as many independent ones as ever, but not independent of the last mean.
        """
        looks = self.times // self.fresh - 1 if self.fresh else 0
        if self.mechanism is None or not looks:
            return self.batch(rows, noise)
        batch, random = padded(rows, 0, self.table_VD.device), generator(noise, self.table_VD.device)
        before = [self.kept.pop(id(row), []) for row in rows]
        if first := [row for row, sums in zip(rows, before, strict=True) if not sums]:
            sums = self._sums(padded(first, 0, self.table_VD.device), random, *[self.fresh] * looks)
            others = iter(zip(*sums, strict=True))
            before = [found or [one_TD.clone() for one_TD in next(others)] for found in before]
        (total_BTD,) = self._sums(batch, random, self.fresh)
        for row, found, total_TD in zip(rows, before, total_BTD, strict=True):
            T, new_TD = len(row.ids), total_TD.clone()
            for old_TD in found:
                total_TD[:T] += old_TD[:T]
            if len(self.kept) * looks * total_TD.nbytes < KEPT_BYTES:
                self.kept[id(row)] = [*found[1:], new_TD]
        return batch, total_BTD / self.times

    @torch.no_grad()
    def _sums(self, batch: Padded, random: torch.Generator, *counts: int) -> list[torch.Tensor]:
        """Sums of so many observations of a batch each, (B, T, D) float32."""
        assert self.mechanism is not None, "one who sees nothing has no observations"
        x_BTD = self.table_VD[batch.tokens_BT]
        sent = iter(self.mechanism.repeats(batch, x_BTD, random, sum(counts)))
        found = []
        for count in counts:
            total_BTD = torch.zeros(x_BTD.shape, device=x_BTD.device)
            for one in islice(sent, count):
                total_BTD += one.noisy_BTD if self.noisy else one.x_tilde_BTD
            found.append(total_BTD)
        return found

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
