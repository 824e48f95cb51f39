"""Where the time from a process's start to its first step goes: what a lost node costs beside lost steps."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Timeline:
    """``mark(name)`` ends the phase ``name``, which began at the mark before, or at the start of the process."""

    def __init__(self) -> None:
        self.began = self._last = time.monotonic() - process_age()
        self.phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        now = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    def summary(self) -> str:
        """One line: seconds in all, and of each phase."""
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
        return f"First step done {self._last - self.began:.1f} s after the process started: {phases}"


def process_age() -> float:
    """Seconds since this process was started; 0 where the system does not say."""
    try:
        # Behind the command's name, which may hold anything, start time is the 20th field: ticks since boot.
        started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
