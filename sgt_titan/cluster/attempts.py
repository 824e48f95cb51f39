"""The attempts of a run, one line each, and whether there should be another.

    <output_dir>/attempts.jsonl    {"attempt", "nodes", "began", "first_step", "ended", "last_step", "state", "decision", "reason"}

A line is written when an attempt begins and another when it ends; the later one of an attempt counts. Of an attempt whose
batch script died with its node nobody writes the end; the next one does, when it begins.
"""

# ruff: noqa: E501  (the line above is one line in the file, too)

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from sgt_titan import disk
from sgt_titan.checkpoint import latest_committed, step_of
from sgt_titan.cluster import status
from sgt_titan.cluster.allocation import NOTHING, Told

FILE = "attempts.jsonl"
MOST_IN_VAIN = 3  # attempts in a row that may end without a new checkpoint (SGT_MAX_IN_VAIN)
EARLY_SECONDS = 180.0  # after its beginning; a notice of the time limit within that leaves no time to train
LOST = "lost"  # state of an attempt whose end nobody saw
SPEAKS = ("stopped", "unfit", "refused", "failed")  # states whose reason is the run's own word

# requeue: ask Slurm to. requeued: it has done so by itself. stop: a person's turn.
Decision = Literal["", "done", "requeue", "requeued", "stop"]
# Slurm's states of a job that it has put back, or is about to, after losing a node or preempting it.
PUT_BACK = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")


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
    """Record that an attempt begins, and of earlier ones that nobody has seen the end of, that they are over."""
    now, newest = time.time(), newest_step(output_dir)
    for earlier in read(output_dir):
        if not earlier.ended and earlier.attempt != attempt:
            reason = "its batch script did not live to say how it ended: a lost node, most likely"
            decision: Decision = "requeued" if _job(earlier.attempt) == _job(attempt) else "stop"
            _append(
                output_dir, replace(earlier, ended=now, last_step=newest, state=LOST, decision=decision, reason=reason)
            )
    entry = Attempt(attempt, nodes, now, newest)
    _append(output_dir, entry)
    return entry


def end(
    output_dir: str | Path,
    attempt: str,
    *,
    restarts: int,
    max_restarts: int,
    most_in_vain: int = MOST_IN_VAIN,
    told: Told | None = None,
) -> Attempt:
    """Record how the attempt ended, and decide.

    Args:
        restarts: how often the job has been requeued so far.
        max_restarts: as often as it may be.
        most_in_vain: as many attempts in a row may end without a new checkpoint.
        told: what Slurm says of the job.
    """
    history = read(output_dir)
    begun = next((entry for entry in history if entry.attempt == attempt), None) or Attempt(attempt, 0, time.time(), 0)
    own = status.read(output_dir, attempt) or {}
    state = "finished" if status.finished(output_dir) else own.get("state", "")
    state = "" if state == "running" else state
    now, last = time.time(), newest_step(output_dir)
    decision, reason = decide(
        state,
        own.get("reason", ""),
        restarts,
        max_restarts,
        [*in_vain(history, attempt), last <= begun.first_step],
        most_in_vain=most_in_vain,
        told=told or NOTHING,
        seconds=now - begun.began,
        steps=last - begun.first_step,
    )
    entry = replace(begun, ended=now, last_step=last, state=state, decision=decision, reason=reason)
    _append(output_dir, entry)
    return entry


def decide(
    state: str,
    said: str,
    restarts: int,
    max_restarts: int,
    vain: list[bool],
    *,
    most_in_vain: int = MOST_IN_VAIN,
    told: Told = NOTHING,
    seconds: float = float("inf"),
    steps: int = 0,
) -> tuple[Decision, str]:
    """What to do after an attempt that left ``state`` and ``said`` why.

    Args:
        vain: for each attempt of the job that counts (``in_vain``), this one last: whether it ended without a new
            checkpoint.
        seconds: for which this attempt lasted.
        steps: that it saved. Ranks agree on a notice beside a step, so that one heard before the second lets it be done.
    """
    if state == "finished":
        return "done", "nothing left to do"
    if state in ("refused", "failed"):
        return "stop", f"a restart would end the same way: {said}"
    cancelled = "cancelled (scancel)" + (", after saving" if state == "stopped" else "")
    if told.state == "CANCELLED":
        return "stop", cancelled
    if told.state in PUT_BACK or told.restarts > restarts:
        return "requeued", "Slurm has put the job back itself, as after a lost node or a preemption"
    if told.state == "COMPLETING":  # all that Slurm says of a job that it is ending, whatever for
        return "stop", f"{cancelled}, unless Slurm has lost a node and starts it again itself"
    if state == "stopped" and said.startswith("SIGUSR1") and steps <= 2 and seconds < EARLY_SECONDS:
        return "stop", (
            f"the notice of the time limit came within {seconds:.0f} s of the start, with {steps} steps done: raise --time, or "
            "lower --signal=B:USR1@SECONDS to the time of a save plus a minute"
        )
    tail = 0
    while tail < len(vain) and vain[-1 - tail]:
        tail += 1
    if tail >= most_in_vain and state != "unfit":
        return "stop", f"{tail} attempts in a row ended without a new checkpoint, as many as allowed (SGT_MAX_IN_VAIN)"
    if restarts >= max_restarts:
        return "stop", f"{restarts} restarts, as many as allowed (SGT_MAX_RESTARTS)"
    how = {"stopped": f"stopped on {said}", "unfit": f"without bad nodes: {said}"}.get(
        state, "died without a new checkpoint" if tail else "died"
    )
    if told.why_no_requeue:
        return "stop", f"{how}; {told.why_no_requeue}"
    return "requeue", how


def in_vain(history: list[Attempt], attempt: str) -> list[bool]:
    """Whether each earlier attempt of this job ended without a new checkpoint, however it ended: dying, stopped, or lost
    with its node. Somebody who submits again has seen the others; and one that found bad nodes has at least named them,
    so that the next goes without.
    """
    own = [entry for entry in history if _job(entry.attempt) == _job(attempt) and entry.attempt != attempt]
    return [entry.last_step <= entry.first_step for entry in own if entry.ended and entry.state != "unfit"]


def _job(attempt: str) -> str:
    return attempt.rpartition(".")[0]


def _append(output_dir: str | Path, entry: Attempt) -> None:
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    disk.append(folder / FILE, json.dumps(asdict(entry)))
