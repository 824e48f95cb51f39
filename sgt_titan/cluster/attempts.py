"""The attempts of a run, one line each, and whether there should be another.

    <output_dir>/attempts.jsonl    {"attempt", "nodes", "began", "first_step", "ended", "last_step", "state", "decision", "reason"}

A line is written when an attempt begins and another when it ends; the later one of an attempt counts.
"""

# ruff: noqa: E501  (the line above is one line in the file, too)

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sgt_titan.checkpoint import latest_committed, step_of
from sgt_titan.cluster import status

FILE = "attempts.jsonl"
WITHOUT_PROGRESS = 2  # restarts in a row that may die without a new checkpoint

STOPPED = ("stopped", "unfit")  # ended before its time, and not by dying

Decision = Literal["", "done", "requeue", "stop"]


@dataclass(frozen=True)
class Attempt:
    """Times are seconds since 1970; steps are those of the newest checkpoint before and after."""

    attempt: str
    nodes: int
    began: float
    first_step: int
    ended: float = 0.0
    last_step: int = 0
    state: str = ""
    decision: Decision = ""
    reason: str = ""

    def summary(self) -> str:
        """The one line of an attempt in the job's log."""

        def at(seconds: float) -> str:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

        end = f"ended {at(self.ended)} at step {self.last_step} ({self.state or 'died'})" if self.ended else "running"
        tail = f": {self.decision}, {self.reason}" if self.decision else ""
        return f"attempt {self.attempt}: began {at(self.began)} on {self.nodes} nodes at step {self.first_step}, {end}{tail}"


def newest_step(output_dir: str | Path) -> int:
    """Step of the newest committed checkpoint, 0 if there is none."""
    path = latest_committed(output_dir)
    return step_of(path) or 0 if path else 0


def read(output_dir: str | Path) -> list[Attempt]:
    """All attempts in the order in which they began; a line that was cut off by a crash is left out."""
    found: dict[str, Attempt] = {}
    file = Path(output_dir) / FILE
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            attempt = Attempt(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[attempt.attempt] = attempt
    return list(found.values())


def begin(output_dir: str | Path, attempt: str, nodes: int) -> Attempt:
    entry = Attempt(attempt, nodes, time.time(), newest_step(output_dir))
    _append(output_dir, entry)
    return entry


def end(output_dir: str | Path, attempt: str, *, restarts: int, max_restarts: int) -> Attempt:
    """Record how the attempt ended, and decide.

    Args:
        restarts: how often the job has been requeued so far.
        max_restarts: as often as it may be.
    """
    history = read(output_dir)
    begun = next((entry for entry in history if entry.attempt == attempt), None) or Attempt(attempt, 0, time.time(), 0)
    found = status.read(output_dir) or {}
    own = found if found.get("attempt") == attempt else {}
    state = "finished" if found.get("state") == "finished" else own.get("state", "")
    last = newest_step(output_dir)
    decision, reason = decide(
        state,
        own.get("reason", ""),
        restarts,
        max_restarts,
        [*_died_in_vain(history, attempt), last <= begun.first_step],
    )
    entry = Attempt(
        attempt,
        begun.nodes,
        begun.began,
        begun.first_step,
        time.time(),
        last,
        state.replace("running", ""),
        decision,
        reason,
    )
    _append(output_dir, entry)
    return entry


def decide(state: str, said: str, restarts: int, max_restarts: int, in_vain: list[bool]) -> tuple[Decision, str]:
    """What to do after an attempt that left ``state`` and ``said`` why.

    in_vain: for each attempt but those that were stopped before a new checkpoint, this one last: whether none came of it.
    """
    if state == "finished":
        return "done", "nothing left to do"
    if state in ("refused", "failed"):
        return "stop", f"a restart would end the same way: {said}"
    if restarts >= max_restarts:
        return "stop", f"{restarts} restarts, as many as allowed (SGT_MAX_RESTARTS)"
    if state == "stopped":
        return "requeue", f"stopped on {said}"
    if state == "unfit":
        return "requeue", f"without bad nodes: {said}"
    tail = 0
    while tail < len(in_vain) and in_vain[-1 - tail]:
        tail += 1
    if tail > WITHOUT_PROGRESS:
        return "stop", f"{tail} attempts in a row died without a new checkpoint"
    return "requeue", "died" if not tail else "died without a new checkpoint"


def _died_in_vain(history: list[Attempt], attempt: str) -> list[bool]:
    """Of the earlier attempts of this job: somebody who submits again has seen the others."""
    job = attempt.rpartition(".")[0]
    own = [entry for entry in history if entry.attempt.rpartition(".")[0] == job and entry.ended]
    in_vain = ((entry, entry.last_step <= entry.first_step) for entry in own)
    return [vain for entry, vain in in_vain if not (vain and entry.state in STOPPED)]


def _append(output_dir: str | Path, entry: Attempt) -> None:
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(entry)) + "\n")
