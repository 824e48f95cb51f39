"""One curve a run in TensorBoard and Weights & Biases, over all its attempts: a step that is trained again replaces
itself.

    <output_dir>/tb/            event files of all attempts, one run to TensorBoard
    <output_dir>/wandb_id.txt   under which W&B goes on with the run
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.components.metrics import BaseLogger

from sgt_titan import disk

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WANDB_ID = "wandb_id.txt"


class Curve(BaseLogger):
    """TensorBoard's scalars. Its library is loaded with the second point: nobody waits for it before the first step."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.first: int | None = None
        self.writer: SummaryWriter | None = None
        self.held: list[tuple[dict[str, Any], int]] = []

    def begin(self, step: int) -> None:
        """What earlier attempts wrote of ``step`` and later is no longer shown once something is: it comes again."""
        if self.first is None:
            self.first = step

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.begin(step)
        self.held.append((metrics, step))
        if self.writer is not None or len(self.held) > 1:
            self._write()

    def _write(self) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), max_queue=1000, purge_step=self.first)
        for metrics, step in self.held:
            for tag, value in metrics.items():
                self.writer.add_scalar(tag, value, step)
        self.held.clear()
        self.writer.flush()  # a run that is killed has shown what it had saved

    def close(self) -> None:
        if self.held:
            self._write()
        if self.writer is not None:
            self.writer.close()


def same_wandb_run(output_dir: str | Path) -> None:
    """Have ``wandb.init`` go on with the run of this directory, by the variables it reads; those that are set stay."""
    file = Path(output_dir) / WANDB_ID
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write(file, secrets.token_hex(6))
    os.environ.setdefault("WANDB_RUN_ID", file.read_text().strip())
    os.environ.setdefault("WANDB_RESUME", "allow")
