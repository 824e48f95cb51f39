"""Frozen weights, straight from safetensors into each rank's shards; replicas of a shard share out the reading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.checkpointer.utils import canonical_fqn

from sgt_titan.transform.trunk_files import TrunkFiles
from sgt_titan.trunk.check import check_tie

from .float8 import E4M3, SCALE, to_float8
from .replicas import Piece, fill
from .trunks import Family, hf_name

PIECE_BYTES = 64 << 20  # that are read before anything is sent: what a rank holds beside its shards


def local_region(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """The part of ``tensor`` that this rank holds, and its place in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, n) for n in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor._local_tensor
    assert tuple(local.shape) == tuple(shape), (local.shape, shape)
    return local, tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def named_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under torchtitan's names, whatever wraps their modules."""
    state = module.state_dict(keep_vars=True)
    return {canonical_fqn(name).replace(".block.", "."): tensor for name, tensor in state.items()}


def hf_shapes(trunk: nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must hold, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_weights(trunk).items():
        if name.endswith(SCALE):
            continue
        target = hf_name(family, name)
        if "{}" in target:
            shapes |= {target.format(e): tuple(tensor.shape[1:]) for e in range(tensor.shape[0])}
        else:
            shapes[target] = tuple(tensor.shape)
    return shapes


def check_trunk(trunk: nn.Module, family: Family, files: TrunkFiles) -> None:
    """Names and shapes agree, before anything is read.

    Raises:
        UserError: naming the first tensor that is missing or of the wrong shape; an lm_head that a tie contradicts.
    """
    expected = hf_shapes(trunk, family)
    if tied := getattr(trunk, "enable_weight_tying", False):
        expected.pop("lm_head.weight", None)
    files.check(expected)
    check_tie(files.path, tied, files.entries)


@dataclass
class Tally:
    """Bytes that this rank read from storage, and that it received from another replica."""

    read: int = 0
    received: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.read + other.read, self.received + other.received)

    def summary(self, replicas: int, device: torch.device) -> str:
        """Of all ranks, in words. Collective."""
        read, received, most = (torch.tensor(n, device=device) for n in (self.read, self.received, self.read))
        dist.all_reduce(read)
        dist.all_reduce(received)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        sent = f", {_size(received)} sent between {replicas} replicas and checked" if received else ""
        ranks = dist.get_world_size()
        return f"Trunk: {_size(read)} read from storage by {ranks} ranks, {_size(most)} by one at most{sent}"


def _size(count: torch.Tensor | int) -> str:
    return f"{int(count) / 1e9:.2f} GB" if count >= 10_000_000 else f"{int(count) / 1e6:.2f} MB"


@torch.no_grad()
def load_trunk(trunk: nn.Module, family: Family, files: TrunkFiles, replicas: dist.ProcessGroup | None = None) -> Tally:
    """Fill ``trunk`` (materialised, sharded or not) from ``files``; returns what was read and what received.

    Args:
        replicas: the ranks that hold the same shards, which share out the reading; None: this rank reads all of its.

    Raises:
        UserError: see ``check_trunk``, ``TrunkFiles.check_values`` and ``replicas.fill``.
    """
    check_trunk(trunk, family, files)
    before = files.bytes_read
    received = fill(list(pieces(trunk, family, files)), replicas, after=lambda: _check_whole(trunk, family, files))
    return Tally(files.bytes_read - before, received)


def pieces(trunk: nn.Module, family: Family, files: TrunkFiles) -> Iterator[Piece]:
    """This rank's shards in pieces of at most ``PIECE_BYTES`` (or a row), each a part of one tensor's rows."""
    tied = getattr(trunk, "enable_weight_tying", False)
    weights = named_weights(trunk)
    for name, tensor in weights.items():
        if name.endswith(SCALE):
            continue  # comes with the weight it belongs to
        target = hf_name(family, name)
        if tied and target == "lm_head.weight":
            continue  # the same parameter as the embedding table
        local, region = local_region(tensor.detach())
        if local.numel() == 0:
            continue
        if tensor.dtype == E4M3:
            scale = local_region(weights[name.removesuffix("weight") + SCALE].detach())[0]
            for some, rows in _by_rows(local, region[0]):
                parts = local[some], scale[some]
                yield Piece(
                    target, parts, partial(_read_float8, files, target, parts, rows, region[1], tensor.shape[1])
                )
        elif "{}" in target:
            for row, expert in enumerate(range(region[0].start, region[0].stop)):
                one = target.format(expert)
                for some, rows in _by_rows(local[row], region[1]):
                    part = local[row][some]
                    yield Piece(one, (part,), partial(_read_plain, files, one, part, (rows, *region[2:])))
        elif not local.dim():
            yield Piece(target, (local,), partial(_read_plain, files, target, local, ()))
        else:
            for some, rows in _by_rows(local, region[0]):
                part = local[some]
                yield Piece(target, (part,), partial(_read_plain, files, target, part, (rows, *region[1:])))


def _by_rows(local: torch.Tensor, rows: slice) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows of a local tensor of which each fits in a piece, and where they are in the whole tensor."""
    step = max(1, PIECE_BYTES * len(local) // max(local.nbytes, 1))
    for begin in range(0, len(local), step):
        end = min(begin + step, len(local))
        yield slice(begin, end), slice(rows.start + begin, rows.start + end)


def _read_plain(files: TrunkFiles, name: str, part: torch.Tensor, place: tuple[slice, ...]) -> None:
    weight = files.read(name, place)
    files.check_values(name, weight)
    part.copy_(weight)


def _read_float8(
    files: TrunkFiles, name: str, parts: tuple[torch.Tensor, ...], rows: slice, columns: slice, width: int
) -> None:
    # A scale is of a whole row, also where tensor parallelism splits rows.
    weight = files.read(name, (rows, slice(0, width)))
    files.check_values(name, weight)
    rounded, scale = to_float8(weight)
    parts[0].copy_(rounded[:, columns])
    parts[1].copy_(scale)


def _check_whole(trunk: nn.Module, family: Family, files: TrunkFiles) -> None:
    """What no piece of a large tensor shows: that it is zero everywhere."""
    for name, tensor in named_weights(trunk).items():
        local = local_region(tensor.detach())[0]
        if local.dim() > 1 and local.shape == tensor.shape and local.nbytes > PIECE_BYTES and not local.any():
            files.check_values(hf_name(family, name), local)
