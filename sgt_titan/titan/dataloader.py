"""Rows of the global batch to the rank that owns them; the cursor is a step, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger

from sgt_titan.data.batch import BatchSource, local_positions


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
        if dp_rank == 0:
            share = f"{self.source.efficiency:.1%} of {self.source.seq_len} tokens a row are not padding"
            logger.info(f"Data: {len(self.source.view):,} samples in {self.source.rows:,} rows, {share}")
            if len(self.source.sizes) > 1:
                drawn = zip(self.source.view.blocks, self.source.shares, self.source.sizes, strict=True)
                shares = ", ".join(f"{name} {n / self.source.rows:.1%} ({n / of:.3g} times)" for name, n, of in drawn)
                logger.info(f"Data: of an epoch's rows, {shares}")

    def __iter__(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """The next step's rows are put together while the trainer works on this one's."""
        with ThreadPoolExecutor(1, thread_name_prefix="data") as worker:
            ahead = worker.submit(self._batches, self.step)
            while True:
                batches = ahead.result()
                self.step += 1
                ahead = worker.submit(self._batches, self.step)
                for inputs in batches:
                    # torchtitan counts labels that are not IGNORE_INDEX; the loss itself is soft and needs none.
                    yield inputs, torch.where(inputs["utility_BT"], inputs["input"], IGNORE_INDEX)

    def _batches(self, step: int) -> list[dict[str, Any]]:
        """This rank's microbatches of a step."""
        share = (self.dp_rank, self.dp_world_size, self.local_batch_size)
        batches = [
            microbatch_inputs(self.source, step, local_positions(microbatch, *share))
            for microbatch in range(self.microbatches)
        ]
        if torch.cuda.is_available():  # copies from pinned memory do not wait for the GPU
            batches = [{k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]
        return batches

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
        "private_BT": batch.private_BT,
        "documents": batch.documents,
        "counts": counts,
    }
