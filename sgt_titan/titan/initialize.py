"""Initial weights of the estimator, the same whatever the sharding.

Each tensor is drawn whole from a generator seeded by (run seed, name), and each rank keeps its part: sharded random
operators would make a run's beginning depend on its number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger

from sgt_titan.data.order import hash64
from sgt_titan.transform.trunk_files import TrunkFiles

from .body import Body
from .estimator import Estimator
from .load_trunk import Tally, load_trunk, local_region, named_weights
from .trunks import Family

BODY_STD = 0.02  # of matrices, as Llama, Qwen and DeepSeek are initialised


@torch.no_grad()
def initialize_estimator(estimator: Estimator, seed: int, log_frequency_V: torch.Tensor | None = None) -> None:
    """Zero heads (the identity plus ``std_init`` noise; a denoiser that changes nothing), unit norms, normal matrices.

    log_frequency_V: of the data's tokens, for a prior that has any.
    """
    for name, tensor in named_weights(estimator).items():
        local, region = local_region(tensor)
        if name.startswith("prior.") and "body." not in name:
            local.copy_(prior_values(name.removeprefix("prior."), tensor, seed, log_frequency_V)[region])
        elif name.endswith("bias") or "head." in name or "mark." in name:
            local.zero_()
        elif tensor.dim() == 1:
            local.fill_(1.0)
        else:
            local.copy_(_normal(name, tensor.shape, seed)[region])


def prior_values(name: str, like: torch.Tensor, seed: int, log_frequency_V: torch.Tensor | None) -> torch.Tensor:
    """A prior's beginning: half broad, half tokens at their own embeddings with 0.3 of the table's std; a context whose
    logits are the frequencies.
    """
    if name == "log_frequency":
        if log_frequency_V is None:
            raise ValueError("a prior that has token frequencies needs the data's")
        return log_frequency_V
    if name == "down":
        return _normal(name, like.shape, seed)
    return torch.full(like.shape, {"logit": 0.0, "gain": 1.0, "shift": 0.0, "log_std": math.log(0.3), "up": 0.0}[name])


def _normal(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash64("estimator", seed, name) >> 1)
    return torch.empty(shape).normal_(std=BODY_STD, generator=generator)


def initialize_from_trunk(
    bodies: Sequence[Body],
    what: str,
    family: Family,
    files: TrunkFiles,
    replicas: dist.ProcessGroup | None = None,
) -> Tally:
    """The trunk's first layers and final norm as every body's initial weights; ``replicas`` as for ``load_trunk``.

    Raises:
        UserError: the trunk's first layers are of another kind (experts), so a tensor is missing.
    """
    tally = Tally()
    for body in bodies:
        tally += load_trunk(body, family, files, replicas)
    logger.info(f"{what} starts from the trunk's first {len(bodies[0].layers)} layers")
    return tally
