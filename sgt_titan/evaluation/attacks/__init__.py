"""The attack battery: one file each, and this table.

An attack is a function whose parameter types are its threat model (``threat.py``). ``effort`` gives its keyword-only
parameters by suite; ``cost`` estimates them before anything runs. The order is roughly from weak to strong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sgt_titan.evaluation.threat import Cost, Guess

SUITES = ("quick", "standard", "full")


@dataclass(frozen=True)
class Attack:
    """``cost(size, **effort)`` -> Cost. ``learned_only``: without meaning for a mechanism that is no SGT."""

    title: str
    run: Callable[..., Guess]
    cost: Callable[..., Cost]
    source: str
    effort: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # suite -> keyword arguments; absent: skipped
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of every suite

    def arguments(self, suite: str) -> dict[str, Any] | None:
        """Keyword arguments in a suite; None where the suite leaves it out."""
        return {**self.options, **self.effort[suite]} if suite in self.effort else None


EVERY: Mapping[str, Mapping[str, Any]] = {suite: {} for suite in SUITES}

ATTACKS: dict[str, Attack] = {}
