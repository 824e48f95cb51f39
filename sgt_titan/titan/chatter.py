"""Lines that torchtitan writes into every log and nobody reads: shown with a logger at DEBUG only."""

from __future__ import annotations

import logging

from torchtitan.tools.logging import logger

LINES = ("[GC] ", "Sleeping 2 seconds for other ranks", "Training completed")  # the last also where it was stopped


def _worth_reading(record: logging.LogRecord) -> bool:
    return logger.isEnabledFor(logging.DEBUG) or not str(record.msg).startswith(LINES)


def install() -> None:
    """For torchtitan's logger, in this process; a second call changes nothing."""
    if _worth_reading not in logger.filters:
        logger.addFilter(_worth_reading)
