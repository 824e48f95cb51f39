"""What more ranks bring and cost, on gloo processes of this machine: ``python benchmarks/ranks.py [PART]``.

    gathers   one gather for both streams against a walk for each
    pairs     the MI term's exchange while the trunk works, against one that is waited for at once
    growth    how a step grows with the ranks, each with rows of its own; ``--plots FOLDER`` draws it

The ways of the first two are in the same processes and alternate. The network is loopback and the ranks share the
cores: memory, the number of gathers and their bytes carry over to a cluster, the seconds do not. To see them wait for
a network, give them one (root): ``ip netns add slow; ip -n slow link set lo up; tc -n slow qdisc add dev lo root tbf
rate 400mbit burst 256kb latency 100ms``, then ``ip netns exec slow python benchmarks/ranks.py gathers``, and ``pairs``.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arms
from benchmarks.tables import Tables, add_out, written
from benchmarks.timing import clock, compare, machine, peak_bytes

SIZE = replace(arms.CPU, layers=8, vocab=16_000)  # two rows a rank: a pair needs two
RANKS = (1, 2, 4, 8)


def walk_twice(model) -> None:
    """From now on a layer is called for one stream at a time, as where the teacher goes through all layers first."""
    for dual in [*model.trunk.layers.values(), model.trunk.norm]:
        dual.forward = MethodType(one_stream, dual)


def one_stream(self, teacher_BTD, student_BTD, *args):
    """``DualStream.forward`` with a second gather: the weights are freed between the streams."""
    with torch.no_grad():
        teacher_BTD = self.block(teacher_BTD, *args)
    self.reshard()
    self.unshard()
    return teacher_BTD, self.block(student_BTD, *args)


def join(rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)


def count_gathers() -> list[int]:
    """Bytes of each of FSDP's gathers from now on, whole."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

    gathers: list[int] = []
    original = fsdp.foreach_all_gather

    def counted(params, *args, **kwargs):
        gathers.append(sum(p._orig_size.numel() * p.sharded_param.element_size() for p in params))
        return original(params, *args, **kwargs)

    fsdp.foreach_all_gather = counted
    return gathers


def gather_once_or_twice(rank: int, world: int, port: int, queue) -> None:
    join(rank, world, port)
    gathers = count_gathers()
    once, twice = arms.ours(SIZE), arms.ours(SIZE)
    walk_twice(twice.model)
    found = {}
    cases = {"a gather for both streams": once.step, "a gather for each stream": twice.step}
    for name, step in cases.items():
        step()
        gathers.clear()
        step()
        found[name] = (len(gathers), sum(gathers))
    times = compare({name: lambda step=step: (dist.barrier(), step()) for name, step in cases.items()}, 5)
    if rank == 0:
        queue.put({name: (*found[name], *times[name]) for name in cases})
    dist.destroy_process_group()


class WaitedFor:
    """torch.distributed whose collectives are over when they have begun."""

    def __getattr__(self, name: str):
        found = getattr(dist, name)
        if name not in ("all_gather_single", "reduce_scatter_single"):
            return found

        def call(*args, **kwargs):
            work = found(*args, **kwargs)
            work.wait()
            return work

        return call


def exchange_behind_or_before(rank: int, world: int, port: int, queue) -> None:
    join(rank, world, port)
    from sgt_titan.titan import pairs

    # A copy of the trunk on each rank, so that nothing else waits for the network but the estimator's gradients.
    step = arms.ours(replace(SIZE, rows=1, length=1024), replicas=world).step

    def with_(module) -> None:
        pairs.dist = module
        dist.barrier()
        step()

    cases = {"while the trunk works": lambda: with_(dist), "waited for at once": lambda: with_(WaitedFor())}
    times = compare(cases, 5)
    if rank == 0:
        queue.put(times)
    dist.destroy_process_group()


def step_of(rank: int, world: int, port: int, queue, float8: str) -> None:
    """A rank's own CPU seconds, gathers and their bytes, bytes of frozen weights it keeps, and the peak above rest."""
    join(rank, world, port)
    gathers = count_gathers()
    arm = arms.ours(SIZE, float8=float8)
    arm.step()
    gathers.clear()
    arm.step()
    found = len(gathers), sum(gathers)
    timing = compare({"step": lambda: (dist.barrier(), arm.step())}, 5, now=clock)["step"]
    dist.barrier()
    peak = peak_bytes(arm.step)
    frozen = [getattr(p, "_local_tensor", p) for p in arm.model.trunk.parameters()]
    if rank == 0:
        kept = sum(p.numel() * p.element_size() for p in frozen)
        queue.put((*found, kept / 2**20, peak / 2**20, *timing))
    dist.destroy_process_group()


def on_ranks(function, world: int, *arguments):
    """What rank 0 of ``world`` processes puts into the queue."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = 29500 + os.getpid() % 1000 + world
    processes = mp.start_processes(function, (world, port, queue, *arguments), nprocs=world, join=False)
    found = queue.get(timeout=600)
    processes.join()
    return found


def draw(found: dict[str, dict[int, tuple]], naive: float, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    for (name, rows), colour in zip(found.items(), ("tab:blue", "tab:green"), strict=True):
        worlds = list(rows)
        panels[0].plot(worlds, [r[4] for r in rows.values()], "o-", label=name, color=colour)
        panels[0].fill_between(
            worlds, [r[5] for r in rows.values()], [r[6] for r in rows.values()], alpha=0.2, color=colour
        )
        panels[1].plot(worlds, [r[2] for r in rows.values()], "o-", color=colour, label=f"{name}: frozen shard")
        panels[1].plot(worlds, [r[3] for r in rows.values()], "s:", color=colour, label=f"{name}: peak above rest")
        panels[2].plot(worlds, [r[1] * (n - 1) / n / 1e6 for n, r in rows.items()], "o-", color=colour, label=name)
    panels[1].axhline(naive, color="tab:orange", label="naive: a copy a rank")
    labels = ("s of a rank's own work a step", "MiB a rank", "MB received a step")
    for panel, label in zip(panels, labels, strict=True):
        panel.set(xlabel="ranks, 2 rows each", ylabel=label, xscale="log", xticks=RANKS, ylim=(0, None))
        panel.set_xticks([], minor=True)
        panel.set_xticklabels(RANKS)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=7)
    figure.savefig(folder / "growth-ranks.png", dpi=110)


GATHERS = {
    "ranks": "d",
    "way": "",
    "gathers a step": "d",
    "gathered, MB": ".0f",
    "s a step, median (spread)": ".3f",
}
PAIRS = {"ranks": "d", "pairs exchanged": "", "s a step, median (spread)": ".3f"}
GROWTH = {
    "ranks": "d",
    "layers": "",
    "gathers a step": "d",
    "received a rank, MB": ".0f",
    "frozen shard, MiB": ".0f",
    "peak above rest, MiB": ".0f",
    "s of a rank's own work, median (spread)": ".3f",
}


def gathers(tables: Tables, _) -> None:
    tables.start("", GATHERS)
    for world in (2, 4):
        for name, (count, size, *times) in on_ranks(gather_once_or_twice, world).items():
            tables.row(world, name, count, size / 1e6, tuple(times))


def pairs(tables: Tables, _) -> None:
    tables.start("", PAIRS)
    for name, times in on_ranks(exchange_behind_or_before, 2).items():
        tables.row(2, name, tuple(times))


def growth(tables: Tables, plots: str | None) -> None:
    tables.start("", GROWTH)
    found: dict[str, dict[int, tuple]] = {}
    for float8, name in (("none", "float32"), ("weights", "float8")):
        for world in RANKS:
            row = found.setdefault(name, {})[world] = on_ranks(step_of, world, float8)
            count, size, kept, peak, *times = row
            tables.row(world, name, count, size * (world - 1) / world / 1e6, kept, peak, tuple(times))
    if plots:
        draw(found, found["float32"][1][2], Path(plots))


PARTS = {"gathers": gathers, "pairs": pairs, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--plots", help="draw into this folder")
    add_out(parser)
    words = parser.parse_args()
    with written(words.out, machine()) as tables:
        for part in PARTS if words.part == "all" else (words.part,):
            PARTS[part](tables, words.plots)


if __name__ == "__main__":
    main()
