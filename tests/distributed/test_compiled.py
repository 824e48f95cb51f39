"""Runs compiled by inductor, on layouts of ranks, and what the second start finds of the first's code."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_parallelism import HSDP, ROWS, TP2, assert_same_terms

import launch

pytestmark = pytest.mark.distributed

# Runs one after another: ranks, options, and whether any code is made. Shapes on a rank are the same in a row of runs,
# and what FSDP does is outside of the code; the mesh that tensors are split over is part of it.
LAYOUTS = {
    "fsdp2 x2 and hsdp 2x2, pairs across ranks": ((2, (ROWS, "1"), True), (4, (*HSDP, ROWS, "1"), False)),
    "tp x2 and fsdp2 2 x tp 2": (
        (2, (*TP2, ROWS, "2"), True),
        (2, (*TP2, ROWS, "2"), False),
        (4, (*TP2, ROWS, "2"), True),
        (4, (*TP2, ROWS, "2"), False),
    ),
}
# Twice as much to compile: sequences are split for one module and whole for the next.
MARKS = {"tp x2 and fsdp2 2 x tp 2": pytest.mark.inductor}


@pytest.fixture(scope="module")
def reference(small):
    """One process, not compiled, no accumulation."""
    return small.finish(1, hooks=(launch.record_samples,))


@dataclass
class CodeIn:
    """Where a rank keeps its code. It compiles by itself: a pool of compilers a rank is more than two cores feed."""

    folder: Path

    def __call__(self, rank: int, folder: Path) -> None:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(self.folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.mark.parametrize("layouts", [pytest.param(name, marks=MARKS.get(name, ())) for name in LAYOUTS])
def test_started_again(layouts, reference, small, tmp_path):
    """The ranks of a run share what they compile; a later start, of another layout even, finds it and makes nothing."""
    options = ("--compile.enable", "true", "--comm.init_timeout_seconds", "600")
    for ranks, overrides, compiles in LAYOUTS[layouts]:
        run = small.finish(ranks, *overrides, *options, hooks=(launch.record_samples, CodeIn(tmp_path)), timeout=600)
        assert launch.samples(run.folder) == launch.samples(reference.folder)
        assert_same_terms(run.scalars, reference.scalars)
        (made,) = re.findall(r"compiled pieces were kept from before, (\d+) were made", run.outcome.output[0])
        assert (int(made) > 0) == compiles
