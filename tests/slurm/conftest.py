"""A cluster for the session, and submitting small runs to it."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

import cluster as slurm  # noqa: E402
import launch  # noqa: E402
import small_run  # noqa: E402
from sgt_titan import checkpoint  # noqa: E402
from sgt_titan.cluster import attempts, status  # noqa: E402

INTERVAL = 2
STEPS = 10

# What the launch scripts carry. Slurm counts time limits in minutes and is good to half a minute.
SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name=small
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@40
CONFIG={config}
. {root}/slurm/run.sh
"""

SITE = """
export PATH={bin}:$PATH PYTHONPATH={path}
SGT_ACTIVATE=true
SGT_SHARED={shared}
SGT_PROCS_PER_NODE=${{SGT_PROCS_PER_NODE-1}}
"""


@dataclass
class Run:
    """A job and the directory of its run."""

    cluster: slurm.Cluster
    folder: Path
    jobs: list[int] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def attempts(self) -> list[attempts.Attempt]:
        return attempts.read(self.out)

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        return attempts.newest_step(self.out)

    @property
    def log(self) -> str:
        """Everything that the batch scripts and the ranks have printed."""
        files = [*self.folder.glob("job-*.log"), *self.out.glob("logs/**/*.log")]
        return "\n".join(file.read_text(errors="replace") for file in sorted(files))

    def until(self, condition, what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds * slurm.PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s until {what}\n{self.log[-6000:]}"
            time.sleep(0.1)

    def finish(self, seconds: float = 240) -> Run:
        """Wait until the run says that it is finished and its job has ended well."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.cluster.state(self.jobs[-1]) in ended, "the job has ended", seconds)
        found = status.read(self.out) or {}
        state = self.cluster.state(self.jobs[-1])
        assert (found.get("state"), state) == ("finished", "COMPLETED"), f"{found} {state}\n{self.log[-6000:]}"
        return self

    def ended(self, state: str, seconds: float = 120) -> Run:
        """Wait until the job has ended in that state of Slurm's."""
        self.cluster.wait_state(self.jobs[-1], state, seconds=seconds)
        return self

    # -- what it consumed and computed -------------------------------------------------------------------------------

    @property
    def sample_folders(self) -> list[Path]:
        """One for each attempt, JOB.RESTART, in order."""
        return sorted((self.folder / "samples").iterdir(), key=lambda f: tuple(map(int, f.name.split("."))))

    @property
    def samples(self) -> dict[int, list]:
        """(epoch, sample) that each step consumed in the attempt that kept it, the last one to come there."""
        found: dict[int, list] = {}
        for folder in self.sample_folders:
            found |= launch.samples(folder)
        return found

    @property
    def losses(self) -> dict[int, float]:
        return {step: tags["loss/total"] for step, tags in launch.scalars(self.out).items() if "loss/total" in tags}


def assert_same(run: Run, whole: Run, *, relative: float = 0.0) -> None:
    """The run consumed the samples of the uninterrupted one, each once, and its losses are the same."""
    assert run.samples == whole.samples
    assert sorted(run.losses) == sorted(whole.losses) == list(range(1, whole.step + 1))
    for step, loss in whole.losses.items():
        assert run.losses[step] == (loss if not relative else pytest.approx(loss, rel=relative)), f"step {step}"
    assert checkpoint.problems(checkpoint.latest_committed(run.out)) == []


def lost_steps(run: Run) -> list[int]:
    """For each attempt but the last: steps it had trained beyond the checkpoint that the next went on from."""
    return [
        max(launch.samples(folder), default=0) - 1 - after.first_step  # the last step of the record was not completed
        for folder, after in zip(run.sample_folders[:-1], run.attempts[1:], strict=True)
    ]


@pytest.fixture(scope="session")
def cluster():
    if reason := slurm.why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="sgt-slurm-") as folder:  # munge wants its parents open to all
        made = slurm.Cluster(Path(folder))
        try:
            made.up()
            yield made
        finally:  # also where it did not come up: its daemons are on their own
            made.down()


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Config, trunk, data and site file of all runs."""
    folder = tmp_path_factory.mktemp("home")
    small_run.make_config(folder, small_run.make_trunk(folder / "trunk"), small_run.make_chats(folder / "chats.jsonl"))
    path = os.pathsep.join(map(str, (Path(__file__).parent / "faults", ROOT, ROOT / "tests" / "distributed")))
    site = SITE.format(bin=Path(sys.executable).parent, path=path, shared=folder / "shared")
    (folder / "site.env").write_text(site)
    (folder / "job.sh").write_text(SCRIPT.format(config=folder / "small.yaml", root=ROOT))
    return folder


@pytest.fixture(scope="session")
def submit(cluster, home, tmp_path_factory):
    """``submit(*overrides, nodes=2, fault={}, ...)``: a run on the cluster; ``run=`` goes on with an earlier one."""

    def submit(
        *overrides: str,
        nodes: int = 2,
        fault: dict | None = None,
        step_seconds: float = 0.0,
        timeout: int = 10,
        options: Sequence[str] = (),
        run: Run | None = None,
        rows: int = 2,
        bad_node: str = "",
        env: dict[str, str] | None = None,
    ) -> Run:
        run = run or Run(cluster, tmp_path_factory.mktemp("run"))
        words = ["--run.output_dir", str(run.out), "--run.deterministic", "true"]
        words += ["--training.steps", str(STEPS), "--training.local_batch_size", str(rows)]
        words += ["--checkpoint.interval", str(INTERVAL), "--checkpoint.keep_latest", "0"]
        words += ["--metrics.probe_every", "0", "--comm.train_timeout_seconds", str(timeout)]
        env = {
            "SGT_SITE": str(home / "site.env"),
            "SGT_TEST_FOLDER": str(run.folder),
            "SGT_TEST_FAULT": json.dumps(fault or {}),
            "SGT_TEST_STEP_SECONDS": str(step_seconds),
            "SGT_TEST_BAD_NODE": bad_node or "none",
            "SGT_PREFLIGHT": "1" if bad_node else "0",  # it doubles the time of a start
            "SGT_PREFLIGHT_SECONDS": "90",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        } | (env or {})
        sbatch = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={run.folder}/job-%j.log", *options]
        number = cluster.call(*sbatch, str(home / "job.sh"), *words, *overrides, env=env)
        run.jobs.append(int(number))
        (run.folder / "command").write_text(shlex.join([*words, *overrides]))
        return run

    return submit


@pytest.fixture(scope="session")
def whole(submit) -> Run:
    """The run that nothing happens to, on two nodes."""
    return submit().finish()
