"""Why an attempt ended, from what its processes left in its logs: one paragraph, for the end of the job's log.

    <output_dir>/logs/JOB.RESTART/NODE.log             the launcher of a node and, line by line, its ranks
                                  preflight-NODE.log   the checks before
                                  srun.log             what srun said of its tasks

A rank that dies takes the others with it, and each of them says something. The cause is the first failure that is not
another's consequence: torchrun writes the time, exit code and signal of each rank in its node's log.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 20  # of a log that are looked at: the end is where a failure is

# torchrun's prefix of a rank's line, role and local rank, and torch's own of an exception's, the rank.
_RANK = re.compile(r"^\[(?!rank)[a-z]\w*?(\d+)\]:\s?(?:\[rank(\d+)\]:\s?)?")
_ERROR = re.compile(
    r"\w*(Error|Exception)\b|\berror:|\bnot found\b|No such file|Permission denied|\bfatal\b|Segmentation fault"
    r"|Killed$",
    re.I,
)
# What a scheduler or a launcher says because something else has gone wrong, and lines of a stack.
_NOISE = re.compile(
    r"^\s|^slurmstepd(-\S+)?: |^srun: |^Traceback|^File |^Thread 0x|^Timeout \(|^Current thread|^[WIE]\d{4} |^-+$|^=+$"
    r"|ChildFailedError|^\w+ FAILED$|^Root Cause|^Failures:|^\[\d+\]:$"
)
# What a rank says because another one is gone.
_CONSEQUENCE = re.compile(
    r"Connection (reset|closed|refused)|Broken pipe|[Ss]ocket (closed|Timeout)|failed to (recv|send)"
    r"|Dist(Network|Store)Error"
    r"|remote process exited|Rendezvous\w*Error|SignalException|Timed out waiting"
)
_REPORT = re.compile(
    r"^\s*time\s+: (?P<time>\S+)\n\s*host\s+: \S+\n\s*rank\s+: (?P<rank>\d+) \(local_rank: (?P<local>\d+)\)\n"
    r"\s*exitcode\s+: (?P<code>-?\d+) \(pid: \d+\)",
    re.MULTILINE,
)
_TASK = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<task>\S+): (?P<how>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """One process that ended as it should not; rank None: the launcher of a node."""

    node: str
    rank: int | None
    code: int  # below 0: minus a signal
    time: str
    line: str  # the last that it printed of an error; empty where it had no word
    file: Path

    late: bool = False  # it ended itself, since it did not come to its next step: hung, or waiting for one that is gone

    @property
    def consequence(self) -> bool:
        """Whether it ended because another had."""
        return self.late or self.code in (-signal.SIGTERM, 128 + signal.SIGTERM) or bool(_CONSEQUENCE.search(self.line))

    def sentence(self) -> str:
        who = f"rank {self.rank} on {self.node}" if self.rank is not None else f"the launcher on {self.node}"
        if self.code < 0:
            number = -self.code
            name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
            often = {"SIGKILL": " (out of memory, or somebody's kill)", "SIGBUS": " (a full /dev/shm, often)"}.get(
                name, ""
            )
            return f"{who} was killed by {name}{often}"
        if self.late:
            return f"{who} did not come to its next step in time; where it stood is in its log"
        return f"{who} ended with exit code {self.code}"


def tail(file: Path) -> str:
    """The end of a log; empty where there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def error_line(file: Path, local_rank: int | None = None) -> str:
    """The last line of a log that tells of an error, of one rank or of all; empty where none does."""
    for line in reversed(tail(file).splitlines()):
        prefix = _RANK.match(line)
        if local_rank is not None and (prefix is None or int(prefix[1]) != local_rank):
            continue
        bare = line[prefix.end() :] if prefix else line
        if _ERROR.search(bare) and not _NOISE.search(bare):
            return " ".join(bare.split())[:300]
    return ""


def failures(logs: Path) -> list[Failure]:
    """All processes of an attempt that are known to have failed."""
    found = []
    for file in sorted(logs.glob("*.log")):
        if file.name.startswith("preflight-") or file.name == "srun.log":
            continue
        for report in _REPORT.finditer(tail(file)):
            line = error_line(file, int(report["local"]))
            late = not line and report["code"] == "1" and _timed_out(file, int(report["local"]))
            found.append(Failure(file.stem, int(report["rank"]), int(report["code"]), report["time"], line, file, late))
        # A launcher whose store is gone dies without a report; the exception of its rank is there all the same.
        if not any(failure.node == file.stem for failure in found) and (spoken := _spoken(file)):
            found.append(spoken)
    known = {failure.node for failure in found}
    for task in _TASK.finditer(tail(logs / "srun.log")):
        if task["node"] not in known and not re.search(r"Terminated|exit code 143", task["how"]):
            file = logs / f"{task['node']}.log"
            file = file if file.is_file() else logs / "srun.log"
            code = re.search(r"exit code (\d+)", task["how"])
            killed = re.search(r"Killed", task["how"])
            number = int(code[1]) if code else -signal.SIGKILL if killed else 1
            found.append(Failure(task["node"], None, number, "", error_line(file), file))
    return found


def _timed_out(file: Path, local_rank: int) -> bool:
    """Whether a rank's watchdog ended it (``titan/watchdog.py``)."""
    return bool(re.search(rf"^\[[a-z]\w*?{local_rank}\]:\s?Timeout \(", tail(file), re.MULTILINE))


def _spoken(file: Path) -> Failure | None:
    """The last exception of a rank in a node's log."""
    for line in reversed(tail(file).splitlines()):
        prefix = _RANK.match(line)
        if prefix and prefix[2] and _ERROR.search(bare := line[prefix.end() :]) and not _NOISE.search(bare):
            return Failure(file.stem, int(prefix[2]), 1, "", " ".join(bare.split())[:300], file)
    return None


def first(found: Iterable[Failure]) -> Failure | None:
    """The failure that the others follow from; None of none.

    A launcher that was killed leaves no time; it comes after a rank that failed by itself, before what merely lost it.
    """
    return min(found, key=lambda f: (f.consequence, f.rank is None, f.time, f.rank or 0), default=None)


def paragraph(
    *, state: str, reason: str, decision: str, step: int, steps: int | None, logs: Path, restart: int, again: str,
    decided: str = "", reached: Mapping[str, Any] | None = None, most: int = 0, export: Path | None = None,
) -> str:  # fmt: skip
    """What happened, where, the last error, the file, and what comes next, for a person who has read nothing else.

    Args:
        state, decision: of the attempt, as ``attempts`` recorded them.
        reason: what the run said itself, if it did. decided: why the decision; by default for the same reason.
        step: of the newest checkpoint.
        again: the command that goes on.
        reached: ``progress.read`` of the attempt.
    """
    of = f" of {steps}" if steps else ""
    facts: dict[str, str] = {}
    failure = None
    if state == "finished":
        facts["What happened"] = f"the run is finished, at step {step}{of}"
        if export is not None:
            facts["Result"] = str(export)
    elif state in ("stopped", "unfit", "refused", "failed"):
        how = {
            "stopped": "ended on notice",
            "unfit": "the checks found bad nodes",
            "refused": "refused",
            "failed": "gave up",
        }
        facts["What happened"] = f"{how[state]}: {reason}"
    else:
        failure = first(failures(logs))
        at = f", after step {reached['step']}{of}" if reached else ", before the first logged step"
        cancelled = "cancelled" in reason or decision == "requeued"
        if failure is not None and not (cancelled and failure.consequence):
            facts["What happened"] = f"{failure.sentence()}{at}"
            facts["Last error"] = failure.line or "none: it had no time for a word"
            facts["Look at"] = str(failure.file)
        else:
            facts["What happened"] = f"{reason}{at}" if cancelled else f"it ended without a word of any rank{at}"
    facts.setdefault("Look at", str(logs))
    facts["Next"] = _next(decision, decided or reason, step, of, restart, most, again)
    width = max(map(len, facts)) + 1
    return "\n".join(f"{name + ':':<{width}} {text}" for name, text in facts.items())


def _next(decision: str, reason: str, step: int, of: str, restart: int, most: int, again: str) -> str:
    going = f"from step {step}{of}" if step else "from the beginning (there is no checkpoint yet)"
    if decision == "done":
        return "nothing"
    if decision == "requeue":
        return f"Slurm starts the job again, {going} (restart {restart + 1} of at most {most})"
    if decision == "requeued":
        return f"Slurm has put the job back itself; it goes on {going}"
    return f"not started again: {reason}. To go on {going}: {again}"
