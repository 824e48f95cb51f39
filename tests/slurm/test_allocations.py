"""What is wrong with the job and not with its nodes, on a real Slurm: no node is blamed, and the log says why."""

from __future__ import annotations

import json
import re
import subprocess
import time

import pytest
from conftest import ROOT

import launch
from sgt_titan.cluster import attempts, preflight, progress, status

pytestmark = pytest.mark.slurm


def job_log(run) -> str:
    return "\n".join(file.read_text(errors="replace") for file in sorted(run.folder.glob("job-*.log")))


def told(run, name: str) -> str:
    """A line of the paragraph at the end of the job's log."""
    return re.findall(rf"^{name}: +(.*)$", job_log(run), re.MULTILINE)[-1]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_container_that_is_not_there(nodes, submit):
    """Point 1: processes that cannot start say nothing about their nodes."""
    wrap = "apptainer exec --nv /img.sif"
    run = submit(nodes=nodes, bad_node="nobody", env={"SGT_WRAP": wrap}).ended("FAILED", 200)
    assert preflight.excluded(run.out) == {} and [a.decision for a in run.attempts] == ["stop"]
    said = told(run, "What happened")
    assert "no process could start" in said and "apptainer: not found" in said and f"SGT_WRAP='{wrap}'" in said
    assert f"{run.out}/logs/{run.jobs[0]}.0" in told(run, "Look at")


def test_a_deadline_shorter_than_the_imports(submit):
    """Point 1: with one node nobody can tell it from a node that hangs, so nobody is blamed."""
    run = submit(nodes=1, bad_node="nobody", env={"SGT_PREFLIGHT_SECONDS": "2"}).ended("FAILED", 200)
    assert preflight.excluded(run.out) == {}
    said = told(run, "What happened")
    assert "no process" in said or "no node got beyond 'imported'" in said  # whatever an idle machine gets done in 1 s
    assert "SGT_PREFLIGHT_SECONDS" in said


def test_ranks_follow_what_was_asked_for(submit):
    """Point 2: one GPU of the eight of an exclusive node."""
    run = submit(
        nodes=2, options=("--exclusive", "--gpus-per-node=1"), env={"SGT_PROCS_PER_NODE": ""}
    ).finish()  # fmt: skip
    assert "ranks  2 x 1: SLURM_GPUS_PER_NODE=1" in job_log(run)
    assert len(list(run.sample_folders[0].glob("samples-*.jsonl"))) == 2


def test_ranks_inside_an_allocation(cluster, submit, home):
    """Points 2 and 3: ``salloc --gpus-per-node=2`` starts two ranks a node; what it cannot requeue ends at once."""
    run = submit(options=("--hold",), rows=1)  # for its directory and its words
    words = (run.folder / "command").read_text()
    cluster.call("scancel", str(run.jobs[0]))
    env = {"SGT_SITE": str(home / "site.env"), "SGT_PROCS_PER_NODE": "", "SGT_PREFLIGHT": "0", "OMP_NUM_THREADS": "1"}
    env |= {"SGT_TEST_FOLDER": str(run.folder), "SGT_TEST_FAULT": json.dumps({"kind": "kill", "rank": 3, "step": 6})}
    began = time.monotonic()
    done = subprocess.run(
        ["salloc", "-N2", "--gpus-per-node=2", "bash", "-c", f"bash {home / 'job.sh'} {words}"],
        env=cluster.env | env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode not in (0, 2), done.stderr[-3000:]
    assert "ranks  2 x 2: SLURM_GPUS_PER_NODE=2" in done.stderr
    assert "runs inside an allocation (salloc), which Slurm cannot requeue" in done.stderr
    assert re.search(r"Next: +not started again: died; .* To go on from step 4 of 10: ", done.stderr)
    assert re.search(r"What happened: rank 3 on sgt\d was killed by SIGKILL", done.stderr), done.stderr[-3000:]
    assert time.monotonic() - began < 280  # it once waited for ten minutes to be requeued


def test_a_job_that_may_not_be_requeued_ends_at_once(cluster, submit):
    """Point 3."""
    run = submit(fault={"kind": "kill", "rank": 1, "step": 6}, options=("--no-requeue",))
    run.until(lambda: run.attempts and run.attempts[0].decision, "the attempt has ended", 200)
    run.ended("FAILED", 30)
    assert run.attempts[0].decision == "stop" and "--no-requeue" in run.attempts[0].reason
    assert "To go on from step 4 of 10: sbatch" in told(run, "Next")


def test_a_time_limit_no_longer_than_the_notice(submit):
    """Point 4: the script says 40 s; nobody has to wait for a notice to know that nothing can be trained."""
    run = submit(nodes=1, options=("--time=1",)).ended("FAILED", 60)
    assert "the time limit of 1 min leaves 20 s before the notice to stop" in job_log(run) and not run.attempts


def test_a_notice_that_comes_at_once(submit):
    """Point 4: typed on sbatch's command line it stands nowhere; it would come again with each restart."""
    run = submit(nodes=1, rows=4, options=("--time=2", "--signal=B:USR1@120"), step_seconds=45.0, timeout=120).ended(
        "FAILED", 200
    )
    assert [a.decision for a in run.attempts] == ["stop"]
    assert "raise --time, or lower --signal=B:USR1@SECONDS" in told(run, "Next")


def test_a_changed_config_is_refused_at_once(submit, whole):
    """Point 5: before nodes are checked and data tokenized."""
    second = type(whole)(whole.cluster, whole.folder)
    before = launch.snapshot(whole.out)
    submit("--optimizer.lr", "0.5", "--training.steps", "20", run=second, bad_node="nobody").ended("FAILED", 60)
    assert "belongs to a run that differs: optimizer.lr" in job_log(second)
    assert launch.snapshot(whole.out) == before


def test_an_array_with_one_run_name(cluster, submit):
    """Point 5: one task trains, the other leaves at once, and neither speaks for the other."""
    run = submit(nodes=1, rows=4, options=("--array=1-2",))
    one, other = (f"slurm-{run.jobs[0]}_{task}.0" for task in (1, 2))
    run.until(lambda: status.finished(run.out), "one task has finished", 240)
    logs = [file.read_text() for file in run.folder.glob("job-*.log")]
    assert len(logs) == 2 and sum("is in use by slurm-" in log for log in logs) == 1
    assert [a.attempt for a in run.attempts] in ([one], [other])
    run.until(lambda: run.attempts[0].decision == "done", "its end is on record", 30)


def test_the_log_leads_to_the_cause(submit):
    """Point 6: where everything is, steps as they are done, and at the end rank, node, signal, error and file."""
    run = submit(fault={"kind": "raise", "rank": 1, "step": 6}, options=("--no-requeue",)).ended("FAILED", 240)
    lines = job_log(run).splitlines()
    logs = f"{run.out}/logs/{run.jobs[0]}.0"
    assert lines[:2] == [f"output {run.out}", f"logs   {logs}"]
    assert re.fullmatch(r"rank 1 on sgt\d ended with exit code 1, after step 5 of 10", told(run, "What happened"))
    assert told(run, "Last error") == "RuntimeError: a rank that raises"
    assert re.fullmatch(rf"{logs}/sgt\d\.log", told(run, "Look at"))
    assert progress.read(run.out)["step"] == 5


def test_a_network_interface_that_is_not_there(submit):
    """Point 6: said by name, and not as a phase that nobody reached."""
    run = submit(nodes=2, bad_node="nobody", env={"GLOO_SOCKET_IFNAME": "ib0"}).ended("FAILED", 200)
    assert "GLOO_SOCKET_IFNAME=ib0: no such interface; here are " in told(run, "What happened")
    assert preflight.excluded(run.out) == {}


def test_a_job_that_is_cancelled_says_so(cluster, submit):
    """Point 6: neither the whole srun command nor a requeue that does not happen."""
    run = submit(step_seconds=1.0)
    run.until(lambda: run.step >= 2, "step 2 is saved")
    cluster.call("scancel", str(run.jobs[0]))
    run.ended("CANCELLED")
    run.until(lambda: attempts.read(run.out)[0].decision, "the attempt has ended", 30)
    log = job_log(run)
    assert run.attempts[0].decision == "stop" and run.attempts[0].reason.startswith("cancelled (scancel)")
    assert "torch.distributed.run" not in log and "requeue," not in log


def test_a_config_of_one_s_own(cluster, submit, home):
    """``sbatch launch/any.sh mine.yaml``: two nodes, as the config says, from a folder that is not the checkout."""
    run = submit(options=("--hold",))  # for its directory and its words
    words = (run.folder / "command").read_text().split()
    cluster.call("scancel", str(run.jobs[0]))
    mine = home / "mine.yaml"
    mine.write_text("extends: small.yaml\ncluster: {nodes: 2}\n")
    env = {"SGT_SITE": str(home / "site.env"), "SGT_PREFLIGHT": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"SGT_TEST_FOLDER": str(run.folder), "SGT_TEST_FAULT": "{}"}
    script = str(ROOT / "launch" / "any.sh")
    out = f"--output={run.folder}/job-%j.log"
    first = cluster.call("sbatch", "--parsable", "--time=30", out, "--chdir=/tmp", script, str(mine), *words, env=env)
    cluster.wait_state(int(first), "COMPLETED", seconds=120)
    run.jobs.append(int(re.findall(r"Submitted batch job (\d+)", job_log(run))[0]))
    run.until(lambda: run.attempts, "the job has begun", 120)
    assert cluster.job(run.jobs[-1])["NumNodes"] == "2" and cluster.job(run.jobs[-1])["TimeLimit"] == "00:30:00"
    run.finish()
    assert run.attempts[0].nodes == 2
