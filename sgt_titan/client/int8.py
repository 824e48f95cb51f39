"""Weights in eight bits for a client that is short of memory: a quarter of float32, by rows, symmetric.

Only weights; the arithmetic stays in the type of the activations. Heads and norms are left alone, since what they
compute is the mean and the std themselves.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """``x W^T + b`` with W as int8 rows and a float scale each."""

    rows: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("rows", torch.round(weight / scale).to(torch.int8))
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.rows.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantize(module: nn.Module) -> None:
    """Replace every ``nn.Linear`` inside ``module``, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize(child)
