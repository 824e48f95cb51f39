"""Commands that train and evaluate a grid: which are done, which are to be run, and running them, several at a time.

Each is a process of its own, through the commands that anybody would type, and goes on where an interruption left it.
``tables`` and ``frontier`` share this.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sgt_titan.config.door import read_config
from sgt_titan.config.keys import get, keys
from sgt_titan.config.load import HOW_IT_RUNS, RECORDED, load
from sgt_titan.config.overrides import parse_overrides
from sgt_titan.config.schema import PRESETS, TERMS, Config
from sgt_titan.errors import UserError
from sgt_titan.terminal import clock

RESOLVED = (-1, "auto", "")  # a run chooses for itself

Execute = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Step:
    """A command, and the file that says it has been done. asked: the config of a training."""

    words: tuple[str, ...]
    done: Path
    asked: Config | None = None

    def is_done(self) -> bool:
        """Whether the file is there and, of an evaluation, by this command: with another it goes on, or refuses.

        Raises:
            UserError: it is there from a training with another config.
        """
        if not self.done.is_file():
            return False
        if self.asked is None:
            with contextlib.suppress(OSError, ValueError):
                about = json.loads(self.done.read_text(encoding="utf-8")).get("about") or {}
                return about.get("command") == command(self.words)
            return False
        home, trained = self.done.parents[2], load(str(self.done.parents[1] / RECORDED))
        for key in keys():
            old, new = get(trained, key), get(self.asked, key)
            if old != new and not key.startswith(HOW_IT_RUNS) and new not in RESOLVED:
                raise UserError(
                    f"{home}: was trained with --{key} {old}, not {new}; choose another --out, or delete it"
                )
        return True


def objective(preset: str) -> list[str]:
    """Overrides that make a config's objective that of a preset: terms it does not have get no weight, at any step; and
    the paper's rows have no denoiser, which is this project's.
    """
    words = ["--objective.preset", preset]
    for term in TERMS:
        if term not in PRESETS[preset]:
            words += [word for key in ("weight", "start", "ramp_steps") for word in (f"--objective.{term}.{key}", "0")]
    return words if "rate" in PRESETS[preset] else [*words, "--denoiser.layers", "0"]


def training(name: str, config: str, run: Path, overrides: Sequence[str]) -> Step:
    """Train ``config`` with ``overrides`` in ``run``; its export says that it is done."""
    words = ["train", config, "--run.name", name, "--run.output_dir", str(run), *overrides]
    asked, _ = read_config(config, overrides)
    return Step(tuple(words), run / "export" / "config.json", asked)


def shared_cache(config: Config, overrides: Sequence[str]) -> list[str]:
    """Overrides that let all runs of a grid share the data, and the zero of ``kept``, of the config itself.

    The default lies beside a run's directory, of which a grid has many.
    """
    from sgt_titan.data.cache import cache_dir

    known = "data.cache_dir" in parse_overrides(list(overrides))
    return [] if known else ["--data.cache_dir", str(cache_dir(config))]


def command(words: Sequence[str]) -> str:
    return shlex.join(["sgt-titan", *words])


def execute(words: Sequence[str]) -> int:
    """Run ``sgt-titan`` with ``words``; what it prints goes to the terminal."""
    print(f"\n$ {command(words)}", flush=True)
    return _code(subprocess.run([sys.executable, "-m", "sgt_titan.cli", *words], check=False).returncode)


def _code(returned: int) -> int:
    return returned if returned >= 0 else 128 - returned  # killed by a signal, as a shell counts it


# -- several at a time -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """Steps that follow one another: a training and what measures it. log: where their output goes."""

    name: str
    steps: tuple[Step, ...]
    log: Path


class Pool:
    """Runs chains, ``jobs`` at a time, and says when each step begins and ends.

    What a step prints is appended to its chain's log. A step that fails ends its chain and no other. ``after`` is
    called when a chain has ended, one at a time.
    """

    def __init__(
        self,
        jobs: int,
        say: Callable[[str], None],
        after: Callable[[], None] = lambda: None,
        start: Callable[[Sequence[str], Path, int], subprocess.Popen] | None = None,
    ):
        self.jobs, self.say, self.after, self.start = jobs, say, after, start or _start
        self._lock, self._running, self._stopped = threading.Lock(), set(), False

    def run(self, chains: Sequence[Chain]) -> int:
        """Everything that is not done; returns the exit code of the first step that failed, or 0.

        Raises:
            UserError: from ``Step.is_done``, before anything is run.
        """
        waiting = [(chain, [step for step in chain.steps if not step.is_done()]) for chain in chains]
        waiting = [(chain, steps) for chain, steps in waiting if steps]
        done = sum(len(chain.steps) for chain in chains) - sum(len(steps) for _, steps in waiting)
        self.total, self.count, self.began = sum(len(steps) for _, steps in waiting), 0, time.monotonic()
        if done:
            self.say(f"{done} of {done + self.total} commands are done already")
        pool = ThreadPoolExecutor(max(1, self.jobs))
        try:
            codes = list(pool.map(lambda pair: self._chain(*pair), waiting))
        finally:  # of an interruption too: whoever is left behind would go on alone
            self.stop()
            pool.shutdown(wait=True, cancel_futures=True)
        return next((code for code in codes if code), 0)

    def stop(self) -> None:
        """Ask what is running to end: a training saves a checkpoint first."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(OSError):
                    process.terminate()

    def _chain(self, chain: Chain, steps: Sequence[Step]) -> int:
        for step in steps:
            with self._lock:
                if self._stopped:
                    return 130
                began = time.monotonic()
                chain.log.parent.mkdir(parents=True, exist_ok=True)
                with open(chain.log, "a", encoding="utf-8") as log:
                    log.write(f"\n$ {command(step.words)}\n")
                process = self.start(step.words, chain.log, self.jobs)
                self._running.add(process)
                self._say(f"{chain.name}: {step.words[0]} began")
            code = _code(process.wait())
            with self._lock:
                self._running.discard(process)
                self.count += 1
                took = f"{clock(time.monotonic() - began)}"
                if not code:
                    self._say(f"{chain.name}: {step.words[0]} done in {took}")
                elif not self._stopped:
                    self._say(f"{chain.name}: {step.words[0]} FAILED after {took}, exit code {code}: {last(chain.log)}")
            if code:
                return code
        with self._lock:
            if not self._stopped:
                self.after()
        return 0

    def _say(self, text: str) -> None:
        left = ""
        if 0 < self.count < self.total:
            left = f", about {clock((time.monotonic() - self.began) * (self.total - self.count) / self.count)} left"
        self.say(f"[{self.count}/{self.total}] {time.strftime('%H:%M:%S')} {text}{left}")


def _start(words: Sequence[str], log: Path, jobs: int) -> subprocess.Popen:
    environment = dict(os.environ)
    if jobs > 1:  # or each would take all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    with open(log, "a", encoding="utf-8") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "sgt_titan.cli", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def last(log: Path) -> str:
    """The last line that says something, for whoever does not open the log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]]
    return f"{next((line for line in reversed(lines) if line), '')[:300]} ({log})"
