"""A loss or gradient of one rank that is not finite: skipped by all, counted, never saved, and not for ever."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import launch
from sgt_titan import checkpoint

pytestmark = pytest.mark.distributed

# Two whole copies of the weights, so that a copy that took a step alone would show.
REPLICAS = (
    *("--parallelism.data_parallel_replicate_degree", "2", "--training.local_batch_size", "2"),
    *("--training.steps", "6", "--checkpoint.interval", "1", "--metrics.probe_every", "0"),
)


def weights(folder: Path, rank: int, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"weights-{rank}-{step}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def no_constant(word: str) -> None:
    """NaN and Infinity are no JSON: other readers than Python's would reject the file."""
    raise AssertionError(word)


def assert_checkpoints_are_finite(output_dir: Path) -> None:
    steps = checkpoint.list_steps(output_dir)
    assert steps
    for path in steps:
        for name, tensor in checkpoint.read_tensors(path).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), (path, name)
        json.loads((path / "state.json").read_text(), parse_constant=no_constant)


def test_one_rank_skips_for_all(small):
    """A NaN gradient at step 3 and an infinite loss with a finite gradient at step 4, both on rank 1 alone."""
    poison = launch.Poison(rank=1, gradient_steps=(3,), value_steps=(4,))
    run = small.finish(2, *REPLICAS, hooks=(poison, launch.record_weights))
    skipped = {step: values["optimizer/skipped_steps"] for step, values in run.scalars.items()}
    assert skipped == {1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 2}
    assert run.outcome.output[0].count("step skipped on all ranks") == 2
    for step in range(1, 7):
        assert same(weights(run.folder, 0, step), weights(run.folder, 1, step)), step
    after = [weights(run.folder, 0, step) for step in range(1, 7)]
    changed = [not same(a, b) for a, b in pairwise(after)]
    assert changed == [True, False, False, True, True]
    assert_checkpoints_are_finite(run.output_dir)


def test_too_many_in_a_row_end_the_run(small):
    poison = launch.Poison(rank=1, gradient_steps=(2, 4, 5, 6))
    folder, outcome = small.run(
        2, *REPLICAS, "--training.max_nonfinite_steps", "2", hooks=(poison, launch.record_weights)
    )
    assert all(code not in (0, 2) for code in outcome.codes)
    assert "2 steps in a row had a non-finite loss or gradient (training.max_nonfinite_steps)" in outcome.errors[0]
    newest = checkpoint.latest_committed(folder / "out")
    assert checkpoint.step_of(newest) == 4  # step 5 was the second in a row
    assert same(weights(folder, 0, 3), weights(folder, 0, 4))
    assert_checkpoints_are_finite(folder / "out")

    again = small.finish(2, *REPLICAS, folder=folder)
    assert f"Resumed from {newest}" in again.outcome.output[0]
    assert_checkpoints_are_finite(folder / "out")
