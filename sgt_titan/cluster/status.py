"""How an attempt ended, as the run itself says it: what requeueing is decided from, instead of an exit code.

    <output_dir>/status/ATTEMPT.json    {"state", "attempt", "step", "reason"}

An exit code cannot tell a preemption from a bug, and torchrun, srun and the batch script each replace it by their own.
``running`` that stays behind means: the attempt died without a word. A file is one attempt's own: two that run at once
(processes that their scheduler has lost sight of) do not speak for each other.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from sgt_titan import disk
from sgt_titan.checkpoint import latest_committed, step_of

FOLDER = "status"
State = Literal["running", "stopped", "unfit", "finished", "refused", "failed"]


def write(output_dir: str | Path, state: State, *, attempt: str, step: int, reason: str = "") -> None:
    """Record the state of the attempt.

    running: from its start. stopped: ended itself after a signal, having saved ``step``. finished: nothing left to do.
    unfit: found bad nodes before training. refused: bad input, which a restart would meet again. failed: gave up on
    purpose, as after too many NaN steps.
    """
    file = _file(output_dir, attempt)
    file.parent.mkdir(parents=True, exist_ok=True)
    disk.write(file, json.dumps({"state": state, "attempt": attempt, "step": step, "reason": reason}))


def read(output_dir: str | Path, attempt: str | None = None) -> dict[str, Any] | None:
    """What the attempt said last, or where none is named, the attempt that spoke last; None where nothing was said, or
    it cannot be read.
    """
    if attempt is not None:
        return _read(_file(output_dir, attempt))
    return next(_newest_first(output_dir), None)


def finished(output_dir: str | Path) -> dict[str, Any] | None:
    """What the attempt said that finished the run; None where none did, or its last checkpoint has been deleted."""
    latest = latest_committed(output_dir)
    step = (step_of(latest) or 0) if latest else 0
    return next((f for f in _newest_first(output_dir) if f["state"] == "finished" and f["step"] <= step), None)


def _newest_first(output_dir: str | Path):
    def age(file: Path) -> tuple[int, str]:
        try:
            return file.stat().st_mtime_ns, file.name
        except OSError:
            return 0, file.name

    files = sorted((Path(output_dir) / FOLDER).glob("[!.]*.json"), key=age, reverse=True)
    return (found for file in files if (found := _read(file)) is not None)


def _file(output_dir: str | Path, attempt: str) -> Path:
    return Path(output_dir) / FOLDER / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', attempt)}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) and isinstance(found.get("state"), str) and "attempt" in found else None
    except (OSError, ValueError):
        return None
