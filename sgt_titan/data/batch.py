"""Which rows make up a step, and a rank's share of them as tensors.

Optimizer step s consumes the global rows [s * G, (s + 1) * G) whatever the number of ranks; a rank asks for
positions within that range. Counts of the whole global batch come from a table, so that every rank knows the
denominators of the losses without communication and without reading other ranks' tokens.

Legend: B rows asked for, T seq_len, G global batch size, R rows of the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch

from sgt_titan.data import packing as packing_
from sgt_titan.data.cache import View
from sgt_titan.data.order import mixed_at, quotas, samples_at
from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import RESPONSE, obfuscation_mask


@dataclass(frozen=True)
class Document:
    """One sample within a row. ``sample_id``, its number in the whole data set, and ``epoch`` seed its noise."""

    epoch: int
    sample_id: int
    start: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, all (B, T).

    positions: 0 where a document starts, counting up within it; the padding is a document of its own, so that
    a document mask made from ``positions == 0`` keeps it apart.
    obfuscate: the transform applies. utility: the next-token distribution must survive. valid: not padding.
    private: the token carries a value that the data mark as private; nowhere where they mark none.
    """

    tokens_BT: torch.Tensor  # int64
    positions_BT: torch.Tensor  # int64
    obfuscate_BT: torch.Tensor  # bool
    utility_BT: torch.Tensor  # bool
    valid_BT: torch.Tensor  # bool
    private_BT: torch.Tensor  # bool
    documents: list[list[Document]]


@dataclass(frozen=True)
class Counts:
    """Sums over a global batch, or an epoch. ``tokens`` excludes padding; either of the first two may be 0."""

    utility_tokens: int
    obfuscated_tokens: int
    rows: int
    tokens: int


class BatchSource:
    """The batches of a run, as a function of the step.

    Args:
        view: samples of at most ``seq_len`` tokens.
        packing: several samples a row; otherwise each row is one right-padded sample.
        obfuscate, obfuscate_template, utility_positions: as in ``schema.Data`` and ``schema.Objective``.
        pad_id: token of the padding; any valid id, it is masked everywhere.

    Raises:
        ValueError: no samples, a sample longer than ``seq_len``, or a batch size below 1.
        UserError: a weight so small that nothing of its source is drawn.
    """

    def __init__(
        self,
        view: View,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        packing: bool,
        obfuscate: Literal["prompt", "all"],
        obfuscate_template: bool,
        utility_positions: Literal["all", "response"],
        pad_id: int,
    ) -> None:
        if not len(view) or global_batch_size < 1:
            raise ValueError(f"need samples and a batch size of at least 1, got {len(view)} and {global_batch_size}")
        if int(view.lengths.max()) > seq_len:
            raise ValueError(f"a sample has {int(view.lengths.max())} tokens, more than seq_len {seq_len}")
        self.view = view
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.obfuscate = obfuscate
        self.obfuscate_template = obfuscate_template
        self.utility_positions = utility_positions
        self.pad_id = pad_id
        self.row_offsets, self.sample_ids = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
        sizes, first = [], 0
        for samples, _ in view.blocks.values():  # a row's samples are of one block, which can then be weighed
            if packing:
                offsets, ids = packing_.pack(view.lengths[first : first + samples], seq_len)
            else:
                offsets, ids = np.arange(samples + 1, dtype=np.int64), np.arange(samples, dtype=np.int64)
            self.row_offsets = np.concatenate([self.row_offsets, self.row_offsets[-1] + offsets[1:]])
            self.sample_ids = np.concatenate([self.sample_ids, first + ids])
            sizes.append(len(offsets) - 1)
            first += samples
        self.sizes = np.array(sizes, dtype=np.int64)  # rows of each block, and how many of an epoch's rows are its
        self.shares = quotas(self.rows, [weight for _, weight in view.blocks.values()])
        for name, share in zip(view.blocks, self.shares.tolist(), strict=True):
            if not share:
                raise UserError(f"data.sources.{name}.weight: gives it none of the {self.rows} rows of an epoch")
        # Each microbatch of a step asks for the step's rows twice; at a batch of 1024 finding them takes milliseconds.
        self._global_rows = lru_cache(maxsize=2)(self._find_global_rows)
        # Known from the first batch on, so not lazily: a step's time must not depend on being the first.
        self._table = self._count_rows()

    @property
    def rows(self) -> int:
        """Rows in one epoch."""
        return len(self.row_offsets) - 1

    @cached_property
    def efficiency(self) -> float:
        """Share of the rows' tokens that is not padding."""
        return packing_.efficiency(self.view.lengths, self.row_offsets, self.seq_len)

    def steps(self, epochs: float) -> int:
        """Optimizer steps that make ``epochs`` passes over the data, rounded up, at least 1."""
        return max(1, int(np.ceil(round(epochs * self.rows / self.global_batch_size, 6))))

    @property
    def epoch_counts(self) -> Counts:
        """Counts of an epoch; of a weighted mixture to expect, since its epochs differ."""
        utility, obfuscated, tokens = np.rint((self._table * self._times).sum(axis=1)).astype(np.int64).tolist()
        return Counts(utility, obfuscated, self.rows, tokens)

    @cached_property
    def _times(self) -> np.ndarray:
        """How often each row comes in an epoch: (R,), 1 where nothing is weighted."""
        return np.repeat(self.shares / self.sizes, self.sizes)

    def token_counts(self, vocab: int) -> torch.Tensor:
        """How often each token stands at an obfuscated position of an epoch, int64 (V,)."""
        counts_V = np.zeros(vocab, dtype=np.float64)
        times = np.empty(len(self.view))
        times[self.sample_ids] = np.repeat(self._times, np.diff(self.row_offsets))
        for i in range(len(self.view)):
            hidden_T = obfuscation_mask(
                self.view.roles(i), obfuscate=self.obfuscate, obfuscate_template=self.obfuscate_template
            )
            np.add.at(counts_V, np.asarray(self.view.tokens(i))[hidden_T], times[i])
        return torch.from_numpy(np.rint(counts_V).astype(np.int64))

    def row_ids(self, step: int) -> list[tuple[int, int]]:
        """(epoch, row) of each row of the step's global batch, in order."""
        epochs, rows = self._global_rows(step)
        return list(zip(epochs.tolist(), rows.tolist(), strict=True))

    def counts(self, step: int) -> Counts:
        """Counts of the whole global batch of a step."""
        utility, obfuscated, tokens = self._table[:, self._global_rows(step)[1]].sum(axis=1).tolist()
        return Counts(utility, obfuscated, self.global_batch_size, tokens)

    def rows_batch(self, step: int, positions: Sequence[int] | range) -> Batch:
        """The rows at some positions (0..G-1) of the step's global batch, in the order given.

        Raises:
            ValueError: a position outside the global batch.
        """
        if any(not 0 <= p < self.global_batch_size for p in positions):
            raise ValueError(f"positions must be in 0..{self.global_batch_size - 1}")
        epochs, rows = self._global_rows(step)
        return self._assemble([(int(epochs[p]), int(rows[p])) for p in positions])

    def _find_global_rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        first = step * self.global_batch_size
        k = np.arange(first, first + self.global_batch_size)
        if len(self.sizes) == 1:
            return samples_at(k, self.rows, self.seed)
        return mixed_at(k, self.sizes, self.shares, self.seed)

    def _count_rows(self) -> np.ndarray:
        """Utility, obfuscated and all tokens of each row: int64 (3, R)."""
        counts, lengths = self.view.counts, self.view.lengths
        utility = lengths - 1 if self.utility_positions == "all" else counts("response_targets")
        obfuscated = counts("prompt")
        if self.obfuscate == "all":
            obfuscated = obfuscated + counts("response")
        if self.obfuscate_template:
            obfuscated = obfuscated + counts("template" if self.obfuscate == "all" else "prompt_template")
        per_sample = np.stack([utility, obfuscated, lengths])[:, self.sample_ids]
        return np.add.reduceat(per_sample, self.row_offsets[:-1], axis=1)

    def _assemble(self, row_ids: Sequence[tuple[int, int]]) -> Batch:
        shape = (len(row_ids), self.seq_len)
        tokens_BT = np.full(shape, self.pad_id, dtype=np.int64)
        positions_BT = np.zeros(shape, dtype=np.int64)
        obfuscate_BT, utility_BT, valid_BT, private_BT = (np.zeros(shape, dtype=bool) for _ in range(4))
        documents: list[list[Document]] = []
        for b, (epoch, row) in enumerate(row_ids):
            at, found = 0, []
            for i in self.sample_ids[self.row_offsets[row] : self.row_offsets[row + 1]]:
                tokens_T, roles_T = self.view.tokens(i), self.view.roles(i)
                length = len(tokens_T)
                here = slice(at, at + length)
                tokens_BT[b, here] = tokens_T
                positions_BT[b, here] = np.arange(length)
                valid_BT[b, here] = True
                obfuscate_BT[b, here] = obfuscation_mask(
                    roles_T, obfuscate=self.obfuscate, obfuscate_template=self.obfuscate_template
                )
                utility_BT[b, at : at + length - 1] = self.utility_positions == "all" or roles_T[1:] == RESPONSE
                private_BT[b, here] = self.view.private(i)
                found.append(Document(epoch, int(self.view.index[i]), at, length))
                at += length
            positions_BT[b, at:] = np.arange(self.seq_len - at)
            documents.append(found)
        t = torch.from_numpy
        return Batch(
            t(tokens_BT), t(positions_BT), t(obfuscate_BT), t(utility_BT), t(valid_BT), t(private_BT), documents
        )


def local_positions(micro_step: int, dp_rank: int, dp_degree: int, local_batch_size: int) -> range:
    """Positions in the global batch of one rank's rows in one accumulation step.

    A microbatch is ``local_batch_size * dp_degree`` consecutive rows, cut into the ranks' shares in order: then a
    group of consecutive rows (``objective.mi_group``) stays inside a microbatch for every number of ranks.
    """
    start = (micro_step * dp_degree + dp_rank) * local_batch_size
    return range(start, start + local_batch_size)
