"""One curve over all attempts of a run."""

from __future__ import annotations

import os
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sgt_titan.titan.curves import Curve, same_wandb_run


def test_steps_that_are_trained_again_are_shown_once(tmp_path, monkeypatch):
    """The first attempt dies after step 6, having saved step 4; its last values were other ones."""
    clock = iter(range(1_700_000_000, 1_700_001_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # event files are named by the second
    for first, steps, value in ((1, range(1, 7), 1.0), (5, range(5, 9), 2.0)):
        curve = Curve(tmp_path / "tb")
        curve.begin(first)
        for step in steps:
            curve.log({"loss/total": value}, step)
        curve.close()
    monkeypatch.undo()
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/total")]
    assert found == [(step, 1.0 if step < 5 else 2.0) for step in range(1, 9)]


def test_wandb_goes_on_with_the_run_of_the_directory(tmp_path, monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    same_wandb_run(tmp_path / "out")
    first = os.environ.pop("WANDB_RUN_ID")
    same_wandb_run(tmp_path / "out")
    assert os.environ["WANDB_RUN_ID"] == first and os.environ["WANDB_RESUME"] == "allow"
    os.environ["WANDB_RUN_ID"] = "mine"
    same_wandb_run(tmp_path / "out")
    assert os.environ["WANDB_RUN_ID"] == "mine"
