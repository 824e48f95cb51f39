"""Cases timed side by side in one run: alternating, so that a busy moment hits all of them."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
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
