"""Environment variables and ``~`` in paths."""

from __future__ import annotations

import os
import re

from sgt_titan.errors import UserError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand(value: str, key: str) -> str:
    """``value`` with environment variables and a leading ``~`` expanded; expanding twice changes nothing.

    Raises:
        UserError: a variable is not set, or holds a variable itself.
    """

    def variable(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise UserError(f"{key}: environment variable {name} is not set (in {value!r})")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(variable, value))
    if _VARIABLE.search(expanded):  # would be expanded once more on the next call
        raise UserError(f"{key}: {value!r} expands to {expanded!r}, which still holds a $; use a path without one")
    return expanded
