"""A checkpoint's tensors as safetensors files of a size, and the index of several; a file at a time is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from sgt_titan.trunk.files import INDEX, SINGLE


@dataclass(frozen=True)
class Planned:
    """A tensor to write; ``make()`` computes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def write_shards(
    planned: Sequence[Planned], out: Path, shard_bytes: int, done: Callable[[int, int, str], None] | None = None
) -> None:
    """Write them into the folder ``out``; ``done`` is told each file, its number and of how many."""
    shards = plan_shards(planned, shard_bytes)
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = shard_name(i, len(shards))
        save_file(
            {p.name: p.make().detach().to("cpu", p.dtype).contiguous() for p in shard}, out / file, {"format": "pt"}
        )
        where |= {p.name: file for p in shard}
        if done:
            done(i, len(shards), file)
    write_index(out, where, sum(p.bytes for p in planned))


def plan_shards(planned: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    """In order, each at most ``shard_bytes`` unless one tensor alone is larger."""
    shards: list[list[Planned]] = [[]]
    used = 0
    for tensor in planned:
        if shards[-1] and used + tensor.bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.bytes
    return shards


def shard_name(number: int, count: int) -> str:
    """What transformers calls file ``number`` (from 1) of ``count``."""
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE


def write_index(out: Path, where: Mapping[str, str], total: int) -> None:
    """The index of several files: which holds which tensor, and their bytes together."""
    if len(set(where.values())) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": where}
        (out / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
