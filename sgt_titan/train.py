"""One process of a training run: ``torchrun ... -m sgt_titan.train NAME [--section.key value ...]``.

Everything that can be wrong with the configuration is found before torch is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from sgt_titan import disk
from sgt_titan.cluster import notice
from sgt_titan.config.door import read_config
from sgt_titan.config.schema import Config
from sgt_titan.config.tracking import require_tracking
from sgt_titan.errors import UserError, guarded
from sgt_titan.imports import in_one_go


def main(argv: list[str] | None = None) -> int:
    """Run NAME with overrides on this rank; returns the exit code (0, 2 for bad input, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv

    def action() -> int:
        if not argv or argv[0].startswith("-"):
            raise UserError("usage: torchrun ... -m sgt_titan.train NAME [--section.key value ...]")
        return run_rank(argv[0], argv[1:])

    return guarded(action)


def prepared(name: str, overrides: list[str], world_size: int, *, weights: bool = True) -> Config:
    """The resolved and checked config of a run on ``world_size`` processes.

    Args:
        weights: False for a dry run: the trunk's weights need not be there, and no device is assumed.

    Raises:
        UserError: anything wrong with the config, the overrides, the trunk's or the output directory.
    """
    device = "cpu" if weights and visible_gpus() == 0 else None
    trunk: Literal["weights", "config"] = "weights" if weights else "config"
    config, _ = read_config(name, overrides, world_size=world_size, trunk=trunk, device=device)
    if weights:
        disk.writable(config.run.output_dir, "run.output_dir")
        require_tracking(config, os.environ)
    return config


def visible_gpus() -> int:
    """Number of CUDA devices this process may use, from the driver's files and CUDA_VISIBLE_DEVICES."""
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return count
    entries = [entry.strip() for entry in listed.split(",")]
    # CUDA stops at the first invalid entry; "" and -1 are the usual ways to hide every device.
    valid = next((i for i, entry in enumerate(entries) if entry in ("", "-1")), len(entries))
    return min(count, valid)


def run_rank(name: str, overrides: list[str]) -> int:
    """Train on this process as one rank of the run; returns its exit code.

    Raises:
        UserError: the environment is not torchrun's, or anything wrong with the config or the trunk.
    """
    world_size = _world_size()
    notice.listen()
    config = prepared(name, overrides, world_size)
    with in_one_go():
        from sgt_titan.titan.main import run

    return run(config)


def _world_size() -> int:
    size = os.environ.get("WORLD_SIZE", "")
    if not size.isdigit() or "RANK" not in os.environ:
        raise UserError("RANK and WORLD_SIZE are not set: start with `sgt-titan train NAME` or through torchrun")
    return int(size)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: tearing down the interpreter under gloo's threads now and then aborts a rank that had finished.
    os._exit(code)
