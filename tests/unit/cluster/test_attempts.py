import shutil

import pytest

from sgt_titan import checkpoint
from sgt_titan.cluster import attempts, status
from sgt_titan.cluster.allocation import Told
from sgt_titan.cluster.attempts import begin, decide, end


def save(out, step):
    checkpoint.step_dir(out, step).mkdir(parents=True)
    checkpoint.commit(checkpoint.step_dir(out, step), {})


@pytest.mark.parametrize(
    ("state", "restarts", "in_vain", "decision"),
    [
        ("finished", 99, [True] * 9, "done"),
        ("refused", 0, [False], "stop"),
        ("failed", 0, [False], "stop"),
        ("stopped", 3, [True, True, True], "stop"),  # preempted at once, three times: nothing will come of it
        ("stopped", 3, [True, False, True, True], "requeue"),
        ("unfit", 3, [True, True, True], "requeue"),  # each has named a node to go without
        ("stopped", 5, [False], "stop"),
        ("", 0, [True], "requeue"),
        ("", 1, [True, True], "requeue"),
        ("", 2, [True, True, True], "stop"),
        ("", 3, [True, True, False, True], "requeue"),
    ],
)
def test_decision(state, restarts, in_vain, decision):
    assert decide(state, "why", restarts, 5, in_vain)[0] == decision


def test_a_run_that_dies_advances_and_finishes(tmp_path):
    """Three attempts: one dies after a checkpoint, one is preempted, one finishes."""
    begin(tmp_path, "slurm-1.0", 4)
    status.write(tmp_path, "running", attempt="slurm-1.0", step=0)
    save(tmp_path, 10)
    first = end(tmp_path, "slurm-1.0", restarts=0, max_restarts=5)
    assert (first.decision, first.first_step, first.last_step, first.state) == ("requeue", 0, 10, "")
    assert "on 4 nodes at step 0" in first.summary() and "at step 10 (died): requeue" in first.summary()

    begin(tmp_path, "slurm-1.1", 2)
    status.write(tmp_path, "stopped", attempt="slurm-1.1", step=10, reason="SIGTERM")
    assert end(tmp_path, "slurm-1.1", restarts=1, max_restarts=5).decision == "requeue"

    begin(tmp_path, "slurm-1.2", 2)
    save(tmp_path, 20)
    status.write(tmp_path, "finished", attempt="slurm-1.2", step=20)
    assert end(tmp_path, "slurm-1.2", restarts=2, max_restarts=5).decision == "done"
    assert [(a.attempt, a.first_step, a.last_step) for a in attempts.read(tmp_path)] == [
        ("slurm-1.0", 0, 10), ("slurm-1.1", 10, 10), ("slurm-1.2", 10, 20),
    ]  # fmt: skip


def test_two_restarts_without_progress_are_enough(tmp_path):
    decisions = []
    for restart in range(4):
        begin(tmp_path, f"slurm-1.{restart}", 4)
        decisions.append(end(tmp_path, f"slurm-1.{restart}", restarts=restart, max_restarts=50).decision)
    assert decisions[:3] == ["requeue", "requeue", "stop"]


def test_a_stopped_attempt_that_saved_is_progress(tmp_path):
    """Every other attempt dies at once; those between train up to their time limit."""
    for restart in range(6):
        begin(tmp_path, f"slurm-1.{restart}", 4)
        if restart % 2:
            save(tmp_path, 10 * restart)
            status.write(tmp_path, "stopped", attempt=f"slurm-1.{restart}", step=10 * restart, reason="SIGUSR1")
        assert end(tmp_path, f"slurm-1.{restart}", restarts=restart, max_restarts=50).decision == "requeue"


def test_a_stopped_attempt_that_saved_nothing_counts(tmp_path):
    decisions = []
    for restart, stopped in enumerate((False, True, False, True, False)):
        begin(tmp_path, f"slurm-1.{restart}", 4)
        if stopped:
            status.write(tmp_path, "stopped", attempt=f"slurm-1.{restart}", step=0, reason="SIGTERM")
        decisions.append(end(tmp_path, f"slurm-1.{restart}", restarts=restart, max_restarts=50).decision)
    assert decisions == ["requeue", "requeue", "stop", "stop", "stop"]


@pytest.mark.parametrize(
    ("told", "state", "decision", "said"),
    [
        (Told(requeue=False), "", "stop", "died; Slurm was told not to requeue it (--no-requeue, Requeue=0)"),
        (Told(batch=False), "stopped", "stop", "stopped on SIGTERM; it runs inside an allocation (salloc)"),
        (Told(state="CANCELLED"), "stopped", "stop", "cancelled (scancel), after saving"),
        (Told(state="CANCELLED"), "", "stop", "cancelled (scancel)"),
        (
            Told(state="COMPLETING"),
            "stopped",
            "stop",
            "cancelled (scancel), after saving, unless Slurm has lost a node",
        ),
        (Told(state="COMPLETING", restarts=1), "", "requeued", "Slurm has put the job back itself"),
        (Told(state="NODE_FAIL"), "", "requeued", "Slurm has put the job back itself"),
        (Told(state="RUNNING", restarts=1), "", "requeued", "Slurm has put the job back itself"),
        (Told(state="RUNNING"), "", "requeue", "died"),
    ],
)
def test_what_slurm_says_counts(told, state, decision, said):
    found, reason = decide(state, "SIGTERM", 0, 5, [False], told=told)
    assert found == decision and reason.startswith(said)


def test_a_notice_before_anything_was_trained_ends_the_job():
    """Otherwise it comes again as soon, with every restart."""
    for seconds, steps, said, expected in (
        (20, 0, "SIGUSR1", "stop"),
        (20, 2, "SIGUSR1", "stop"),  # it was there before the second, which it let be done
        (20, 3, "SIGUSR1", "requeue"),  # it has trained, in no time
        (3600, 0, "SIGUSR1", "requeue"),  # an hour of tokenizing, which is in the cache now
        (20, 0, "SIGTERM before training", "requeue"),  # preemption: another time it may last
    ):
        decision, reason = decide("stopped", said, 0, 5, [steps == 0], seconds=seconds, steps=steps)
        assert decision == expected
        assert decision != "stop" or "raise --time, or lower --signal" in reason


def test_an_attempt_whose_end_nobody_saw_counts(tmp_path):
    """The node of the batch script goes each time: nobody is left to say so."""
    for restart in range(3):
        begin(tmp_path, f"slurm-1.{restart}", 4)
    lost = attempts.read(tmp_path)[:2]
    assert [(a.state, a.decision, bool(a.ended)) for a in lost] == [("lost", "requeued", True)] * 2
    assert end(tmp_path, "slurm-1.2", restarts=2, max_restarts=50).decision == "stop"


def test_a_finished_run_whose_last_checkpoint_is_gone_is_not_finished(tmp_path):
    begin(tmp_path, "slurm-1.0", 1)
    save(tmp_path, 10)
    save(tmp_path, 20)
    status.write(tmp_path, "finished", attempt="slurm-1.0", step=20)
    assert status.finished(tmp_path)["step"] == 20
    shutil.rmtree(checkpoint.step_dir(tmp_path, 20))
    assert status.finished(tmp_path) is None


def test_attempts_do_not_speak_for_each_other(tmp_path):
    """A second job of the directory, refused: the first one's end is its own."""
    begin(tmp_path, "slurm-1.0", 1)
    status.write(tmp_path, "running", attempt="slurm-1.0", step=0)
    status.write(tmp_path, "refused", attempt="slurm-2.0", step=0, reason="in use")
    assert status.read(tmp_path, "slurm-1.0")["state"] == "running"
    assert end(tmp_path, "slurm-1.0", restarts=0, max_restarts=5).decision == "requeue"


def test_what_an_earlier_attempt_said_does_not_count(tmp_path):
    """An attempt that dies before it says anything must not be taken for the one that was preempted."""
    status.write(tmp_path, "refused", attempt="slurm-1.0", step=0, reason="bad")
    begin(tmp_path, "slurm-2.0", 1)
    assert end(tmp_path, "slurm-2.0", restarts=0, max_restarts=5).decision == "requeue"


def test_a_cut_off_line_is_left_out(tmp_path):
    begin(tmp_path, "slurm-1.0", 4)
    with (tmp_path / attempts.FILE).open("a") as file:
        file.write('{"attempt": "slurm-1.')
    assert [a.attempt for a in attempts.read(tmp_path)] == ["slurm-1.0"]
    begin(tmp_path, "slurm-1.1", 4)  # and does not take the next one with it
    assert [a.attempt for a in attempts.read(tmp_path)] == ["slurm-1.0", "slurm-1.1"]


def test_a_new_job_begins_to_count_anew(tmp_path):
    for restart, decision in ((0, "requeue"), (1, "requeue"), (2, "stop")):
        begin(tmp_path, f"slurm-1.{restart}", 4)
        assert end(tmp_path, f"slurm-1.{restart}", restarts=restart, max_restarts=50).decision == decision
    begin(tmp_path, "slurm-2.0", 4)
    assert end(tmp_path, "slurm-2.0", restarts=0, max_restarts=50).decision == "requeue"
