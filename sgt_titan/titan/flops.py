"""The work of an SGT step, counted from shapes.

Per token and trunk parameter in a matrix product: teacher forward 2, student forward 2, activation backward 2;
frozen weights need no weight gradient. The estimator is trained like any model: 6. Full recomputation repeats the
forward of the student's and the estimator's layers: 2 more of these. Attention's quadratic part is left out, as in the
"6N" convention.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .float8 import SCALE


def matmul_parameters(module: nn.Module) -> int:
    """Parameters that multiply every token: all but embedding tables; of experts, the share a token visits."""
    total = 0
    for name, child in module.named_modules():
        own = sum(p.numel() for n, p in child.named_parameters(recurse=False) if n != SCALE)
        if isinstance(child, nn.Embedding):
            continue
        if type(child).__name__ == "GroupedExperts":
            moe: Any = module.get_submodule(name.rsplit(".routed_experts", 1)[0])
            own = own * moe.router.top_k // child.num_experts
        total += own
    return total


def model_flops_per_token(model) -> int:
    """6 N + 6 N_sgt: what MFU counts."""
    return 6 * matmul_parameters(model.trunk) + 6 * matmul_parameters(model.estimator)


def hardware_flops_per_token(model, *, full_recompute: bool) -> int:
    """What HFU counts: MFU's work and recomputation."""
    layers = (model.trunk.layers, *(body.layers for body in model.estimator.every_body()))
    return model_flops_per_token(model) + (2 * sum(map(matmul_parameters, layers)) if full_recompute else 0)
