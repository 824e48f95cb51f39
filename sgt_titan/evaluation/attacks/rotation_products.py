"""What no secret of a rotated trunk changes but U: matrices M with M' = U M U^T, from the weights alone.

Legend: D width, H query heads, K KV heads, h head dimension, F units of an MLP.
"""

from __future__ import annotations

import torch

from sgt_titan.conjformer.convert import Conversion

Kinds = dict[str, list[torch.Tensor]]
"""By kind, a (D, D) of every layer; comparable between two models: of norm 1, without what fits every rotation."""


def products(c: Conversion) -> Kinds:
    """Products between weights, in which every symmetry of ``conjformer/families.py`` cancels:

    gate^T gate (units are permuted and cannot be scaled in front of their nonlinearity; without a gate also what is
    behind it), Wo Wv and Wq^T Wk summed over heads (the second is the score of two tokens at one place), Wdown Wup.
    """
    found: Kinds = {}
    for layer in range(c.sizes.layers):
        w = sides(c, layer)
        made = {
            "unit": w["unit"].T @ w["unit"],
            "value": w["heads>"] @ _repeated(c, w["value"]),
            "score": w["query"].T @ _repeated(c, w["key"]),
            "down": w["scaled>"] @ w["scaled"] if "scaled" in w else w["unit>"] @ w["unit>"].T,
        }
        for kind, product_DD in made.items():
            found.setdefault(kind, []).append(_comparable(product_DD))
    return found


def grams(c: Conversion) -> Kinds:
    """Every weight's own Gram matrix on the side of the stream: what is left where no symmetry but rotations was
    used."""
    found: Kinds = {}
    for layer in range(c.sizes.layers):
        for name, weight in sides(c, layer).items():
            gram_DD = weight @ weight.T if name.endswith(">") else weight.T @ weight
            found.setdefault(name, []).append(_comparable(gram_DD))
    return found


def sides(c: Conversion, layer: int) -> dict[str, torch.Tensor]:
    """A layer's weights (out, in) by the space they write; those that write the stream by the one they read and ">".

    Several in one tensor come apart. Gains are folded in as the conversion does, and so is a LayerNorm's centring.
    """
    found = {}
    for module, rule in c.family.linears.items():
        weight = c.linear(layer, module)
        if rule.out == ("residual",):
            found[f"{rule.reads}>"] = weight - weight.mean(0, keepdim=True) if c.family.centred else weight
            continue
        for space, part in zip(rule.out, weight.split(c.widths(rule), 0), strict=True):
            found[space] = part
    return found


def gate_rows(c: Conversion, layer: int) -> torch.Tensor:
    """(F, D): permuted by the secret and turned by U, nothing else."""
    return sides(c, layer)["unit"]


def _repeated(c: Conversion, weight: torch.Tensor) -> torch.Tensor:
    """(K h, D) of keys or values for the queries that use them, (H h, D)."""
    heads_KhD = weight.unflatten(0, (c.sizes.kv_heads, c.sizes.head))
    return heads_KhD.repeat_interleave(c.sizes.heads // c.sizes.kv_heads, 0).flatten(0, 1)


def _comparable(matrix_DD: torch.Tensor) -> torch.Tensor:
    eye_DD = torch.eye(len(matrix_DD), dtype=matrix_DD.dtype, device=matrix_DD.device)
    rest_DD = matrix_DD - matrix_DD.trace() / len(matrix_DD) * eye_DD
    return rest_DD / rest_DD.norm().clamp_min(1e-30)
