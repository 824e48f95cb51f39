"""Kills at random moments of a run, from its first import to its last save; in the end nothing is lost or done twice.

SGT_SOAK_KILLS=50 SGT_SOAK_SEED=1 pytest -s -m slurm tests/slurm/test_soak.py      # 3 kills unless told otherwise
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress

import pytest
from conftest import assert_same

KILLS = int(os.environ.get("SGT_SOAK_KILLS", "3"))
SEED = int(os.environ.get("SGT_SOAK_SEED", "0"))
STEPS = int(os.environ.get("SGT_SOAK_STEPS", "40"))
LONGEST = float(os.environ.get("SGT_SOAK_SECONDS", "30"))  # between kills

pytestmark = pytest.mark.slurm


def test_soak(cluster, submit):
    words = ("--training.steps", str(STEPS))
    whole = submit(*words).finish(600)
    chance = random.Random(SEED)
    run, kills = submit(*words, step_seconds=0.3), []
    while len(kills) < KILLS and cluster.state(run.jobs[-1]) != "COMPLETED":
        time.sleep(chance.uniform(0, LONGEST))
        if cluster.state(run.jobs[-1]) == "FAILED":  # too often in a row before a new checkpoint: a person's turn
            submit(*words, step_seconds=0.3, run=run)
        victims = cluster.processes(command="sgt_titan.train")
        if not victims:  # between attempts, or not yet begun
            continue
        before = run.step
        if chance.random() < 0.2:  # a node's power
            node = chance.choice(nodes(cluster, run))
            cluster.kill_node(node)
            cluster.start_node(node)
            kills.append((node, before))
        else:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(victims), signal.SIGKILL)
                kills.append(("process", before))
    run.finish(600)
    new = [a.last_step - a.first_step for a in run.attempts]
    print(
        f"\nsoak: seed {SEED}, {len(kills)} kills ({sum(1 for k, _ in kills if k != 'process')} of nodes), "
        f"{len(run.attempts)} attempts, {sum(1 for n in new if n <= 0)} of them without a new checkpoint, "
        f"submitted {len(run.jobs)} times, {STEPS} steps"
    )
    assert len(kills) == KILLS or run.step == STEPS
    assert_same(run, whole)


def nodes(cluster, run) -> list[str]:
    listed = cluster.job(run.jobs[-1]).get("NodeList", "")
    return cluster.call("scontrol", "show", "hostnames", listed).split()
