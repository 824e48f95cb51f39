"""Notices to stop that come while a rank is still importing: kept until the trainer can act on them.

The default action of SIGUSR1 is to end the process, and a start of a minute is long enough to be hit by one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: asked to stop, saved, to be started again
NUMBERS = (signal.SIGUSR1, signal.SIGTERM)
heard: set[signal.Signals] = set()


def listen() -> None:
    """Note ``NUMBERS`` instead of dying of them, until somebody else handles them."""
    for number in NUMBERS:
        signal.signal(number, lambda n, frame: heard.add(signal.Signals(n)))


def pass_on() -> None:
    """In a launcher: hand ``NUMBERS`` to the ranks, which save and end, and wait for them instead of dying first."""

    def hand_over(number: int, frame: object) -> None:
        for child in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    for number in NUMBERS:
        signal.signal(number, hand_over)


def children() -> list[int]:
    """Processes that this one has started, from any of its threads; none where the system does not say."""
    found: list[int] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found
