"""Being asked to stop, and losing the directory to another attempt."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import launch
from sgt_titan import checkpoint
from sgt_titan.cluster import ownership, status
from sgt_titan.titan.main import EXIT_STOPPED

pytestmark = pytest.mark.distributed

OPTIONS = ("--training.local_batch_size", "2", "--metrics.probe_every", "0", "--run.deterministic", "true")


@dataclass
class SignalAt:
    """One rank alone hears a signal in the middle of a step."""

    rank: int
    step: int
    number: int

    def __call__(self, rank: int, folder: Path) -> None:
        from sgt_titan.titan.trainer import SGTTrainer

        original = SGTTrainer._forward_backward_body

        def body(trainer, *arguments):
            if rank == self.rank and trainer.step == self.step:
                os.kill(os.getpid(), self.number)
            return original(trainer, *arguments)

        SGTTrainer._forward_backward_body = body


@dataclass
class TakeOver:
    """Another attempt writes its name into the directory during a step."""

    step: int

    def __call__(self, rank: int, folder: Path) -> None:
        from sgt_titan.titan.trainer import SGTTrainer

        if rank != 0:
            return
        original = SGTTrainer._forward_backward_body

        def body(trainer, *arguments):
            if trainer.step == self.step:
                (folder / "out" / ownership.FILE).write_text('{"attempt": "slurm-7.1", "host": "elsewhere", "pid": 1}')
            return original(trainer, *arguments)

        SGTTrainer._forward_backward_body = body


@pytest.fixture(scope="module")
def whole(small):
    """10 steps without interruption."""
    return small.finish(2, *OPTIONS, hooks=(launch.record_samples,))


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(number, reason, whole, small):
    """Saved at the next boundary but one at most; what follows is the uninterrupted run, bit for bit."""
    folder, outcome = small.run(2, *OPTIONS, hooks=(launch.record_samples, SignalAt(1, 4, number)))
    assert outcome.codes == [EXIT_STOPPED] * 2, "\n".join(outcome.output)[-4000:]
    found = status.read(folder / "out")
    assert (found["state"], found["reason"]) == ("stopped", reason)
    saved = checkpoint.latest_committed(folder / "out")
    assert checkpoint.step_of(saved) == found["step"] and found["step"] in (4, 5)
    assert f"Stopped at step {found['step']} of 10 on {reason}" in outcome.output[0]
    assert not (folder / "out" / ownership.FILE).exists()

    before = launch.samples(folder)
    small.finish(2, *OPTIONS, folder=folder, hooks=(launch.record_samples,))
    after = launch.samples(folder)
    assert sorted(before) == list(range(1, found["step"] + 1)) and sorted(after) == list(range(found["step"] + 1, 11))
    assert before | after == launch.samples(whole.folder)
    assert status.read(folder / "out")["state"] == "finished"
    expected, resumed = whole.scalars, launch.scalars(folder / "out")
    for step in range(1, 11):
        assert resumed[step]["loss/total"] == expected[step]["loss/total"], step


def test_another_attempt_takes_the_directory(small):
    """The old one ends without committing, and does not remove the new one's name."""
    folder, outcome = small.run(
        2, *OPTIONS, "--checkpoint.interval", "5", hooks=(TakeOver(3),)
    )  # fmt: skip
    assert outcome.codes == [2, 2], "\n".join(outcome.output)[-4000:]
    assert "taken over by another attempt" in outcome.errors[0] and "Traceback" not in outcome.errors[0]
    assert checkpoint.latest_committed(folder / "out") is None
    assert ownership.read_owner(folder / "out")["attempt"] == "slurm-7.1"


def test_a_directory_in_use_is_refused(small):
    """All ranks end, with one line, and nothing of the holder's is touched."""
    folder = small.new_folder()
    out = folder / "out"
    out.mkdir()
    (out / ownership.FILE).write_text('{"attempt": "slurm-7.0", "host": "elsewhere", "pid": 1}')
    _, outcome = small.run(2, *OPTIONS, folder=folder)
    assert outcome.codes == [2, 2], "\n".join(outcome.output)[-4000:]
    lines = [line for line in outcome.errors[0].splitlines() if line.startswith("sgt-titan: ")]
    assert len(lines) == 1 and "is in use by slurm-7.0 on elsewhere" in lines[0]
    assert [path.name for path in out.iterdir()] == [ownership.FILE]
    assert ownership.read_owner(out)["attempt"] == "slurm-7.0"


@dataclass
class Hang:
    """One rank stops coming to its collectives."""

    rank: int
    step: int

    def __call__(self, rank: int, folder: Path) -> None:
        from sgt_titan.titan.trainer import SGTTrainer

        if rank != self.rank:
            return
        original = SGTTrainer._forward_backward_body

        def body(trainer, *arguments):
            if trainer.step == self.step:
                stuck_in_the_mud()
            return original(trainer, *arguments)

        SGTTrainer._forward_backward_body = body


def stuck_in_the_mud() -> None:
    time.sleep(600)


def test_a_hung_rank_prints_where_it_stands_and_ends_the_job(small):
    folder, outcome = small.run(
        2, *OPTIONS, "--comm.train_timeout_seconds", "4", "--checkpoint.interval", "2", hooks=(Hang(1, 4),)
    )
    assert all(outcome.codes) and outcome.seconds < 60
    assert "Timeout" in outcome.errors[1] and "stuck_in_the_mud" in outcome.errors[1]
    assert "_forward_backward_body" in outcome.output[0] or "Timed out" in outcome.output[0]
    assert checkpoint.step_of(checkpoint.latest_committed(folder / "out")) == 2
    assert status.read(folder / "out")["state"] == "running", "it could not say how it ended"
