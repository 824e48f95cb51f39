"""What must not get slower or larger, as ratios of two things done in turn: ``python benchmarks/guard.py``.

Seconds say as much about a machine as about a program, so none is held to a number. A ratio that others on the machine
have disturbed (``timing.doubts``) is taken again; one that fails must fail every time. Ends with 1 if one does. Memory
is counted, not timed, and is the same everywhere. A minute on an idle core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms import naive, ours
from benchmarks.growth import BASE, at
from benchmarks.pieces import in_chunks, whole_logits
from benchmarks.tables import add_out, written
from benchmarks.timing import doubts, machine, peak_bytes, watched
from sgt_titan.processes import keep_memory

TRIES, REPEATS = 3, 5
Call = Callable[[], object]


class Ratio(NamedTuple):
    """build: makes ours and the other, which are then called in turn. most: that ours may take of the other's quickest
    time, and of its memory.
    """

    name: str
    build: Callable[[], tuple[Call, Call]]
    seconds: float
    memory: float


def loss(vocabulary: int, tokens: int = 256, width: int = 256) -> tuple[Call, Call]:
    inputs = [torch.randn(shape) for shape in ((tokens, width), (tokens, width), (vocabulary, width))]
    return lambda: in_chunks(*inputs), lambda: whole_logits(*inputs)


def step(size) -> tuple[Call, Call]:
    return ours(size).step, naive(size).step


# Measured on 2026-11-26 with one core of two: docs/PERFORMANCE.md. The limits leave room for other machines.
RATIOS = (
    Ratio("loss alone, V 32,000: eager / torch on whole logits", lambda: loss(32_000), 1.15, 0.35),
    Ratio("loss alone, V 128,256: eager / torch on whole logits", lambda: loss(128_256), 1.15, 0.30),
    Ratio("a step, B 4, T 128, D 128, V 16,000: eager / naive", lambda: step(BASE), 1.25, 0.55),
    Ratio("a step, T 64", lambda: step(at("T", 64)), 1.35, 0.75),
    Ratio("a step, 16 layers", lambda: step(at("layers", 16)), 1.35, 0.65),
)


def measured(ratio: Ratio) -> tuple[float, float, list[str]]:
    """(of seconds, of memory, doubts): of the quickest of a few calls each."""
    calls = dict(zip(("ours", "theirs"), ratio.build(), strict=True))
    for call in calls.values():
        call()
    found = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            found[name].append(watched(call))
    best = {name: min(call.seconds for call in of) for name, of in found.items()}
    peak = {name: peak_bytes(call) for name, call in calls.items()}
    return best["ours"] / best["theirs"], peak["ours"] / peak["theirs"], doubts(found, quickest=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    words = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    failed = []
    with written(words.out, machine()) as tables:
        tables.start(
            "", {"what": "", "time": ".2f", "at most ": ".2f", "memory": ".2f", "at most": ".2f", "remark": ""}
        )
        for ratio in RATIOS:
            for attempt in range(1, TRIES + 1):
                seconds, memory, why = measured(ratio)
                if seconds <= ratio.seconds or attempt == TRIES:
                    break
            remark = "not to be trusted: " + "; ".join(why) if why else ""
            tables.row(ratio.name, seconds, ratio.seconds, memory, ratio.memory, remark)
            if seconds > ratio.seconds or memory > ratio.memory:
                failed.append(ratio.name)
    for name in failed:
        print(f"slower or larger than it was: {name}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
