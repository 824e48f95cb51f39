"""What commands print: progress, durations, text that nobody vouches for, and of libraries their warnings alone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


@contextmanager
def quiet(tell: Callable[[str], None]) -> Iterator[None]:
    """Loading without the chatter: transformers' bars and log lines off; every warning once, by ``tell``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for text in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning):
        tell(f"warning: {text}")
