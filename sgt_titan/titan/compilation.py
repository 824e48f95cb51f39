"""torch.compile: what is compiled, where its code is kept, and whether the rest of a run earns its time back.

``compile.enable: auto`` begins without it, looks at a few steps, and decides once, on all ranks alike. What it saves
and costs is in ``PRICES``, from docs/PERFORMANCE.md; how long a step takes here and now is measured.
"""

from __future__ import annotations

import os
import shutil
import stat
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from . import lean

CACHE = "TORCHINDUCTOR_CACHE_DIR"
WATCHED = 5
"""Steps that are looked at, without the first, which makes what is made once."""


class Price(NamedTuple):
    """seconds: what a compiler adds to the first step; saves: the share of every later one that it takes away."""

    seconds: float
    saves: float


PRICES = {"cpu": Price(30.0, 0.02), "cuda": Price(120.0, 0.15)}
"""Measured on a CPU: 25 s on two cores, 7 where the code was kept, and 2 to 4% of a step, since the loss works in
blocks without a compiler. Both of a GPU are assumed, on the careful side: nobody has measured them.
"""

MARGIN = 2.0
"""How many times over the price has to come back: a run may end early."""


class Verdict(NamedTuple):
    compile: bool
    words: str


def verdict(seconds: float, left: int, device: str) -> Verdict:
    """Whether ``left`` steps of ``seconds`` each are enough to compile for."""
    price = PRICES[device]
    earned = seconds * left * price.saves
    sums = (
        f"{left:,} steps of {seconds:.3g} s are left: it would save some {earned:,.0f} s and cost {price.seconds:.0f}"
    )
    if earned < MARGIN * price.seconds:
        return Verdict(False, f"not compiled: {sums}")
    return Verdict(True, f"compiled from the next step on: {sums}")


def missing_compiler(device: str) -> str:
    """What a compiler needs and is not there, in words; empty where nothing is known to be missing."""
    if device == "cpu" and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        return "no C++ compiler"
    if device == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "no Triton"
    return ""


class Watch:
    """Seconds of the first steps of a run, until there is a verdict."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def add(self, seconds: float, left: int) -> Verdict | None:
        """After every step, on every rank; the verdict after the last that is looked at. Collective then."""
        self.seconds.append(seconds)
        if len(self.seconds) <= WATCHED:
            return None
        # The slowest rank is what a step takes, and a compiler that one rank lacks all ranks lack.
        lacks = missing_compiler(self.device.type)
        slowest = torch.tensor([statistics.median(self.seconds[1:]), float(bool(lacks))], device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        median, lacking = slowest.tolist()
        if lacking:
            return Verdict(False, f"not compiled: {lacks or 'a rank lacks its compiler'}")
        return verdict(median, left, self.device.type)


def compile_blocks(blocks: Iterable[nn.Module], backend: str, *, fullgraph: bool) -> None:
    """Each on its own, in place; may come before or after FSDP, and before any step of a run."""
    lean.compiling()
    # Teacher and student, training and probe, dense layers and experts are variants of one function; past dynamo's
    # limit, 8 by default, a run would end.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for block in blocks:
        block.compile(backend=backend, fullgraph=fullgraph)


def kept_code(device: torch.device) -> str:
    """How much of what all ranks have compiled they found kept, by an earlier start or by each other. Collective."""
    from torch._dynamo.utils import counters

    counts = torch.tensor([counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss")], device=device)
    dist.all_reduce(counts)
    kept, made = counts.tolist()
    return f"{kept} of {kept + made} compiled pieces were kept from before, {made} were made"


def keep_code() -> None:
    """Say where the compiler keeps its code, so that the other ranks and the next start find it; call it before torch
    compiles anything.

    In the user's own cache, which nodes usually share. torch reads what it finds there as code: so nowhere that others
    may write, such as a directory of data that a group shares; and where ours cannot be had, torch's own stays.
    """
    if os.environ.get(CACHE):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "sgt_titan" / f"compiled-{torch.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError:
        return
    if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.environ[CACHE] = str(folder)
