"""A run's directory: whose it is before training, claimed at its begin, finished with an export at its end.

What may lie in one, and which of two runs it belongs to, is known without torch: ``cluster/directory.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from torchtitan.tools.logging import logger

from sgt_titan import checkpoint, disk
from sgt_titan.cluster import directory, status
from sgt_titan.config.load import RECORDED, dump
from sgt_titan.config.schema import Config
from sgt_titan.export import export_checkpoint

from .startup import Prepared


def check(prepared: Prepared) -> int:
    """Step of its newest checkpoint, 0 without one; see ``cluster.directory.check``, with the fingerprints of trunk
    and data.
    """
    return directory.check(prepared.config, prepared.fingerprints)


def claim(prepared: Prepared) -> None:
    """Record whose directory this is, and with which config (rank 0)."""
    folder = Path(prepared.config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    disk.write(folder / RECORDED, dump(prepared.config))
    disk.write(folder / directory.RUN_FILE, json.dumps(prepared.identity(), indent=1, default=str))


def finish(config: Config, attempt: str, step: int) -> None:
    """After the last step: export, and say that nothing is left to do (rank 0)."""
    folder = Path(config.run.output_dir)
    if config.export.at_end:
        export_checkpoint(checkpoint.step_dir(folder, step), folder / "export", overwrite=True)
        logger.info(f"Exported to {folder / 'export'}")
    status.write(folder, "finished", attempt=attempt, step=step)
