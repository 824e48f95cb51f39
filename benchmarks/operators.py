"""Where the time of a step goes, by operator: ``python benchmarks/operators.py [--compiled]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arms
from benchmarks.tables import add_out, written
from benchmarks.timing import machine

OPERATORS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="blocks and loss by torch.compile")
    add_out(parser)
    words = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    size = arms.LLAMA_1B if cuda else arms.CPU
    step = arms.ours(size, compiled=words.compiled).step
    step()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as profile:
        step()
    events = profile.key_averages()
    own = (lambda e: e.self_device_time_total) if cuda else (lambda e: e.self_cpu_time_total)
    total = sum(map(own, events))
    with written(words.out, machine()) as tables:
        tables.start("", {"operator": "", "calls": "d", "share": ".1%"})
        for event in sorted(events, key=own, reverse=True)[:OPERATORS]:
            tables.row(event.key, event.count, own(event) / total)


if __name__ == "__main__":
    main()
