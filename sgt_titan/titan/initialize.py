"""Initial weights of the estimator, the same whatever the sharding.

Each tensor is drawn whole from a generator seeded by (run seed, name), and each rank keeps its part: sharded random
operators would make a run's beginning depend on its number of ranks.
"""

from __future__ import annotations

import torch
from torchtitan.tools.logging import logger

from sgt_titan.data.order import hash64
from sgt_titan.transform.trunk_files import TrunkFiles

from .load_trunk import load_trunk, local_region, named_weights
from .model import Estimator
from .trunks import Family

BODY_STD = 0.02  # of matrices, as Llama, Qwen and DeepSeek are initialised


@torch.no_grad()
def initialize_estimator(estimator: Estimator, seed: int) -> None:
    """Zero heads (the identity plus ``std_init`` noise), unit norms, normal matrices."""
    for name, tensor in named_weights(estimator).items():
        local, region = local_region(tensor)
        if name.endswith("bias") or "_head." in name:
            local.zero_()
        elif tensor.dim() == 1:
            local.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(hash64("estimator", seed, name) >> 1)
            whole = torch.empty(tensor.shape).normal_(std=BODY_STD, generator=generator)
            local.copy_(whole[region])


def initialize_from_trunk(estimator: Estimator, family: Family, files: TrunkFiles) -> None:
    """The trunk's first layers and final norm as every body's initial weights.

    Raises:
        UserError: the trunk's first layers are of another kind (experts), so a tensor is missing.
    """
    for body in estimator.bodies:
        load_trunk(body, family, files)
    logger.info(f"Estimator bodies start from the trunk's first {len(estimator.bodies[0].layers)} layers")
