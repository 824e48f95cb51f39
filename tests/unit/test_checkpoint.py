"""Checkpoint directories: what counts, what is damaged, what is deleted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from sgt_titan import checkpoint
from sgt_titan.errors import UserError
from sgt_titan.export import resolve_checkpoint


def write(output_dir, step, *, committed=True):
    path = checkpoint.step_dir(output_dir, step)
    path.mkdir(parents=True)
    save_file({"sgt.w": torch.arange(64.0) + step}, path / "shard-00001-model-00001-of-00001.safetensors")
    (path / checkpoint.STATE).write_text(json.dumps({"step": step}))
    (path / checkpoint.CONFIG).write_text("run: {}\n")
    if committed:
        checkpoint.commit(path, checkpoint.describe_files(path.iterdir()))
    return path


def steps(output_dir) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_steps(output_dir)]


@pytest.mark.parametrize(
    "name",
    ["old_step-00000099", "step-00000099.tmp", "old_step-99.tmp", "step-99", "step-000000099", "step-0000009x", "tb",
     "step-00000099\n"],
)  # fmt: skip
def test_only_exact_names_are_checkpoints(tmp_path, name):
    write(tmp_path, 5)
    (tmp_path / checkpoint.FOLDER / name).mkdir()
    (tmp_path / checkpoint.FOLDER / name / checkpoint.MARKER).write_text('{"files": {}}')
    assert steps(tmp_path) == [5]
    assert checkpoint.step_of(checkpoint.latest_committed(tmp_path)) == 5


def test_newest_first_by_number():
    assert checkpoint.step_dir("out", 7).name == "step-00000007"
    assert checkpoint.step_of(checkpoint.step_dir("out", 12_345_678)) == 12_345_678


def test_a_directory_counts_only_with_its_marker(tmp_path):
    assert checkpoint.latest_committed(tmp_path) is None
    write(tmp_path, 100)
    newest = write(tmp_path, 200, committed=False)
    assert steps(tmp_path) == [200, 100]
    assert checkpoint.latest_committed(tmp_path).name == "step-00000100"
    checkpoint.commit(newest, checkpoint.describe_files(newest.iterdir()))
    assert checkpoint.latest_committed(tmp_path) == newest
    assert not list(newest.glob("*.tmp"))
    assert checkpoint.problems(newest) == []


def test_damage_is_named(tmp_path):
    def damaged(step, act):
        path = write(tmp_path, step)
        file = next(path.glob("*.safetensors"))
        act(file)
        return [line.replace(str(path) + "/", "") for line in checkpoint.problems(path)]

    def flip(file):
        content = bytearray(file.read_bytes())
        content[-10] ^= 1
        file.write_bytes(content)

    name = "shard-00001-model-00001-of-00001.safetensors"
    assert damaged(1, lambda f: f.unlink()) == [f"{name}: missing"]
    size = next(write(tmp_path, 2).glob("*.safetensors")).stat().st_size
    truncated = damaged(3, lambda f: f.write_bytes(f.read_bytes()[:-1]))
    assert truncated == [f"{name}: {size - 1} bytes, committed with {size}"]
    assert damaged(4, flip) == [f"{name}: checksum differs from the one it was committed with"]
    assert damaged(5, lambda f: (f.parent / checkpoint.STATE).write_text("{}")) == [
        f"{checkpoint.STATE}: 2 bytes, committed with 11"
    ]
    texts = "not json", "[]", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 1}}'
    for step, text in enumerate(texts, start=6):
        marker = damaged(step, lambda f, text=text: (f.parent / checkpoint.MARKER).write_text(text))
        assert len(marker) == 1 and marker[0].startswith("COMMITTED: unreadable")


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_ranks_together_check_every_file(tmp_path, parts):
    path = write(tmp_path, 1)
    for file in path.iterdir():
        if file.name != checkpoint.MARKER:
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
    found = [line for part in range(parts) for line in checkpoint.problems(path, part=part, parts=parts)]
    assert len(found) == len(set(found)) == 3


def test_export_of_a_damaged_or_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no committed checkpoint; give an output directory"):
        resolve_checkpoint(tmp_path)
    path = write(tmp_path, 9)
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(path) == path
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"safetensors: missing; export another step of"):
        resolve_checkpoint(path)


def test_prune_keeps_the_newest_committed(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    write(tmp_path, 25, committed=False)  # abandoned: a newer one is complete
    write(tmp_path, 50, committed=False)  # may be being written
    assert [checkpoint.step_of(path) for path in checkpoint.prune(tmp_path, 2)] == [20, 10]
    assert steps(tmp_path) == [50, 40, 30]
    assert checkpoint.prune(tmp_path, 0) == []
    assert steps(tmp_path) == [50, 40, 30]
    assert checkpoint.prune(tmp_path, 9) == []


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path):
    """Gone on from 10 because the two after it are damaged, with fewer to keep, a step at a time."""
    for step in (10, 11, 12, 20, 30):
        write(tmp_path, step)
    damaged = {checkpoint.step_dir(tmp_path, step) for step in (20, 30)}
    assert [checkpoint.step_of(path) for path in checkpoint.prune(tmp_path, 2, damaged=damaged)] == [10]
    assert steps(tmp_path) == [30, 20, 12, 11]


def test_prune_without_a_committed_one_deletes_nothing(tmp_path):
    for step in (10, 20):
        write(tmp_path, step, committed=False)
    assert checkpoint.prune(tmp_path, 1) == []
    assert steps(tmp_path) == [20, 10]


def test_pieces_of_several_ranks_become_whole_tensors(tmp_path):
    """FSDP shards rows, TP columns: pieces come with their offsets, in any order, unevenly."""
    whole = torch.randn(5, 6)
    places = {0: (slice(3, 5), slice(0, 6)), 1: (slice(0, 3), slice(4, 6)), 2: (slice(0, 3), slice(0, 4))}
    for rank, place in places.items():
        offsets = [s.start for s in place]
        save_file(
            {"sgt.w": whole[place].contiguous(), "optimizer.m": torch.ones(1)},
            tmp_path / f"shard-{rank}.safetensors",
            metadata={CUSTOM_METADATA_KEY: json.dumps({"sgt.w": {SAVED_OFFSETS_KEY: offsets}})},
        )
    read = checkpoint.read_tensors(tmp_path, "sgt.")
    assert list(read) == ["w"]
    assert torch.equal(read["w"], whole)
