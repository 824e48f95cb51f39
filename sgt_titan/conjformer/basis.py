"""The secret basis of every space of a model (``families.py``), applied to tensors in float64 or float32.

Legend: D width, H query heads, K KV heads, h head dimension, F units of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache

import torch

from sgt_titan.conjformer.families import Family, Sizes, Space
from sgt_titan.conjformer.secret import Secret


class Basis:
    """``change(space, layer, x)`` multiplies the first dimension of x by the space's matrix.

    free_planes(layer): bool (h/2,), RoPE planes that may turn by any angle; the others only by half a turn, which any
    gain of a QK norm commutes with.
    """

    def __init__(
        self,
        secret: Secret,
        family: Family,
        sizes: Sizes,
        free_planes: Callable[[int], torch.Tensor],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ):
        self.secret, self.family, self.sizes, self.free_planes = secret, family, sizes, free_planes
        self.dtype, self.device = dtype, device
        # One layer at a time is in memory.
        self._query, self._value, self._unit = map(lru_cache(maxsize=1), (self.query, self.value, self.unit))

    @cached_property
    def residual_DD(self) -> torch.Tensor:
        """U. For a LayerNorm it keeps the direction of all ones, in which the stream is zero: centring is no-op."""
        return residual_matrix(self.secret, self.sizes.width, centred=self.family.centred).to(self.device, self.dtype)

    def change(self, space: Space, layer: int | None, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.device, self.dtype)
        if space == "residual":
            return self.residual_DD @ x
        assert layer is not None
        if space == "unit":
            return x[self._unit(layer)]
        matrices_Khh = self._value(layer) if space in ("value", "heads") else self._query(layer)
        if space in ("query", "heads"):
            matrices_Khh = matrices_Khh.repeat_interleave(self.sizes.heads // self.sizes.kv_heads, 0)
        heads = matrices_Khh.shape[0]
        return (matrices_Khh @ x.reshape(heads, self.sizes.head, -1)).reshape(x.shape)

    def query(self, layer: int) -> torch.Tensor:
        """O of a layer, a matrix per KV head."""
        K, h = self.sizes.kv_heads, self.sizes.head
        if not self.family.rope:
            return self.secret.orthogonal(f"{layer}.query", h, K).to(self.device, self.dtype)
        turn_KP = 2 * math.pi * self.secret.uniform(f"{layer}.query", K * h // 2).reshape(K, h // 2)
        half_KP = math.pi * (turn_KP >= math.pi).double()
        turn_KP = torch.where(self.free_planes(layer), turn_KP, half_KP)
        cos_KPP, sin_KPP = turn_KP.cos().diag_embed(), turn_KP.sin().diag_embed()
        rows = torch.cat([cos_KPP, -sin_KPP], -1), torch.cat([sin_KPP, cos_KPP], -1)
        return torch.cat(rows, -2).to(self.device, self.dtype)

    def value(self, layer: int) -> torch.Tensor:
        """R of a layer, a matrix per KV head."""
        found = self.secret.orthogonal(f"{layer}.value", self.sizes.head, self.sizes.kv_heads)
        return found.to(self.device, self.dtype)

    def unit(self, layer: int) -> torch.Tensor:
        """P of a layer."""
        return self.secret.permutation(f"{layer}.unit", self.sizes.units).to(self.device)


def residual_matrix(secret: Secret, width: int, *, centred: bool) -> torch.Tensor:
    """U, (D, D) float64: Haar, or for a LayerNorm Haar among those that keep the vector of all ones."""
    if not centred:
        return secret.orthogonal("residual", width)
    # A reflection that takes the first axis to the direction of all ones, around a rotation of the others.
    v_D = torch.full((width,), width**-0.5, dtype=torch.float64)
    v_D[0] -= 1
    mirror_DD = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(v_D, v_D) / v_D.square().sum()
    inner_DD = torch.eye(width, dtype=torch.float64)
    inner_DD[1:, 1:] = secret.orthogonal("residual", width - 1)
    return mirror_DD @ inner_DD @ mirror_DD
