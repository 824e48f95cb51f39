"""What commands print: progress, durations, and text that nobody vouches for."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Progress, to standard error: standard output is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Without control characters: an attacker may read any token, and a terminal obeys some."""
    return "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)


def clock(seconds: float) -> str:
    """A duration as a person says it: 45 s, 12 min, 1.5 h."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
