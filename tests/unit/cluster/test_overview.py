"""A run at a glance, from files alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sgt_titan import checkpoint, cli
from sgt_titan.cluster import attempts, overview, preflight, progress, status
from sgt_titan.cluster.ownership import Ownership

FACTS = {"steps": 100, "first_step": 1, "tokens_per_second": 1234.0, "seconds_per_step": 2.0, "terms": {"loss": 1.5}}


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "out"
    attempts.begin(out, "slurm-1.0", 2)
    for step in (10, 20):
        checkpoint.step_dir(out, step).mkdir(parents=True)
        checkpoint.commit(checkpoint.step_dir(out, step), {})
    attempts.end(out, "slurm-1.0", restarts=0, max_restarts=5)
    attempts.begin(out, "slurm-1.1", 2)
    status.write(out, "running", attempt="slurm-1.1", step=20)
    progress.write(out, FACTS | {"attempt": "slurm-1.1", "step": 25, "at": 1000.0, "probe": {"NN-FR": 0.25}})
    preflight.exclude(out, {"n3": "matmul 96 TFLOP/s, elsewhere 241"})
    return out


def test_a_run_that_is_under_way(run, capsys):
    owner = Ownership(run, "slurm-1.1")
    owner.acquire()
    assert cli.main(["status", str(run)]) == 0
    owner.release()
    printed = capsys.readouterr().out
    for text in (
        f"{run}  running",
        "25%  step 25/100  loss 1.5  1,234 tok/s  eta 0:02:30",
        "probe        NN-FR 0.25",
        "checkpoints  steps 20, 10",
        "held by      slurm-1.1 on ",
        "died: requeue, died",
        "left out     n3: matmul 96 TFLOP/s, elsewhere 241",
    ):
        assert text in printed, text


def test_every_end_is_told(run):
    assert "not running: its last attempt left no word" in overview.page(run, 2000.0)
    assert "last word    16 min ago" in overview.page(run, 2000.0)
    status.write(run, "stopped", attempt="slurm-1.1", step=25, reason="SIGTERM")
    assert "  stopped: SIGTERM" in overview.page(run, 2000.0)
    status.write(run, "finished", attempt="slurm-1.1", step=20)
    assert "  finished at step 20" in overview.page(run, 2000.0)


def test_what_is_no_run(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path / "no")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "is not a run's directory" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path), "--every", "0"]) == 2


def test_without_torch(run):
    """A login node's Python may have none, and nobody waits for it."""
    code = f"import sys; from sgt_titan.cli import main; main(['status', {str(run)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
