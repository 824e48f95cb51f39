"""Between DTensors, which live inside the trunk and the bodies, and the plain tensors of everything else."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, differentiably."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's value on every rank; the ranks' gradients with respect to it are parts of a sum."""
    if not isinstance(tensor, DTensor):
        return tensor
    everywhere = [Replicate()] * tensor.device_mesh.ndim
    return tensor.redistribute(placements=everywhere).to_local(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``tensor`` as the local part of a DTensor laid out like ``reference``."""
    if not isinstance(reference, DTensor):
        return tensor
    return DTensor.from_local(tensor, reference.device_mesh, reference.placements, run_check=False)
