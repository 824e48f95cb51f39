"""Cases timed side by side in one run: alternating, so that a busy moment hits all of them."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch


def clock() -> float:
    """Seconds: of a GPU's work, after it is done; of this process's own work where it has one thread on a CPU, which is
    what the wall would say were the machine not shared; else the wall's.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Watched(NamedTuple):
    """One call: ``clock`` seconds; page faults of this process; share of the machine that others took meanwhile."""

    seconds: float
    faults: int
    others: float


def watched(case: Callable[[], object]) -> Watched:
    faults, busy, own, wall = _faults(), _busy(), time.process_time(), time.perf_counter()
    started = clock()
    case()
    seconds = clock() - started
    elapsed = time.perf_counter() - wall
    others = (_busy() - busy - (time.process_time() - own)) / (elapsed * (os.cpu_count() or 1))
    return Watched(seconds, _faults() - faults, max(0.0, others))


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _busy() -> float:
    """CPU seconds that anything on this machine, or in its place, has used; idle and waiting for disks left out."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = fields
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


OTHERS, SPREAD = 0.15, 0.15


def doubts(cases: Mapping[str, Sequence[Watched]], quickest: int | None = None) -> list[str]:
    """Why ratios of these cannot be trusted, in words; none if they can. quickest: so many calls of each are looked at,
    for a ratio of the quickest."""
    found = []
    for name, calls in cases.items():
        calls = sorted(calls, key=lambda call: call.seconds)[:quickest]
        others = statistics.median(call.others for call in calls)
        low, *_, high = sorted(call.seconds for call in calls) if len(calls) > 1 else [calls[0].seconds] * 2
        if others > OTHERS:
            found.append(f"{name}: others used {others:.0%} of the machine")
        if high > (1 + SPREAD) * low:
            found.append(f"{name}: {high / low - 1:.0%} between its quickest and its slowest")
    return found


class Timing(NamedTuple):
    """Seconds."""

    median: float
    low: float
    high: float


def compare(
    cases: Mapping[str, Callable[[], object]], repeats: int = 5, *, now: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Every case ``repeats`` times, in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, case in cases.items():
            started = now()
            case()
            if round_:
                seconds[name].append(now() - started)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def peak_bytes(case: Callable[[], object]) -> int:
    """Most that torch's allocator held during ``case`` beyond what it held before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        case()
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    found = []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.typed[1].alloc_size))
    return max(accumulate((size for _, size in sorted(found)), initial=0))


def peak_mib(code: str) -> float:
    """Peak resident memory of a Python process that runs ``code`` beyond one that imports the same, MiB.

    The code is run with the name ``start`` bound to a function to call when its inputs are ready.
    """
    head = (
        # Not getrusage's maximum, which a child takes over from its parent.
        "hwm = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "peak = lambda: hwm() / 1024\n"
        "before = []\nstart = lambda: before.append(peak())\n"
    )
    tail = "\nprint(peak() - before[0])"
    done = subprocess.run([sys.executable, "-c", head + code + tail], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def machine() -> str:
    """One line: hardware and versions."""
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {platform.machine()} CPU"
    )
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
