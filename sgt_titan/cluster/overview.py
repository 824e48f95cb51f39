"""``sgt-titan status DIR...``: a run on shared storage on one screen, running or ended. For a login node: no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sgt_titan import checkpoint
from sgt_titan.arguments import Parser
from sgt_titan.cluster import attempts, ownership, preflight, progress, status
from sgt_titan.errors import UserError

SHOWN = 8  # attempts, the newest


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is known of each directory; returns 0.

    Raises:
        UserError: a directory is not there, or holds no run.
    """
    parser = Parser(
        prog="sgt-titan status", description="A run at a glance: progress, checkpoints, attempts, who holds it.",
    )  # fmt: skip
    parser.add_argument("dirs", metavar="DIR", nargs="+", type=Path, help="a run's directory (run.output_dir)")
    parser.add_argument("--watch", action="store_true", help="again every few seconds, until Ctrl-C")
    parser.add_argument("--every", type=float, default=5.0, help="seconds, with --watch (default %(default)g)")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.every < float("inf"):
        raise UserError(f"--every: {arguments.every:g} is no number of seconds above 0")
    for folder in arguments.dirs:
        _require_run(folder)
    while True:
        text = "\n\n".join(page(folder, time.time()) for folder in arguments.dirs)
        print(f"\x1b[H\x1b[J{text}" if arguments.watch and sys.stdout.isatty() else text, flush=True)
        if not arguments.watch:
            return 0
        time.sleep(arguments.every)


def _require_run(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    if not any((folder / name).exists() for name in (attempts.FILE, status.FOLDER, "run.json")):
        raise UserError(
            f"{folder}: is not a run's directory (neither {attempts.FILE} nor {status.FOLDER} nor run.json)"
        )


def page(folder: Path, now: float) -> str:
    """Everything on record of a run. ``now``: seconds since 1970, to count from."""
    said, found, tried = status.read(folder), progress.read(folder), attempts.read(folder)
    lines = [f"{folder}  {_state(folder, said, tried)}"]
    if found is not None:
        share = found["step"] / max(found["steps"], 1)
        lines += [f"  [{'#' * int(30 * share):<30}] {share:.0%}  {progress.line(found)}"]
        if probe := found.get("probe"):
            lines += ["  probe        " + "  ".join(f"{name} {value:.4g}" for name, value in probe.items())]
        lines += [f"  last word    {_ago(now - found['at'])} ago"]
    elif said is not None:
        lines += ["  no step has been logged yet"]
    lines += _checkpoints(folder)
    if (holder := ownership.read_owner(folder)) is not None:
        # Both times are the file server's or this machine's; some seconds between them change nothing here.
        beat = now - (folder / ownership.FILE).stat().st_mtime
        lines += [f"  held by      {holder['attempt']} on {holder.get('host', '?')}, heartbeat {_ago(beat)} ago"]
    if tried:
        lines += [f"  attempts     {len(tried)}" + (f", the last {SHOWN}:" if len(tried) > SHOWN else "")]
        lines += [f"    {_attempt(entry, now)}" for entry in tried[-SHOWN:]]
    for node, reason in sorted(preflight.excluded(folder, now).items()):
        lines += [f"  left out     {node}: {reason}"]
    return "\n".join(lines)


def _state(folder: Path, said: dict | None, tried: list[attempts.Attempt]) -> str:
    if finished := status.finished(folder):
        return f"finished at step {finished['step']}"
    if said is None:
        return "not begun"
    last = tried[-1] if tried else None
    if said["state"] == "running" and last is not None and last.ended and last.attempt == said["attempt"]:
        return f"died ({last.decision})"
    if said["state"] == "running" and ownership.read_owner(folder) is None:
        return "not running: its last attempt left no word"
    reason = said.get("reason", "")
    return said["state"] + (f": {reason}" if reason else "")


def _checkpoints(folder: Path) -> list[str]:
    paths = checkpoint.list_steps(folder)
    committed = [path for path in paths if checkpoint.is_committed(path)]
    if not committed:
        return ["  checkpoints  none"]
    steps = [str(checkpoint.step_of(path)) for path in committed]
    shown = ", ".join(steps[:5]) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")
    size = sum(file.stat().st_size for file in committed[0].iterdir() if file.is_file())
    unfinished = len(paths) - len(committed)
    rest = f"; {unfinished} without marker" if unfinished else ""
    return [f"  checkpoints  steps {shown} ({size / 1e9:.2f} GB each){rest}"]


def _attempt(entry: attempts.Attempt, now: float) -> str:
    began = time.strftime("%m-%d %H:%M", time.localtime(entry.began))
    steps = f"step {entry.first_step} -> {entry.last_step}" if entry.ended else f"from step {entry.first_step}"
    lasted = _ago((entry.ended or now) - entry.began)
    end = f"{entry.state or 'died'}: {entry.decision}, {entry.reason}" if entry.ended else "running"
    return f"{entry.attempt:<16} {began}  {entry.nodes} nodes  {lasted:>8}  {steps:<16}  {end}"


def _ago(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole / 3600:.1f} h" if whole < 48 * 3600 else f"{whole / 86400:.1f} days"
