"""Files of at most a size, in order, and nothing computed before its file is written."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sgt_titan.transform.shards import Planned, plan_shards, write_shards
from sgt_titan.trunk.files import INDEX, SINGLE, read_entries

SIZES = [4, 4, 16, 1, 2, 3]  # of float32


def planned(made: list[int]) -> list[Planned]:
    def make(i):
        made.append(i)
        return torch.full((SIZES[i],), float(i), dtype=torch.float64)

    return [Planned(f"t{i}", (n,), torch.float32, lambda i=i: make(i)) for i, n in enumerate(SIZES)]


@pytest.mark.parametrize(("limit", "expected"), [(1, [1] * 6), (32, [2, 1, 3]), (16, [1, 1, 1, 2, 1]), (4000, [6])])
def test_shards_hold_at_most_their_size_or_one_tensor(limit, expected):
    shards = plan_shards(planned([]), limit)
    assert [len(shard) for shard in shards] == expected
    assert [p.name for shard in shards for p in shard] == [f"t{i}" for i in range(len(SIZES))]
    assert all(len(shard) == 1 or sum(p.bytes for p in shard) <= limit for shard in shards)


def test_what_is_written_is_a_checkpoint(tmp_path):
    made: list[int] = []
    told = []
    write_shards(planned(made), tmp_path, 32, lambda *file: told.append((*file, list(made))))
    assert [(i, n) for i, n, *_ in told] == [(1, 3), (2, 3), (3, 3)] and [len(m) for *_, m in told] == [2, 3, 6]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 4 * sum(SIZES)
    assert sorted(read_entries(tmp_path)) == [f"t{i}" for i in range(6)]
    assert torch.equal(load_file(tmp_path / told[1][2])["t2"], torch.full((16,), 2.0))


def test_one_file_needs_no_index(tmp_path):
    write_shards(planned([]), tmp_path, 4000)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE] and len(read_entries(tmp_path)) == 6
