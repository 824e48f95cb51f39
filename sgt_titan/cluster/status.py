"""How an attempt ended, as the run itself says it: what requeueing is decided from, instead of an exit code.

    <output_dir>/status.json    {"state", "attempt", "step", "reason"}

An exit code cannot tell a preemption from a bug, and torchrun, srun and the batch script each replace it by their own.
``running`` that stays behind means: the attempt died without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from sgt_titan.checkpoint import write_durably

FILE = "status.json"
State = Literal["running", "stopped", "unfit", "finished", "refused", "failed"]


def write(output_dir: str | Path, state: State, *, attempt: str, step: int, reason: str = "") -> None:
    """Record the state of the attempt.

    running: from its start. stopped: ended itself after a signal, having saved ``step``. finished: nothing left to do.
    unfit: found bad nodes before training. refused: bad input, which a restart would meet again. failed: gave up on
    purpose, as after too many NaN steps.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / FILE, json.dumps({"state": state, "attempt": attempt, "step": step, "reason": reason}))


def read(output_dir: str | Path) -> dict[str, Any] | None:
    """What was recorded last; None where nothing was, or it cannot be read."""
    try:
        found = json.loads((Path(output_dir) / FILE).read_text())
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None
