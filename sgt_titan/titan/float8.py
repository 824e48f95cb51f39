"""Frozen matrices in float8 e4m3: one byte a weight in memory and in FSDP's gathers.

    W = scale * W8        a float32 scale for each row (output), so that a row's largest weight is e4m3's largest number

The scale of an output can be multiplied to the product instead of to the matrix, and in the backward pass to the
gradient before it: W8 is used as it is in both directions.

    forward    y  = (x W8^T) * scale^T
    backward   dx = (dy * scale^T) W8

``weights`` computes these in the type of the activations, from a copy of W8 in that type that lives as long as the
product. ``products`` also rounds x, and dy * scale^T, to e4m3 with a scale a token, and multiplies in float8.
A frozen matrix has no gradient, so nothing but W8 is kept for the backward pass.

torchao's float8 training linear keeps high-precision shards, saves the input and multiplies a weight gradient
whatever is frozen; its quantised inference tensors have no backward. Hence this file, over torch's own ``scaled_mm``.

Legend: N tokens flat, O outputs, I inputs (or this tensor-parallel rank's part of them).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Shard
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.linear import Linear

from .layout import local

Mode = Literal["weights", "products"]
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
ROWS = F.ScalingType.RowWise
SCALE = "weight_scale"


def to_float8(matrix_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The e4m3 numbers (N, I) and the float32 scales (N, 1) whose product is nearest to ``matrix_NI``."""
    matrix_NI = matrix_NI.float()
    scale_N1 = matrix_NI.abs().amax(-1, keepdim=True) / LARGEST
    scale_N1 = torch.where(scale_N1 > 0, scale_N1, 1.0)  # a row of zeros stays one
    return (matrix_NI / scale_N1).to(E4M3), scale_N1


class _FrozenProduct(torch.autograd.Function):
    """x W^T for a frozen W = scale * W8."""

    @staticmethod
    def forward(ctx, x_NI, weight_OI, scale_O1, in_float8):
        ctx.save_for_backward(weight_OI, scale_O1)
        ctx.in_float8 = in_float8
        if in_float8:
            # Fast accumulation forward and exact backward, as torchao's recipes have it.
            return _product(x_NI, weight_OI.t(), scale_O1.t(), x_NI.dtype, fast=True)
        return (x_NI @ weight_OI.to(x_NI.dtype).t()).mul_(scale_O1.t().to(x_NI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):
        weight_OI, scale_O1 = ctx.saved_tensors
        if not ctx.in_float8:
            return (grad_NO * scale_O1.t().to(grad_NO.dtype)) @ weight_OI.to(grad_NO.dtype), None, None, None
        # float8 products want their second matrix column by column.
        by_columns_OI = weight_OI.t().contiguous().t()
        ones_1I = scale_O1.new_ones(1, weight_OI.shape[1])
        scaled_NO = grad_NO.float() * scale_O1.t()
        return _product(scaled_NO, by_columns_OI, ones_1I, grad_NO.dtype, fast=False), None, None, None


def _product(
    a_NK: torch.Tensor, b_KM: torch.Tensor, scale_1M: torch.Tensor, dtype: torch.dtype, *, fast: bool
) -> torch.Tensor:
    """``a @ (b * scale)`` with ``a`` rounded to e4m3, in ``dtype``."""
    a8_NK, scale_N1 = to_float8(a_NK)
    # GPUs scale by rows with bfloat16 results only.
    computed = torch.bfloat16 if a_NK.is_cuda else dtype
    y_NM = F.scaled_mm(
        a8_NK, b_KM, scale_N1, ROWS, scale_1M.contiguous(), ROWS, output_dtype=computed, use_fast_accum=fast
    )
    return y_NM.to(dtype)


def frozen_linear(
    x: torch.Tensor, weight_OI: torch.Tensor, scale_O1: torch.Tensor, bias_O: torch.Tensor | None, mode: Mode
) -> torch.Tensor:
    """``F.linear(x, scale * weight, bias)`` for frozen float8 weights; differentiable with respect to x (..., I)."""
    y_NO = _FrozenProduct.apply(x.reshape(-1, x.shape[-1]), weight_OI, scale_O1, mode == "products")
    y = y_NO.view(*x.shape[:-1], y_NO.shape[-1])
    return y if bias_O is None else y + bias_O


class Float8Linear(Linear):
    """A frozen linear layer: ``weight`` (O, I) in e4m3, ``weight_scale`` (O, 1) in float32, a bias as it was."""

    weight: nn.Parameter
    _sharding_config: Any  # torchtitan's, set by its build

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        mode: Mode = "weights"

    def __init__(self, config: Config):
        super().__init__(config)
        self.mode = config.mode
        self.weight = nn.Parameter(self.weight.detach().to(E4M3), requires_grad=False)
        scale_O1 = torch.ones(self.out_features, 1, dtype=torch.float32, device=self.weight.device)
        self.weight_scale = nn.Parameter(scale_O1, requires_grad=False)

    def parallelize(self, parallel_dims) -> None:
        """Rows of the scale go where the rows of the weight go."""
        config = self._sharding_config
        if config is not None:
            weight, by_rows = config.state_shardings["weight"], dense_param_placement(tp=spmd.S(0))
            scale = by_rows if weight == by_rows else dense_param_placement(tp=spmd.R)
            self._sharding_config = replace(config, state_shardings={**config.state_shardings, SCALE: scale})
        super().parallelize(parallel_dims)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.weight, DTensor):
            return frozen_linear(input, self.weight, self.weight_scale, self.bias, self.mode)
        # Tensor parallelism: outputs are split and every rank has a part of the input's gradient, or inputs are split
        # and every rank has a part of the output.
        assert isinstance(input, DTensor)
        part, features = [Partial()], [Shard(input.ndim - 1)]
        by_rows = self.weight.placements[0] == Shard(0)
        own = input.to_local(grad_placements=part if by_rows else features)
        bias_O = None if self.bias is None else local(self.bias)
        output = frozen_linear(own, local(self.weight), local(self.weight_scale), bias_O, self.mode)
        return DTensor.from_local(output, self.weight.device_mesh, features if by_rows else part, run_check=False)


def to_float8_layers(trunk: Decoder.Config, mode: Mode) -> Decoder.Config:
    """``trunk`` with the linear layers of its decoder layers in float8; table, norms and lm_head stay as they are."""
    for layer in trunk.layers:
        for _, linear, parent, name in list(layer.traverse(Linear.Config)):
            same = {field.name: getattr(linear, field.name) for field in fields(linear)}
            setattr(parent, name, Float8Linear.Config(**same, mode=mode))
    return trunk
