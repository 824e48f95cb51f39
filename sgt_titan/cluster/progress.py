"""How far a run is, for people: one small file that rank 0 replaces at each log line.

    <output_dir>/progress.json    {"attempt", "step", "steps", "first_step", "tokens_per_second", "seconds_per_step", "terms", "probe", "at"}

``at`` is in seconds since 1970, ``steps`` the run's last one. Nothing is decided from it.
"""

# ruff: noqa: E501  (the line above is one line in the file, too)

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgt_titan import disk

FILE = "progress.json"
SHOWN = ("loss", "kl", "agreement", "mi", "abs_cos", "std")  # of the terms, in a line


def write(output_dir: str | Path, content: Mapping[str, Any]) -> None:
    """Replace the file. Not synced to disk, and a failure is not told: a full disk is the checkpoint's to report."""
    with contextlib.suppress(OSError):
        disk.write(Path(output_dir) / FILE, json.dumps(content), sync=False)


def read(output_dir: str | Path) -> dict[str, Any] | None:
    """What was written last; None where nothing was, or it cannot be read."""
    try:
        found = json.loads((Path(output_dir) / FILE).read_text())
        return found if isinstance(found, dict) and "step" in found else None
    except (OSError, ValueError):
        return None


def line(found: Mapping[str, Any]) -> str:
    """One line: step of how many, terms, tokens a second, time left."""
    terms = found.get("terms", {})
    shown = "".join(f"  {name} {terms[name]:.4g}" for name in SHOWN if isinstance(terms.get(name), int | float))
    left = max(0, found["steps"] - found["step"]) * found.get("seconds_per_step", 0.0)
    rate = found.get("tokens_per_second", 0.0)
    return f"step {found['step']}/{found['steps']}{shown}  {rate:,.0f} tok/s  eta {clock(left)}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
