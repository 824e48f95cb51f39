"""Frozen weights, straight from safetensors into each rank's shards, without a collective."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.checkpointer.utils import canonical_fqn

from sgt_titan.transform.trunk_files import TrunkFiles
from sgt_titan.trunk.check import check_tie

from .float8 import E4M3, SCALE, to_float8
from .trunks import Family, hf_name


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


@torch.no_grad()
def load_trunk(trunk: nn.Module, family: Family, files: TrunkFiles) -> None:
    """Fill ``trunk`` (materialised, sharded or not) from ``files``.

    Raises:
        UserError: see ``check_trunk`` and ``TrunkFiles.check_values``.
    """
    check_trunk(trunk, family, files)
    tied = getattr(trunk, "enable_weight_tying", False)
    weights = named_weights(trunk)
    for name, tensor in weights.items():
        if name.endswith(SCALE):
            continue  # comes with the weight it belongs to
        target = hf_name(family, name)
        if tied and target == "lm_head.weight":
            continue  # the same parameter as the embedding table
        local, region = local_region(tensor)
        if local.numel() == 0:
            continue
        if tensor.dtype == E4M3:
            # A scale is of a whole row, also where tensor parallelism splits rows.
            weight = files.read(target, (region[0], slice(0, tensor.shape[1])))
            files.check_values(target, weight)
            rounded, scale = to_float8(weight)
            local.copy_(rounded[:, region[1]])
            local_region(weights[name.removesuffix("weight") + SCALE])[0].copy_(scale)
        elif "{}" in target:
            for row, expert in enumerate(range(region[0].start, region[0].stop)):
                weight = files.read(target.format(expert), region[1:])
                files.check_values(target.format(expert), weight)
                local[row].copy_(weight)
        else:
            weight = files.read(target, region)
            files.check_values(target, weight)
            local.copy_(weight)
