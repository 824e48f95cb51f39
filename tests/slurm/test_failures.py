"""Everything that ends a run before its time, caused on a real Slurm: it goes on, and nothing is lost or done twice."""

from __future__ import annotations

import json
import time

import pytest
from conftest import INTERVAL, STEPS, assert_same, lost_steps

import launch
from sgt_titan import checkpoint
from sgt_titan.cluster import preflight, status

pytestmark = pytest.mark.slurm

SLOW = 1.0  # seconds a step, where something has to happen during the run


def decisions(run) -> list[str]:
    return [attempt.decision for attempt in run.attempts]


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "kill", "rank": 1, "step": 6},
        {"kind": "raise", "rank": 0, "step": 6},
        {"kind": "kill_in_save", "rank": 1, "step": 6},
    ],
    ids=lambda fault: fault["kind"],
)
def test_a_rank_that_dies(fault, submit, whole):
    run = submit(fault=fault).finish()
    assert decisions(run) == ["requeue", "done"]
    assert run.attempts[1].first_step == 4  # step 6 had been trained at most, not saved
    assert max(lost_steps(run)) <= INTERVAL
    assert_same(run, whole)
    if fault["kind"] == "raise":
        assert "RuntimeError: a rank that raises" in run.log


def test_a_rank_that_hangs(submit, whole):
    """The others time out, the log holds every rank's stack, the hung one's among them, and the run goes on."""
    run = submit(fault={"kind": "hang", "rank": 1, "step": 6}).finish()
    assert decisions(run) == ["requeue", "done"]
    assert "in fail" in run.log and "sitecustomize.py" in run.log  # where rank 1 hung
    assert run.log.count("Timeout (0:00:10)!") >= 1
    assert_same(run, whole)


def test_a_node_is_set_down(cluster, submit, whole):
    run = submit(step_seconds=SLOW)
    run.until(lambda: run.step >= 4, "step 4 is saved")
    lost = cluster.call("scontrol", "show", "hostnames", cluster.job(run.jobs[0])["NodeList"]).split()[-1]
    cluster.set_node(lost, "down")
    try:
        run.finish()
        used = cluster.call("scontrol", "show", "hostnames", cluster.job(run.jobs[0])["NodeList"]).split()
        assert lost not in used
    finally:
        cluster.set_node(lost, "resume")
    assert max(lost_steps(run)) <= INTERVAL
    assert_same(run, whole)


def test_a_node_loses_power(cluster, submit, whole):
    run = submit(step_seconds=SLOW)
    run.until(lambda: run.step >= 4, "step 4 is saved")
    lost = cluster.call("scontrol", "show", "hostnames", cluster.job(run.jobs[0])["NodeList"]).split()[-1]
    cluster.kill_node(lost)
    try:
        run.finish()
    finally:
        cluster.start_node(lost)
        cluster.wait_idle()
    assert_same(run, whole)


def test_slurmd_dies_and_its_processes_live_on(cluster, submit, whole):
    """Slurm starts the job again while the old ranks still train: two attempts at once, one directory."""
    run = submit(step_seconds=SLOW)
    run.until(lambda: run.step >= 4, "step 4 is saved")
    nodes = cluster.call("scontrol", "show", "hostnames", cluster.job(run.jobs[0])["NodeList"]).split()
    for node in nodes:
        cluster.stop_slurmd(node)
    try:
        run.finish()
    finally:
        for node in nodes:
            cluster.start_node(node)
        cluster.wait_idle()
    assert_same(run, whole)


def test_preemption(cluster, submit, whole):
    run = submit(step_seconds=SLOW)
    run.until(lambda: run.step >= 4, "step 4 is saved")
    urgent = cluster.call(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    )
    run.finish()
    assert cluster.state(int(urgent)) == "COMPLETED"
    assert run.attempts[0].state == "stopped" and "SIGTERM" in run.attempts[0].reason
    assert lost_steps(run) == [-1]  # saved at the boundary, nothing to repeat
    assert_same(run, whole)


def test_time_limit(submit, whole):
    """Three minutes are not enough; the run saves before they are over and goes on in the next three.

    Slurm may give its notice a minute early and half a minute late: of two minutes nothing might be left to train in.
    """
    run = submit(step_seconds=20.0, timeout=60, options=("--time=3", "--signal=B:USR1@60")).finish(600)
    assert len(run.attempts) > 1
    assert all(a.state == "stopped" and "SIGUSR1" in a.reason for a in run.attempts[:-1])
    assert set(lost_steps(run)) == {-1}
    assert_same(run, whole)


def test_fewer_nodes_and_more_again_and_scancel_stays_cancelled(cluster, submit, whole):
    run = submit(nodes=4, rows=1, step_seconds=SLOW)
    for count, nodes in ((1, 2), (2, 4)):
        run.until(
            lambda count=count: len(run.attempts) == count and run.step > run.attempts[-1].first_step,
            f"attempt {count} has saved",
        )
        cluster.call("scancel", str(run.jobs[-1]))
        run.ended("CANCELLED")
        time.sleep(5)
        assert cluster.state(run.jobs[-1]) == "CANCELLED"  # what a user cancels does not come back
        submit(nodes=nodes, rows=4 // nodes, step_seconds=SLOW, run=run)
    run.finish()
    assert [attempt.nodes for attempt in run.attempts] == [4, 2, 4]
    assert_same(run, whole, relative=1e-4)


def test_two_jobs_of_one_directory(cluster, submit, whole):
    run = submit(step_seconds=SLOW)
    run.until(lambda: run.step >= 2, "step 2 is saved")
    second = type(run)(cluster, run.folder)
    submit(step_seconds=SLOW, run=second)
    second.ended("FAILED")
    assert f"is in use by slurm-{run.jobs[0]}.0" in run.log
    run.finish()
    assert len(run.attempts) == 1
    assert_same(run, whole)


def test_the_controller_restarts(cluster, submit, whole):
    run = submit(step_seconds=SLOW)
    run.until(lambda: run.step >= 2, "step 2 is saved")
    cluster.stop_controller()
    time.sleep(3)
    cluster.start_controller()
    run.finish()
    assert len(run.attempts) == 1
    assert_same(run, whole)


def test_a_rank_dies_while_the_controller_is_away(cluster, submit, whole):
    run = submit(fault={"kind": "kill", "rank": 1, "step": 6}, step_seconds=SLOW)
    run.until(lambda: run.step >= 4, "step 4 is saved")
    cluster.stop_controller()
    try:
        run.until(lambda: run.attempts[0].decision, "the attempt has ended")
        time.sleep(20)  # longer than a command waits for an answer
    finally:
        cluster.start_controller()
    run.finish()
    assert decisions(run) == ["requeue", "done"]
    assert_same(run, whole)


def test_no_space_left(cluster, submit, whole):
    """The run ends with what to do, is not requeued, and goes on when started again."""
    run = submit(fault={"kind": "full_in_save", "rank": 1, "step": 6}).ended("FAILED")
    assert decisions(run) == ["stop"]
    assert "no space left to save step 6; kept step-00000004" in run.log
    assert status.read(run.out)["state"] == "refused" and run.step == 4
    submit(run=run).finish()
    assert_same(run, whole)


@pytest.mark.parametrize("damage", ["truncated", "marker"])
def test_the_newest_checkpoint_is_damaged(damage, cluster, submit, whole):
    run = submit(step_seconds=SLOW)
    run.until(lambda: run.step >= 6, "step 6 is saved")
    cluster.call("scancel", str(run.jobs[0]))
    run.ended("CANCELLED")
    newest = checkpoint.latest_committed(run.out)
    if damage == "marker":
        (newest / checkpoint.MARKER).unlink()
    else:
        file = next(newest.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100])
    submit(run=run).finish()
    assert ("no commit marker" if damage == "marker" else "Damaged checkpoint") in run.log
    assert run.attempts[-1].state == "finished"
    assert_same(run, whole)


def test_a_burst_of_nans_and_a_kill(submit):
    """Steps with NaN gradients are skipped, with or without an interruption."""
    burst = {"kind": "nan", "rank": 1, "steps": [3, 4, 7]}
    undisturbed = submit(fault=burst).finish()
    run = submit(fault=burst | {"and": {"kind": "kill", "rank": 0, "step": 6}}).finish()
    assert decisions(run) == ["requeue", "done"]
    assert run.samples == undisturbed.samples
    tags = launch.scalars(run.out)
    assert tags[STEPS]["optimizer/skipped_steps"] == launch.scalars(undisturbed.out)[STEPS]["optimizer/skipped_steps"]
    final = [
        json.loads((checkpoint.latest_committed(r.out) / checkpoint.STATE).read_text()) for r in (run, undisturbed)
    ]
    assert final[0]["metrics"] == final[1]["metrics"]


def test_no_progress_is_not_repeated_for_ever(submit):
    """A rank that always dies before the first checkpoint: two restarts, then the end."""
    fault = {"kind": "kill", "rank": 0, "step": 1}
    run = submit(fault=fault | {"restart": "every"})
    run.ended("FAILED", 300)
    assert decisions(run) == ["requeue", "requeue", "stop"]
    assert "3 attempts in a row ended without a new checkpoint" in run.attempts[-1].reason


def test_a_finished_run_is_not_run_again(cluster, submit, whole):
    """Neither requeued by itself nor started anew in its directory."""
    before = launch.snapshot(whole.out)
    second = type(whole)(cluster, whole.folder)
    submit(run=second)
    second.ended("FAILED")
    assert "holds a finished run (step 10)" in whole.log
    assert launch.snapshot(whole.out) == before


# -- before training ---------------------------------------------------------------------------------------------------


def test_a_node_that_does_not_answer_is_left_out(cluster, submit, whole):
    run = submit(bad_node="sgt1").finish(400)
    assert decisions(run) == ["requeue", "done"]
    assert run.attempts[0].reason == "without bad nodes: sgt1: did not report"  # and not the node that waited for it
    assert "sgt1" not in cluster.call("scontrol", "show", "hostnames", cluster.job(run.jobs[0])["NodeList"]).split()
    assert "preflight: 2 nodes fit" in run.log, run.log
    assert_same(run, whole)


def test_preemption_during_the_checks_blames_no_node(cluster, submit):
    """Checks that were ended with their job say nothing of the nodes."""
    run = submit(nodes=4, rows=1, bad_node="sgt1")
    run.until(lambda: list(run.out.glob("preflight/*/sgt4-0.json")), "a node has reported")
    urgent = cluster.call(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    )
    run.until(lambda: run.attempts[0].decision, "the attempt has ended")
    cluster.call("scancel", str(run.jobs[-1]), urgent.strip())
    assert run.attempts[0].state == "stopped" and "SIGTERM" in run.attempts[0].reason
    assert run.attempts[0].decision == "requeue"
    assert preflight.excluded(run.out) == {}
    cluster.wait_idle()


def test_too_few_good_nodes_is_a_clear_end(submit):
    run = submit(nodes=4, rows=1, bad_node="sgt2").ended("FAILED", 200)
    assert "4 nodes are needed, 3 are up and not excluded (sgt2: did not report)" in run.log
    assert decisions(run) == ["stop"]


def test_nodes_that_are_fit(submit):
    run = submit(nodes=2, bad_node="nobody").finish()
    assert decisions(run) == ["done"] and "preflight: 2 nodes fit" in run.log, run.log
