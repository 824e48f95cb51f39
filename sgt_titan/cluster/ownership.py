"""One output directory, one running attempt: who holds it, and noticing that somebody else has taken it.

    <output_dir>/owner.json    {"attempt", "host", "pid", "started"}, its modification time is the holder's heartbeat

Two jobs started by mistake would overwrite each other's checkpoints. And a scheduler that loses contact with a node
requeues the job while the orphaned processes train on; they must not commit another checkpoint once the new attempt has
begun. So the file is a token: a new attempt of the *same* job takes it, any other must wait until the scheduler says
that the holder's job is over, or, where it does not know, until the heartbeat has stopped; and a holder that finds
another's name in it ends without saving. A job has its directory from ``begin`` on (``claim``), before its ranks are
there to hold it.

Ages are differences of modification times in one directory: clocks of two nodes are never compared.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

from sgt_titan.errors import UserError

FILE = "owner.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 90.0  # several beats: a file server may stall for a while

# Slurm's states of a job that does not come back by itself.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


def attempt_name() -> str:
    """This attempt: ``slurm-JOB.RESTART`` under Slurm, else unique to the process that started the run."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"slurm-{job}{'_' + task if task else ''}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return os.environ.get("TORCHELASTIC_RUN_ID", "") + f"-{socket.gethostname()}-{os.getpid()}"


class Ownership:
    """Holds the directory from ``acquire`` to ``release``; ``lost`` is set when another attempt has taken it."""

    def __init__(self, output_dir: str | Path, attempt: str | None = None, *, beat: float = BEAT_SECONDS):
        self.folder = Path(output_dir)
        self.file = self.folder / FILE
        self.attempt = attempt or attempt_name()
        self.lost = threading.Event()
        self._beat = beat
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self, pid: int) -> None:
        """Take the directory for a job whose script is process ``pid`` of this host, without a heartbeat: the ranks of
        the same attempt ``acquire`` it later. ``Ownership(...).drop`` gives it back.

        Raises:
            UserError: as ``acquire``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self._create(pid):
            self._remove(self.check())

    def drop(self) -> None:
        """Give back what ``claim`` took, be it that ranks had taken it over and died; never another's."""
        holder = read_owner(self.folder)
        if holder is not None and holder["attempt"] == self.attempt:
            self._remove(holder)

    def acquire(self) -> None:
        """Take the directory and keep it until ``release``.

        Raises:
            UserError: another job holds it and is alive.
        """
        self.claim(os.getpid())
        self._thread = threading.Thread(target=self._keep, name="ownership", daemon=True)
        self._thread.start()

    def check(self) -> dict | None:
        """The token that ``acquire`` would have to take away, or None where there is none.

        Raises:
            UserError: as ``acquire``.
        """
        holder = read_owner(self.folder)
        if holder is not None and holder["attempt"] != self.attempt and not self._may_take_from(holder):
            raise UserError(
                f"run.output_dir: {self.folder} is in use by {holder['attempt']} on {holder['host']} (heartbeat "
                f"{self._age():.0f} s ago); stop that job, or choose another directory, as by another run.name"
            )
        return holder

    def held(self) -> bool:
        """Whether the token is still ours, read from the file. Marks it lost for good if it is not."""
        holder = read_owner(self.folder)
        if holder is None:
            time.sleep(0.1)  # somebody may have put it aside for a moment, see _remove
            holder = read_owner(self.folder)
        if self.lost.is_set() or holder is None or holder["attempt"] != self.attempt:
            self.lost.set()
        return not self.lost.is_set()

    def release(self) -> None:
        """Give the directory back; does nothing to another's token."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self.held():
                self.file.unlink(missing_ok=True)

    def _create(self, pid: int) -> bool:
        """Put our name in a new token. False if there is one already."""
        work = self.folder / f".{FILE}.{secrets.token_hex(4)}"
        me = {"attempt": self.attempt, "host": socket.gethostname(), "pid": pid, "started": _started(pid)}
        work.write_text(json.dumps(me))
        try:
            os.link(work, self.file)  # fails if it exists, and a reader never sees half of it
            return True
        except FileExistsError:
            return False
        finally:
            work.unlink(missing_ok=True)

    def _remove(self, holder: dict | None) -> None:
        """Take away the token of ``holder``, and no other: meanwhile somebody else may have taken over."""
        aside = self.folder / f".{FILE}.{secrets.token_hex(4)}"
        try:
            os.rename(self.file, aside)
        except FileNotFoundError:
            return
        if _read(aside) != holder:
            with suppress(FileExistsError):
                os.link(aside, self.file)
        aside.unlink()

    def _may_take_from(self, holder: dict) -> bool:
        (job, _, restart), (their_job, _, their_restart) = (
            name.rpartition(".") for name in (self.attempt, holder["attempt"])
        )
        if job.startswith("slurm-") and job == their_job and int(restart) > int(their_restart):
            return True
        alive = _is_running(their_job.removeprefix("slurm-")) if their_job.startswith("slurm-") else None
        if alive is not None:
            return not alive  # also while it waits to be started again: it comes back to its directory
        if holder.get("host") == socket.gethostname() and not _is_alive(holder):
            return True
        return self._age() > STALE_SECONDS

    def _age(self) -> float:
        """Seconds since the holder's last heartbeat, by the clock of the file system."""
        probe = self.folder / f".{FILE}.{secrets.token_hex(4)}"
        probe.touch()
        try:
            return probe.stat().st_mtime - self.file.stat().st_mtime
        except FileNotFoundError:
            return float("inf")
        finally:
            probe.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._ended.wait(self._beat):
            with suppress(OSError):  # a file server that stalls is not a lost directory
                if not self.held():
                    return
                os.utime(self.file)


def read_owner(output_dir: str | Path) -> dict | None:
    """The token's content, or None where there is none."""
    return _read(Path(output_dir) / FILE)


def _read(file: Path) -> dict | None:
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) and "attempt" in found else None
    except (FileNotFoundError, ValueError):
        return None


def _is_alive(holder: dict) -> bool:
    """Whether the process of this host that wrote the token still runs; another one may have its number by now."""
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, TypeError, ValueError, KeyError):
        return True
    started = _started(holder["pid"])
    return not started or holder.get("started") in (None, "", started)


def _started(pid: int | str) -> str:
    """When a process began, in ticks since a boot that is named; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _is_running(job: str) -> bool | None:
    """Whether Slurm says that a job runs or will. None where there is no Slurm to ask, or it does not know the job,
    which may be of another cluster that shares the files.
    """
    words = ["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if not told.stdout.split() else not set(told.stdout.split()) <= ENDED
