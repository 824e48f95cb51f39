"""How many ranks share the work."""

import pytest

from sgt_titan.config.degrees import dp_degree
from sgt_titan.config.resolve import resolve
from sgt_titan.errors import UserError
from tests.unit.config.configs import config_of


def test_resolve_leaves_degrees_that_do_not_fit():
    config = resolve(config_of("parallelism.tensor_parallel_degree=3"), world_size=4)
    assert config.parallelism.data_parallel_shard_degree == -1 and config.training.global_batch_size == -1


def test_resolve_hsdp_and_tp():
    words = ("parallelism.data_parallel_replicate_degree=2", "parallelism.tensor_parallel_degree=2")
    config = resolve(config_of(*words), world_size=16)
    assert config.parallelism.data_parallel_shard_degree == 4
    assert dp_degree(config, 16) == 8 and config.training.global_batch_size == 32


def test_an_allocation_decides_how_many_copies_there_are():
    words = ("parallelism.data_parallel_replicate_degree=-1", "parallelism.data_parallel_shard_degree=2")
    degrees = {
        w: resolve(config_of(*words), world_size=w).parallelism.data_parallel_replicate_degree for w in (2, 4, 12)
    }
    assert degrees == {2: 1, 4: 2, 12: 6}
    with pytest.raises(UserError, match="shard 2 x tensor 1 = 2 does not divide the world size 5"):
        dp_degree(config_of(*words), 5)
    with pytest.raises(UserError, match="are both -1"):
        dp_degree(config_of(words[0]), 4)


P = "parallelism"


@pytest.mark.parametrize("replicate", [1, 2, 3])
@pytest.mark.parametrize("shard", [-1, 1, 2])
@pytest.mark.parametrize("tp", [1, 2])
def test_dp_degree(replicate, shard, tp):
    config = config_of(
        f"{P}.data_parallel_replicate_degree={replicate}",
        f"{P}.data_parallel_shard_degree={shard}",
        f"{P}.tensor_parallel_degree={tp}",
    )
    for world in range(1, 13):
        fits = [s for s in range(1, world + 1) if replicate * s * tp == world and shard in (-1, s)]
        if fits:
            assert dp_degree(config, world) == replicate * fits[0]
        else:
            with pytest.raises(UserError, match="world size"):
                dp_degree(config, world)
