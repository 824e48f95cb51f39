"""What the rate and the denoiser add to a training step, in one run: ``OMP_NUM_THREADS=1 python benchmarks/rate.py``.

Each arm is the step of ``benchmarks/arms.py`` at the CPU shapes; times alternate, medians of CPU seconds (of a GPU's
work, where there is one). "no rate at all" is the step without even the logged value.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arms
from benchmarks.tables import add_out, written
from benchmarks.timing import clock, compare, machine

WAYS = {
    "rate logged, weight 0": {},
    "rate, broad": {"prior": "broad"},
    "rate, tokens": {"prior": "tokens"},
    "rate, context": {"prior": "context"},
    "a denoiser of 2 layers": {"denoiser": 2},
    "both: broad, 2 layers": {"prior": "broad", "denoiser": 2},
}


def without(step):
    """``step`` with the broad rate replaced by nothing."""

    def nothing(center_BTD: torch.Tensor, *_) -> torch.Tensor:
        return center_BTD.new_zeros(center_BTD.shape[:2])

    def bare() -> None:
        with mock.patch("sgt_titan.titan.loss.broad_rate", nothing):
            step()

    return bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    add_out(parser)
    words = parser.parse_args()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    steps = {name: arms.ours(arms.CPU, **options).step for name, options in WAYS.items()}
    steps = {"no rate at all": without(arms.ours(arms.CPU).step), **steps}
    times = compare(steps, words.repeats, now=clock)
    dist.destroy_process_group()
    base = times["no rate at all"].median
    with written(words.out, machine()) as tables:
        tables.start("", {"step": "", "s, median (spread)": ".3f", "against no rate": "+.1%"})
        for name, timing in times.items():
            tables.row(name, tuple(timing), timing.median / base - 1 if name != "no rate at all" else None)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
