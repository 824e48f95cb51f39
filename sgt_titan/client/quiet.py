"""Loading without the chatter: progress bars off, warnings as lines of our own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def quiet(say: Callable[[str], None]) -> Iterator[None]:
    """transformers' bars and log lines off; every warning once, through ``say``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for text in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning):
        say(f"warning: {text}")
