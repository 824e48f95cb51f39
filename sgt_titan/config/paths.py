"""Environment variables and ``~`` in paths."""

from __future__ import annotations

import os
import re

from sgt_titan.errors import UserError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def unset(value: str) -> str | None:
    """The first environment variable of ``value`` that is not set."""
    names = (braced or bare for braced, bare in _VARIABLE.findall(value))
    return next((name for name in names if not os.environ.get(name)), None)


def expand(value: str, key: str) -> str:
    """``value`` with environment variables and a leading ``~`` expanded; expanding twice changes nothing.

    Raises:
        UserError: a variable is not set, or holds a variable itself.
    """
    if name := unset(value):
        raise UserError(f"{key}: environment variable {name} is not set (in {value!r})")
    expanded = os.path.expanduser(_VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], value))
    if _VARIABLE.search(expanded):  # would be expanded once more on the next call
        raise UserError(f"{key}: {value!r} expands to {expanded!r}, which still holds a $; use a path without one")
    return expanded
