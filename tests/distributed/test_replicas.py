"""The trunk, read once for all replicas: every rank holds the bits that it would have read itself, and a transfer or a
reader that fails ends all ranks with one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

HSDP = ("--parallelism.data_parallel_replicate_degree", "2", "--training.steps", "1", "--metrics.probe_every", "0")
FROM_TRUNK = ("--estimator.init_from_trunk", "true", "--denoiser.init_from_trunk", "true")
LAYOUTS = {
    "hsdp 2x2": (4, ("--training.local_batch_size", "1", *FROM_TRUNK)),
    "two copies, float8": (2, ("--training.local_batch_size", "2", "--trunk.float8", "weights")),
}
PIECE = 10_000  # bytes: most matrices of the small trunk are in several pieces


def small_pieces(rank: int, folder: Path) -> None:
    from sgt_titan.titan import load_trunk

    load_trunk.PIECE_BYTES = PIECE


def compare_with_reading(rank: int, folder: Path) -> None:
    """Write loads-RANK.jsonl: for each load, bytes read and received, and the tensors whose bits are not the files'."""
    import torch

    from sgt_titan.titan import initialize, load_trunk, trainer

    original = load_trunk.load_trunk

    def load(trunk, family, files, replicas=None):
        tally = original(trunk, family, files, replicas)
        weights = {n: load_trunk.local_region(t.detach())[0] for n, t in load_trunk.named_weights(trunk).items()}
        received = {name: local.clone() for name, local in weights.items()}
        alone = original(trunk, family, files)
        bits = {name: local.view(torch.uint8) for name, local in weights.items()}
        differ = [name for name, local in bits.items() if not torch.equal(local, received[name].view(torch.uint8))]
        held = sum(local.nbytes for local in weights.values())
        line = {"read": tally.read, "received": tally.received, "alone": alone.read, "held": held, "differ": differ}
        with (folder / f"loads-{rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        return tally

    initialize.load_trunk = trainer.load_trunk = load


def loads(run, ranks: int) -> list[list[dict]]:
    return [
        [json.loads(line) for line in (run.folder / f"loads-{rank}.jsonl").read_text().splitlines()]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_received_is_what_would_have_been_read(layout, small):
    ranks, options = LAYOUTS[layout]
    run = small.finish(ranks, *HSDP, *options, hooks=(small_pieces, compare_with_reading))
    found = loads(run, ranks)
    assert len(found[0]) == (3 if "hsdp" in layout else 1)  # trunk, estimator, denoiser
    for same_load in zip(*found, strict=True):
        assert all(load["differ"] == [] for load in same_load)
        # All ranks together read each byte once for the two replicas, each rank about half of what it holds.
        assert sum(load["read"] for load in same_load) * 2 == sum(load["alone"] for load in same_load)
        assert all(0.3 < load["read"] / load["alone"] < 0.7 for load in same_load)
        assert all(0.2 < load["received"] / load["held"] < 0.7 for load in same_load)
    assert "sent between 2 replicas and checked" in run.outcome.output[0]


def test_each_replica_may_read_its_own(small):
    run = small.finish(
        2, *HSDP, "--training.local_batch_size", "2", "--trunk.read", "each", hooks=(compare_with_reading,)
    )
    (one,), (other,) = loads(run, 2)
    assert one["read"] == other["read"] == one["alone"] and one["received"] == other["received"] == 0
    assert (
        "read from storage by 2 ranks" in run.outcome.output[0] and "replicas and checked" not in run.outcome.output[0]
    )


def flip_a_bit(rank: int, folder: Path) -> None:
    """The third piece that rank 3 receives has one bit that was not sent."""
    import torch.distributed as dist

    from sgt_titan.titan import replicas

    send, seen = replicas._send, []

    def corrupted(piece, reader, group):
        send(piece, reader, group)
        if rank == 3 and reader != dist.get_rank():
            seen.append(piece)
            if len(seen) == 3:
                piece.parts[0].view(-1).view(replicas.torch.uint8)[5] ^= 16

    replicas._send = corrupted


def fail_to_read(rank: int, folder: Path) -> None:
    """Rank 2's file server goes away."""
    from sgt_titan.transform.trunk_files import TrunkFiles

    read = TrunkFiles.read

    def failing(self, name, region=None):
        if rank == 2 and name.startswith("model.layers.1."):
            raise OSError(5, "Input/output error")
        return read(self, name, region)

    TrunkFiles.read = failing


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (flip_a_bit, r"rank 3 on \S+: received \S+ from rank \d with other bytes than that rank had read"),
        (
            fail_to_read,
            r"rank 2 on \S+: model\.layers\.1\.\S+ could not be read: OSError: \[Errno 5\] Input/output error",
        ),
    ],
)
def test_one_that_fails_ends_all_with_one_line(fault, line, small):
    _, outcome = small.run(4, *HSDP, "--training.local_batch_size", "1", hooks=(small_pieces, fault))
    assert outcome.codes == [2] * 4, outcome.errors
    said = [text for text in outcome.errors[0].splitlines() if text.startswith("sgt-titan: error: ")]
    assert len(said) == 1 and re.search(line, said[0]), said
    assert "Traceback" not in outcome.errors[0]
