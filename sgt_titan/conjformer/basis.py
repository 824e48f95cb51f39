"""The secret basis of every space of a model (``families.py``), applied to tensors in float64 or float32.

Legend: D width, H query heads, K KV heads, h head dimension, F units of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cached_property, lru_cache

import torch

from sgt_titan.conjformer.families import Family, Sizes, Space
from sgt_titan.conjformer.secret import Secret


class Basis:
    """``change(space, layer, x)`` multiplies the first dimension of x by the space's matrix L, ``dual`` by L^-T.

    free_planes(layer): bool (h/2,), RoPE planes that may turn by any angle; the others only by half a turn, which any
    gain of a QK norm commutes with. symmetries: names of ``families.SYMMETRIES``.
    """

    def __init__(
        self,
        secret: Secret,
        family: Family,
        sizes: Sizes,
        free_planes: Callable[[int], torch.Tensor],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        symmetries: Collection[str] = (),
    ):
        self.secret, self.family, self.sizes, self.free_planes = secret, family, sizes, free_planes
        self.dtype, self.device, self.symmetries = dtype, device, frozenset(symmetries)
        # One layer at a time is in memory.
        self._query, self._value, self._unit = map(lru_cache(maxsize=1), (self.query, self.value, self.unit))

    @cached_property
    def residual_DD(self) -> torch.Tensor:
        """U. For a LayerNorm it keeps the direction of all ones, in which the stream is zero: centring is no-op."""
        return residual_matrix(self.secret, self.sizes.width, centred=self.family.centred).to(self.device, self.dtype)

    def change(self, space: Space, layer: int | None, x: torch.Tensor, *, dual: bool = False) -> torch.Tensor:
        x = x.to(self.device, self.dtype)
        if space == "residual":
            return self.residual_DD @ x
        assert layer is not None
        if space in ("unit", "scaled"):
            order_F, scale_F = self._unit(layer)
            if space == "scaled":
                x = (x.T * (1 / scale_F if dual else scale_F)).T
            return x[order_F]
        plain_Khh, dual_Khh = self._value(layer) if space in ("value", "heads") else self._query(layer)
        matrices_Khh = dual_Khh if dual else plain_Khh
        groups = self.sizes.heads // self.sizes.kv_heads if space in ("query", "heads") else 1
        matrices_Hhh = matrices_Khh.repeat_interleave(groups, 0)
        turned = matrices_Hhh @ x.reshape(len(matrices_Hhh), self.sizes.head, -1)
        return turned[self.order(layer, groups)].reshape(x.shape)

    def query(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """O of a layer, a matrix per KV head, and its inverse transpose."""
        K, h = self.sizes.kv_heads, self.sizes.head
        if not self.family.rope:
            return self._invertible(f"{layer}.query", "queries" in self.symmetries)
        turn_KP = 2 * math.pi * self.secret.uniform(f"{layer}.query", K * h // 2).reshape(K, h // 2)
        half_KP = math.pi * (turn_KP >= math.pi).double()
        turn_KP = torch.where(self.free_planes(layer), turn_KP, half_KP)
        cos_KPP, sin_KPP = turn_KP.cos().diag_embed(), turn_KP.sin().diag_embed()
        rows = torch.cat([cos_KPP, -sin_KPP], -1), torch.cat([sin_KPP, cos_KPP], -1)
        turn_Khh = torch.cat(rows, -2).to(self.device, self.dtype)
        if "queries" not in self.symmetries:
            return turn_Khh, turn_Khh
        scale_Kh = self._scales(f"{layer}.query.scale", K * h // 2).reshape(K, h // 2).repeat(1, 2)
        return turn_Khh * scale_Kh[:, None], turn_Khh / scale_Kh[:, None]

    def value(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A of a layer, a matrix per KV head, and its inverse transpose."""
        return self._invertible(f"{layer}.value", "values" in self.symmetries)

    def unit(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """P of a layer, (F,) int64, and D in the order before it, (F,)."""
        F = self.sizes.units
        order_F = self.secret.permutation(f"{layer}.unit", F).to(self.device)
        if "units" not in self.symmetries:
            return order_F, torch.ones(F, dtype=self.dtype, device=self.device)
        sign_F = (self.secret.uniform(f"{layer}.unit.sign", F) < 0.5).to(self.device, self.dtype) * 2 - 1
        return order_F, sign_F * self._scales(f"{layer}.unit.scale", F)

    def order(self, layer: int, groups: int) -> torch.Tensor:
        """Heads in a new order: groups that share keys and values, and the queries of each among themselves."""
        K = self.sizes.kv_heads
        order_K = torch.arange(K)
        within_KG = torch.arange(groups).expand(K, groups)
        if "heads" in self.symmetries:
            order_K = self.secret.permutation(f"{layer}.heads", K)
            within_KG = self.secret.uniform(f"{layer}.heads.within.{groups}", K * groups).reshape(K, groups).argsort(-1)
        return (order_K[:, None] * groups + within_KG[order_K]).flatten().to(self.device)

    def _invertible(self, label: str, free: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrix per KV head and its inverse transpose: orthogonal, or if ``free`` with singular values in 1/2 to 2,
        so that little is lost to rounding."""
        K, h = self.sizes.kv_heads, self.sizes.head
        left_Khh = self.secret.orthogonal(label, h, K).to(self.device, self.dtype)
        if not free:
            return left_Khh, left_Khh
        right_Khh = self.secret.orthogonal(f"{label}.right", h, K).to(self.device, self.dtype)
        scale_K1h = self._scales(f"{label}.scale", K * h).reshape(K, 1, h)
        return (left_Khh * scale_K1h) @ right_Khh, (left_Khh / scale_K1h) @ right_Khh

    def _scales(self, label: str, count: int) -> torch.Tensor:
        """Log-uniform in 1/2 to 2."""
        return (2 ** (2 * self.secret.uniform(label, count) - 1)).to(self.device, self.dtype)


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
