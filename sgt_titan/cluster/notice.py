"""Notices to stop that come while a rank is still importing: kept until the trainer can act on them.

The default action of SIGUSR1 is to end the process, and a start of a minute is long enough to be hit by one.
"""

from __future__ import annotations

import signal

NUMBERS = (signal.SIGUSR1, signal.SIGTERM)
heard: set[signal.Signals] = set()


def listen() -> None:
    """Note ``NUMBERS`` instead of dying of them, until somebody else handles them."""
    for number in NUMBERS:
        signal.signal(number, lambda n, frame: heard.add(signal.Signals(n)))
