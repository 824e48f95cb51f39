"""One gather for both streams against a walk for each, on gloo ranks of this machine: ``python benchmarks/ranks.py``.

Both ways run in the same processes, alternating. The network is loopback and the ranks share the cores: what carries
over to a cluster is the number of gathers and their bytes, not the seconds.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, machine


def walk_twice(model):
    """The model with a layer called for one stream at a time: the teacher through all layers, then the student."""
    for dual in [*model.trunk.layers.values(), model.trunk.norm]:
        dual.forward = MethodType(one_stream, dual)
    return model


def one_stream(self, teacher_BTD, student_BTD, *args):
    """``DualStream.forward`` with a second gather: the weights are freed between the streams."""
    with torch.no_grad():
        teacher_BTD = self.block(teacher_BTD, *args)
    self.reshard()
    self.unshard()
    return teacher_BTD, self.block(student_BTD, *args)


def worker(rank: int, world: int, port: int, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

    from benchmarks import arms

    gathers = []
    original = fsdp.foreach_all_gather

    def counted(params, *args, **kwargs):
        gathers.append(sum(p._orig_size.numel() for p in params))
        return original(params, *args, **kwargs)

    fsdp.foreach_all_gather = counted
    size = replace(arms.CPU, rows=2)  # a pair needs two
    once = arms.ours(size)
    build = arms.model_of

    def separate(*args, **kwargs):
        model, *rest = build(*args, **kwargs)
        return walk_twice(model), *rest

    arms.model_of = separate
    twice = arms.ours(size)
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


def main() -> None:
    print(machine())
    print("\n| ranks | way | gathers a step | gathered, MB | s a step, median (spread) |\n|---:|---|---:|---:|---:|")
    for world in (2, 4):
        context = mp.get_context("spawn")
        queue = context.Queue()
        mp.start_processes(worker, (world, 29500 + os.getpid() % 1000 + world, queue), nprocs=world, join=True)
        for name, (count, numbers, median, low, high) in queue.get().items():
            print(f"| {world} | {name} | {count} | {4 * numbers / 1e6:.0f} | {median:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main()
