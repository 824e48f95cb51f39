"""Ends a rank that does not come to its next step boundary, after printing where it stands.

A hung rank makes the others time out in a collective, and what they print says nothing about it. So each rank watches
itself: whoever is late prints the stacks of all its threads on stderr, the hung one among them, and exits; the launcher
ends the rest. faulthandler's timer needs no Python to run, so it fires while the interpreter is stuck in C, too.
"""

from __future__ import annotations

import faulthandler
import sys


class Watchdog:
    """``beat(seconds)`` at each boundary: the next one must come within that time. ``close`` ends the watch."""

    def beat(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
