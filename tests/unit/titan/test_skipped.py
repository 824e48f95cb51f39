"""A run that learned nothing has failed, whatever else went well."""

from __future__ import annotations

import time

import pytest
import torch

from sgt_titan import checkpoint
from sgt_titan.cluster import status
from sgt_titan.titan.main import run
from sgt_titan.titan.optimizer import GuardedOptimizers, NonFiniteError


@pytest.mark.parametrize("skip", [3, 2])
def test_a_run_whose_steps_were_all_skipped(skip, make_run, one_process, monkeypatch):
    """Three steps, of which the first ``skip`` have a gradient that is not finite."""
    config, seen = make_run("--checkpoint.interval=100"), []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def observe(self, loss):
        seen.append(loss)
        value = torch.tensor(float("nan")) if self.skipped < skip else loss.detach()
        self._loss_is_finite = torch.isfinite(value).all()

    monkeypatch.setattr(GuardedOptimizers, "observe", observe)
    folder = config.run.output_dir
    if skip == 2:
        assert run(config) == 0
        assert status.read(folder)["state"] == "finished" and checkpoint.latest_committed(folder) is not None
    else:
        with pytest.raises(NonFiniteError, match="all 3 steps of this run had a non-finite loss or gradient"):
            run(config)
        assert status.read(folder)["state"] == "failed" and checkpoint.latest_committed(folder) is None
    assert len(seen) >= 3
