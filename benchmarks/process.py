"""A training as a process: from the command to the first step, and its memory against what `sgt-titan plan` says.

    python benchmarks/process.py start [--against CHECKOUT] [--repeats 5] [--out FILE]
    python benchmarks/process.py memory [--steps 40] [--out FILE]
    python benchmarks/process.py compile [--repeats 5] [--out FILE]

``start``: the demo with its data prepared, `sgt-titan train demo --training.steps 1`, from exec to the line that the
first step is done; what a process waits for that only imports torch, or torchtitan's trainer, is the floor. Wall and
CPU seconds, the ways in turn. ``--against``: another checkout of this project (git worktree add DIR COMMIT).
``memory``: resident bytes at most of the shipped configs for CPUs until their last step, probes included, without the
export at the end, which is a command of its own. ``compile``: the start of the demo compiled, with nothing kept and
with what that start has kept, by one process and by two. CPU seconds are those of all processes of a start together,
compilers included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tables import add_out, written  # no torch: it would be in the way

HERE = Path(__file__).resolve().parents[1]
FIRST = re.compile(r"First step done")
COMPILED = re.compile(r"(\d+) of (\d+) compiled pieces were kept")
CPU_CONFIGS = ("demo", *(["stories3m"] if os.environ.get("SGT_TITAN_ASSETS") else []))
FLOORS = {
    "`import torch`": "import torch",
    "`import torch, transformers`": "import torch, transformers.configuration_utils",
    "`import torchtitan.trainer`": "import torchtitan.trainer",
}


class Run(NamedTuple):
    """Seconds of the wall and of the CPU until a line appeared, or the end; the most bytes that were ever resident; all
    that was said.
    """

    wall: float
    cpu: float
    peak: int
    said: str


def cpu_seconds(root: int) -> float:
    """Of a process and all below it, also of those that have ended and were waited for."""
    parents, ticks = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(file.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))

    def below(pid: int) -> bool:
        while pid not in (0, root):
            pid = parents.get(pid, 0)
        return pid == root

    return sum(used for pid, used in ticks.items() if below(pid)) / os.sysconf("SC_CLK_TCK")


def run(words: list[str], tree: Path, until: re.Pattern[str] | None = None, **more: str) -> Run:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **more}
    began, at = time.monotonic(), None
    with subprocess.Popen(
        words, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if until and until.search(line):
                at = time.monotonic() - began, cpu_seconds(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or (until and at is None):
        sys.exit("".join(said[-20:]))
    wall, cpu = at or (time.monotonic() - began, usage.ru_utime + usage.ru_stime)
    return Run(wall, cpu, usage.ru_maxrss * 1024, "".join(said))


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def start(trees: dict[str, Path], repeats: int, tables) -> None:
    command = [sys.executable, "-m", "sgt_titan.cli", "train", "demo", "--training.steps", "1"]
    with tempfile.TemporaryDirectory() as folder:
        cache = ["--data.cache_dir", f"{folder}/cache", "--export.at_end", "false"]

        def trained(tree: Path, number: int) -> Run:
            return run([*command, "--run.output_dir", f"{folder}/{tree.name}-{number}", *cache], tree, FIRST)

        ways = {name: (lambda i, code=code: run([sys.executable, "-c", code], HERE)) for name, code in FLOORS.items()}
        ways |= {name: (lambda i, tree=tree: trained(tree, i)) for name, tree in trees.items()}
        found: dict[str, list[Run]] = {name: [] for name in ways}
        for number in range(repeats + 1):  # the first fills caches, and prepares the data
            for name, way in ways.items():
                result = way(number)
                if number:
                    found[name].append(result)
    columns = {"from the command to": "", "s, median (spread)": ".2f", "CPU s, median (spread)": ".2f"}
    tables.start("", columns)
    for name, runs in found.items():
        tables.row(name, spread([r.wall for r in runs]), spread([r.cpu for r in runs]))


def memory(steps: int, tables) -> None:
    tables.start("", {"config": "", "plan, MiB": ",.0f", "measured, MiB": ",.0f", "measured / plan": ".2f"})
    for config in CPU_CONFIGS:
        words = [sys.executable, "-m", "sgt_titan.cli"]
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        with tempfile.TemporaryDirectory() as folder:
            report = subprocess.run(
                [*words, "plan", config, "--json"],
                cwd=HERE,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            planned = json.loads(report.stdout)["memory_per_gpu"]["peak"]
            options = [
                "--training.steps",
                str(steps),
                "--metrics.probe_every",
                str(steps),
                "--data.max_samples",
                "2000",
            ]
            options += ["--run.output_dir", f"{folder}/out", "--data.cache_dir", f"{folder}/cache"]
            options += ["--export.at_end", "false"]
            found = run([*words, "train", config, *options], HERE).peak
        tables.row(f"`{config}`", planned / 2**20, found / 2**20, found / planned)


def compiled(repeats: int, tables) -> None:
    """The first step is done when all of it is compiled: forward, backward and loss."""
    ways = {
        "not compiled": ("false", 1),
        "compiled, nothing kept": ("true", 1),
        "compiled, the next start": ("true", 1),
        "compiled, then two processes": ("true", 2),
        "compiled, their next start": ("true", 2),
    }
    found: dict[str, list[Run]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "sgt_titan.cli", "train", "demo", "--export.at_end", "false"]
        words += ["--data.cache_dir", f"{folder}/cache", "--training.steps", "1"]
        run([*words, "--run.output_dir", f"{folder}/first"], HERE)  # prepares the data
        for number in range(repeats):
            for name, (enable, processes) in ways.items():
                more = ["--run.output_dir", f"{folder}/{number}-{name}", "--compile.enable", enable]
                more += ["--nproc", str(processes)]
                kept = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/code-{number}"}
                found[name].append(run([*words, *more], HERE, FIRST, **kept))
    columns = {"start of the demo": "", "s, median (spread)": ".1f", "CPU s, median (spread)": ".1f"}
    tables.start("", columns | {"found, of the pieces": ""})
    for name, runs in found.items():
        pieces = COMPILED.search(runs[-1].said)
        shown = "{} of {}".format(*pieces.groups()) if pieces else ""
        tables.row(name, spread([r.wall for r in runs]), spread([r.cpu for r in runs]), shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "memory", "compile"))
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    add_out(parser)
    options = parser.parse_args()
    machine = f"{os.cpu_count()} CPUs, OMP_NUM_THREADS=1"
    with written(options.out, machine) as tables:
        if options.what == "memory":
            memory(options.steps, tables)
            return 0
        if options.what == "compile":
            compiled(options.repeats, tables)
            return 0
        trees = {"the demo's first step": HERE}
        if options.against:
            trees["the same before"] = options.against.resolve()
        start(trees, options.repeats, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
