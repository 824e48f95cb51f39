"""How many ranks share the work, and whether that goes up. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError


def dp_degree(config: Config, world_size: int) -> int:
    """Number of data-parallel ranks (replicas times shards), each with its own rows.

    Raises:
        UserError: the degrees do not multiply to the world size.
    """
    for message in degree_problems(config, world_size):
        raise UserError(message)
    return world_size // config.parallelism.tensor_parallel_degree


def degree_problems(config: Config, world_size: int) -> Iterator[str]:
    """What is wrong with the degrees on so many processes."""
    p = config.parallelism
    replicate, shard, tp = p.data_parallel_replicate_degree, p.data_parallel_shard_degree, p.tensor_parallel_degree
    if min(tp, p.expert_parallel_degree) < 1 or any(d < 1 and d != -1 for d in (replicate, shard)):
        yield f"parallelism: degrees must be positive, got replicate {replicate}, shard {shard}, tensor {tp}"
        return
    if replicate == shard == -1:
        yield "parallelism: data_parallel_replicate_degree and data_parallel_shard_degree are both -1; say one of them"
        return
    given = {"replicate": replicate, "shard": shard, "tensor": tp}
    said = " x ".join(f"{name} {degree}" for name, degree in given.items() if degree != -1)
    product = math.prod(degree for degree in given.values() if degree != -1)
    if world_size % product if -1 in given.values() else product != world_size:
        does = "does not divide the world size" if -1 in given.values() else "but the world size is"
        yield f"parallelism: {said} = {product}{',' if does.startswith('but') else ''} {does} {world_size}"
        return
    shard = world_size // product if shard == -1 else shard
    if (shard * tp) % p.expert_parallel_degree:
        yield (
            f"parallelism.expert_parallel_degree {p.expert_parallel_degree} does not divide shard {shard} x tensor "
            f"{tp} = {shard * tp}"
        )


def pair_groups_fit(config: Config, dp: int) -> bool:
    """Whether groups of ``objective.mi_group`` rows tile a microbatch of ``dp`` ranks, each in or of whole ranks."""
    return tile(config.objective.mi_group, config.training.local_batch_size, dp)


def tile(group: int, local: int, dp: int) -> bool:
    """``pair_groups_fit`` of a group's size, rows a rank and ranks."""
    return local * dp % group == 0 and (group % local == 0 or local % group == 0)
