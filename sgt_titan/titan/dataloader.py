"""Rows of the global batch to the rank that owns them; the cursor is a step, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX

from sgt_titan.data.batch import BatchSource, local_positions

from .loss import Counts


class SGTDataLoader(BaseDataLoader):
    """Microbatches in the order in which torchtitan's trainer asks for them.

    Microbatch ``a`` of a step holds rows ``[a * R * B, (a + 1) * R * B)`` of the global batch for R data-parallel ranks
    with B rows each; rank ``r`` gets the ``r``-th block of B. Consecutive rows thus stay on one rank or on neighbours,
    which is what pair groups need.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        source: Annotated[BatchSource | None, tyro.conf.Suppress] = None

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **kwargs: Any
    ) -> None:
        assert config.source is not None
        self.source = config.source
        self.dp_rank, self.dp_world_size, self.local_batch_size = dp_rank, dp_world_size, local_batch_size
        self.microbatches = self.source.global_batch_size // (dp_world_size * local_batch_size)
        self.step = 0  # optimizer steps handed out completely

    def __iter__(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        while True:
            batches = [
                microbatch_inputs(
                    self.source,
                    self.step,
                    local_positions(microbatch, self.dp_rank, self.dp_world_size, self.local_batch_size),
                )
                for microbatch in range(self.microbatches)
            ]
            self.step += 1
            for inputs in batches:
                # torchtitan counts labels that are not IGNORE_INDEX; the loss itself is soft and needs none.
                yield inputs, torch.where(inputs["utility_BT"], inputs["input"], IGNORE_INDEX)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])


def microbatch_inputs(source: BatchSource, step: int, positions: Sequence[int]) -> dict[str, Any]:
    """Rows at ``positions`` of the global batch of ``step``, with the denominators of the whole step."""
    batch, counts = source.rows_batch(step, positions), source.counts(step)
    return {
        "input": batch.tokens_BT,
        "positions": batch.positions_BT,
        "obfuscate_BT": batch.obfuscate_BT,
        "utility_BT": batch.utility_BT,
        "documents": batch.documents,
        "counts": Counts(counts.utility_tokens, counts.obfuscated_tokens, counts.rows),
    }
