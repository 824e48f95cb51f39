"""A training run from a resolved config to an export."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Literal

import torch
import torch.distributed as dist
from torchtitan.tools.logging import init_logger, logger

from sgt_titan.checkpoint import latest_committed, step_of
from sgt_titan.cluster import status
from sgt_titan.cluster.notice import EXIT_STOPPED
from sgt_titan.cluster.ownership import Ownership, attempt_name
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError
from sgt_titan.processes import keep_memory

from . import run_directory
from .compilation import keep_code
from .optimizer import NonFiniteError
from .startup import rank
from .tasks import to_trainer_config
from .timeline import Timeline


def run(config: Config) -> int:
    """Train, or go on training, or say that there is nothing left to do. Called on every rank.

    Returns 0, or ``EXIT_STOPPED`` where a signal ended the run early, which saved first.

    Raises:
        UserError: bad input, found before the first collective.
    """
    try:
        return _run(config)
    except UserError as error:
        _record(config, "refused", str(error))
        raise
    except NonFiniteError as error:
        _record(config, "failed", str(error))
        raise


def _record(config: Config, state: Literal["refused", "failed"], reason: str) -> None:
    """Tell whoever would start this again that it would end the same way.

    Only where this attempt had begun: what is refused before leaves no trace in a directory that may be another's, and
    a batch script finds it out before its attempt (``cluster.job begin``).
    """
    found, attempt = status.read(config.run.output_dir) or {}, attempt_name()
    if os.environ.get("RANK", "0") == "0" and found.get("state") == "running" and found.get("attempt") == attempt:
        step = step_of(latest) or 0 if (latest := latest_committed(config.run.output_dir)) else 0
        status.write(config.run.output_dir, state, attempt=attempt, step=step, reason=reason)


def _run(config: Config) -> int:
    init_logger()
    # Neither concerns us: nothing here works in place on a layer's output, and no random operator is sharded.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="DTensor .* may not have complete support")
    if int(os.environ.get("RANK", "0")) != 0:
        logger.setLevel(logging.WARNING)
    keep_code()
    if not torch.cuda.is_available():
        keep_memory()
    timeline = Timeline()
    timeline.mark("import")
    trainer_config = to_trainer_config(config)
    timeline.mark("files")
    prepared = trainer_config.ready()
    prepared.timeline, config = timeline, prepared.config
    done = run_directory.check(prepared)
    Ownership(config.run.output_dir).check()  # before anything is written; `train` takes it
    if done >= config.training.steps:
        logger.info(
            f"{config.run.output_dir}: already trained to step {done} of {config.training.steps}; nothing to do"
        )
        if rank() == 0 and (status.read(config.run.output_dir) or {}).get("state") != "finished":
            run_directory.finish(
                config, attempt_name(), done
            )  # an attempt ended after its last save and before its last word
        return 0
    trainer = trainer_config.build()
    try:
        trainer.train()
        return EXIT_STOPPED if trainer.stopped else 0
    finally:
        trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()
