"""Ranks a node from every way to ask for GPUs, and what the controller says of a job."""

from __future__ import annotations

import pytest

from sgt_titan.cluster.allocation import check_time, notice_seconds, ranks_per_node, read_told, seconds_of
from sgt_titan.errors import UserError


@pytest.mark.parametrize(
    ("env", "ranks", "rule"),
    [
        # --exclusive --gpus-per-node=1 on nodes of 8
        ({"SLURM_GPUS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}, 1, "SLURM_GPUS_PER_NODE=1; 7 GPUs more on the node"),
        # salloc -N2 --gpus-per-node=2, in its shell
        ({"SLURM_GPUS_PER_NODE": "a100:2"}, 2, "SLURM_GPUS_PER_NODE=a100:2"),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:2"}, 4, "SLURM_GPUS_PER_NODE"),
        ({"SLURM_TRES_PER_TASK": "cpu:4,gres:gpu:4"}, 4, "SLURM_TRES_PER_TASK"),
        ({"SLURM_TRES_PER_TASK": "gres/gpu:a100=2", "SLURM_NTASKS_PER_NODE": "2"}, 4, "for 2 tasks a node"),
        ({"SLURM_GPUS_PER_TASK": "1", "SLURM_NTASKS_PER_NODE": "8"}, 8, "SLURM_GPUS_PER_TASK=1 for 8 tasks a node"),
        ({"SLURM_GPUS": "16"}, 8, "SLURM_GPUS=16 over 2 nodes"),
        ({"SLURM_JOB_GPUS": "0,3,5", "SLURM_GPUS_ON_NODE": "3"}, 3, "SLURM_JOB_GPUS=0,3,5"),  # --gres=gpu:3
        ({"SLURM_JOB_GPUS": "0-3"}, 4, "SLURM_JOB_GPUS=0-3"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-ab,GPU-cd"}, 2, "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, 8, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_ON_NODE": "8", "SGT_PROCS_PER_NODE": "4"}, 4, "SGT_PROCS_PER_NODE=4"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, "no GPU asked for or visible"),
        ({}, 1, "no GPU asked for or visible"),
    ],
)
def test_what_the_job_asked_for_counts(env, ranks, rule):
    found, said = ranks_per_node(env, 2)
    assert found == ranks and rule in said


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SGT_PROCS_PER_NODE": "many"}, "SGT_PROCS_PER_NODE=many: must be a number"),
        ({"SGT_PROCS_PER_NODE": "0"}, "SGT_PROCS_PER_NODE=0: must be a number of processes, at least 1"),
        ({"SGT_PROCS_PER_NODE": "4", "SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1 shows 2 GPUs"),
        ({"SLURM_GPUS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0 shows 1 GPU"),
        ({"SLURM_GPUS_PER_NODE": "4", "SLURM_GPUS_PER_TASK": "1"}, "say one of them"),
        ({"SLURM_GPUS": "7"}, "SLURM_GPUS=7 is no multiple of 2 nodes"),
    ],
)
def test_contradictions_are_refused(env, said):
    with pytest.raises(UserError) as error:
        ranks_per_node(env, 2)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_the_controller_says():
    line = (
        "JobId=7 JobName=x JobState=RUNNING Reason=None Requeue=0 Restarts=2 BatchFlag=0 RunTime=00:01 "
        "TimeLimit=2-00:00:00 ExcNodeList=n[1-2] Command=/a/launch/llama1b.sh"
    )
    told = read_told(line)
    assert (told.state, told.restarts, told.limit) == ("RUNNING", 2, 172800.0)
    assert (told.command, told.excluded) == ("/a/launch/llama1b.sh", "n[1-2]")
    assert "salloc" in told.why_no_requeue
    assert "--no-requeue" in read_told("JobState=RUNNING Requeue=0 BatchFlag=1").why_no_requeue
    nothing = read_told("")
    assert nothing.why_no_requeue == "" and nothing.limit is None  # the controller is away: not a reason to give up


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 600),
        ("10:30", 630),
        ("01:00:00", 3600),
        ("2-0", 172800),
        ("1-02:30", 95400),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


def test_a_limit_that_leaves_no_time():
    script = "#!/bin/bash\n#SBATCH --time=2-0\n#SBATCH --signal=B:USR1@600\n"
    assert notice_seconds(script, {}) == 600
    assert notice_seconds(script, {"SBATCH_SIGNAL": "B:USR1@90"}) == 90
    assert notice_seconds("#SBATCH --signal=USR1", {}) == 60 and notice_seconds("", {}) is None
    check_time(1200.0, 600.0)
    check_time(660.0, 600.0)
    check_time(None, 600.0)
    for limit in (600.0, 300.0, 630.0):
        with pytest.raises(UserError, match=r"leaves \d+ s before the notice to stop .* raise --time"):
            check_time(limit, 600.0)
