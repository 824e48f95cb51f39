import json
import os
import subprocess
import sys
import time

import pytest

from sgt_titan.cluster import ownership
from sgt_titan.cluster.ownership import FILE, Ownership, attempt_name, read_owner
from sgt_titan.errors import UserError


@pytest.fixture
def elsewhere(tmp_path):
    """A token of a process on another host, ``age`` seconds old."""

    def make(attempt: str, age: float = 0.0, host: str = "far-away", pid: int = 1) -> None:
        (tmp_path / FILE).write_text(json.dumps({"attempt": attempt, "host": host, "pid": pid}))
        then = time.time() - age
        os.utime(tmp_path / FILE, (then, then))

    return make


def test_held_until_released(tmp_path):
    owner = Ownership(tmp_path, "slurm-7.0")
    owner.acquire()
    assert owner.held() and read_owner(tmp_path)["attempt"] == "slurm-7.0"
    owner.release()
    assert not list(tmp_path.iterdir())


def test_a_second_job_is_refused_and_told_who_has_it(tmp_path, elsewhere):
    elsewhere("slurm-7.0")
    with pytest.raises(UserError, match=r"in use by slurm-7\.0 on far-away \(heartbeat \d+ s ago\)"):
        Ownership(tmp_path, "slurm-8.0").acquire()
    assert read_owner(tmp_path)["attempt"] == "slurm-7.0" and len(list(tmp_path.iterdir())) == 1


def test_a_token_without_heartbeat_is_taken(tmp_path, elsewhere):
    elsewhere("slurm-7.0", age=ownership.STALE_SECONDS + 5)
    owner = Ownership(tmp_path, "slurm-8.0")
    owner.acquire()
    assert owner.held()
    owner.release()


def test_a_dead_process_of_this_host_does_not_hold(tmp_path, elsewhere):
    import socket

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    elsewhere("-here-1", host=socket.gethostname(), pid=dead.pid)
    owner = Ownership(tmp_path, "-here-2")
    owner.acquire()
    assert owner.held()
    owner.release()


def test_a_restart_takes_over_and_the_orphan_notices(tmp_path):
    """slurmd lost its controller: the job runs again while the old processes train on."""
    orphan = Ownership(tmp_path, "slurm-7.0", beat=0.02)
    orphan.acquire()
    restart = Ownership(tmp_path, "slurm-7.1", beat=0.02)
    restart.acquire()
    assert orphan.lost.wait(5)
    orphan.release()
    assert restart.held() and not orphan.held()
    restart.release()


def test_an_older_restart_does_not_take_back(tmp_path, elsewhere):
    elsewhere("slurm-7.2")
    with pytest.raises(UserError, match="in use"):
        Ownership(tmp_path, "slurm-7.1").acquire()


def test_restarts_count_as_numbers(tmp_path, elsewhere):
    elsewhere("slurm-7.9")
    owner = Ownership(tmp_path, "slurm-7.10")
    owner.acquire()
    owner.release()


def test_the_heartbeat_beats(tmp_path):
    owner = Ownership(tmp_path, "a.0", beat=0.02)
    owner.acquire()
    os.utime(tmp_path / FILE, (1, 1))
    deadline = time.monotonic() + 5
    while (tmp_path / FILE).stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / FILE).stat().st_mtime > 2
    owner.release()


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    """Processes of one moment, over a stale token: the take-over itself must not let two through."""
    (tmp_path / FILE).write_text(json.dumps({"attempt": "slurm-1.0", "host": "gone", "pid": 1}))
    os.utime(tmp_path / FILE, (1, 1))
    code = (
        "import sys\n"
        "from sgt_titan.cluster.ownership import Ownership\n"
        "from sgt_titan.errors import UserError\n"
        "owner = Ownership(sys.argv[1], sys.argv[2])\n"
        "print('ready', flush=True)\ninput()\n"
        "try:\n    owner.acquire()\n    print('held', flush=True)\n"
        "except UserError:\n    print('refused', flush=True)\n"
        "input()\nprint(owner.held(), flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"slurm-{i}.0"], **pipes) for i in range(2, 8)
    ]

    def all_say() -> list[str]:
        return [process.stdout.readline().strip() for process in started]

    def go_on() -> None:
        for process in started:
            process.stdin.write("\n")

    assert all_say() == ["ready"] * 6
    go_on()
    said = all_say()
    go_on()
    assert sorted(said) == ["held", *["refused"] * 5]
    assert all_say() == [str(word == "held") for word in said]
    for process in started:
        process.communicate()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_JOB_ID": "42"}, "slurm-42.0"),
        ({"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "3"}, "slurm-42.3"),
        ({"SLURM_JOB_ID": "44", "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "2"}, "slurm-42_2.0"),
    ],
)
def test_attempt_name(monkeypatch, environment, expected):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert attempt_name() == expected


def test_another_process_with_the_holder_s_number_does_not_hold(tmp_path):
    """In a container that is started anew, numbers come back."""
    import socket

    token = {"attempt": "-pod-1", "host": socket.gethostname(), "pid": os.getpid(), "started": "another-boot:17"}
    (tmp_path / FILE).write_text(json.dumps(token))
    owner = Ownership(tmp_path, "-pod-2")
    owner.acquire()
    assert owner.held()
    with pytest.raises(UserError, match="in use by -pod-2"):
        Ownership(tmp_path, "-pod-3").check()
    owner.release()


def test_a_job_claims_its_directory_before_its_ranks_are_there(tmp_path):
    """Two jobs that begin at once: one gets it, keeps it while nobody beats, and hands it to its own ranks."""
    script = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    job = Ownership(tmp_path, "slurm-7.0")
    job.claim(script.pid)
    with pytest.raises(UserError, match=r"in use by slurm-7\.0"):
        Ownership(tmp_path, "slurm-8.0").claim(os.getpid())
    ranks = Ownership(tmp_path, "slurm-7.0")
    ranks.acquire()
    assert read_owner(tmp_path)["pid"] == os.getpid()
    ranks.release()
    job.claim(script.pid)
    Ownership(tmp_path, "slurm-8.0").drop()
    assert read_owner(tmp_path)["attempt"] == "slurm-7.0"  # not its own to give back
    job.drop()
    assert not list(tmp_path.iterdir())
    job.claim(script.pid)
    script.communicate(b"\n")
    Ownership(tmp_path, "slurm-8.0").claim(os.getpid())  # the script has died
    assert read_owner(tmp_path)["attempt"] == "slurm-8.0"


@pytest.mark.parametrize(
    ("answer", "over"),
    [
        ("echo CANCELLED", True),
        ("echo COMPLETING", False),
        ("echo RUNNING", False),
        ("echo PENDING", False),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", False),  # of another cluster, perhaps
        ("echo Unable to contact slurm controller >&2; exit 1", False),
    ],
)
def test_slurm_is_asked_whether_the_holder_s_job_is_over(answer, over, tmp_path, elsewhere, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f'#!/bin/sh\ntest "$5" = 7_2 || exit 3\n{answer}\n')
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    elsewhere("slurm-7_2.0")
    if over:
        Ownership(tmp_path, "slurm-8.0").check()
    else:
        with pytest.raises(UserError, match="in use"):
            Ownership(tmp_path, "slurm-8.0").check()
    elsewhere("slurm-7_2.0", age=ownership.STALE_SECONDS + 5)  # no heartbeat: as during checks, or between attempts
    if answer in ("echo RUNNING", "echo PENDING", "echo COMPLETING"):
        with pytest.raises(UserError, match="in use"):
            Ownership(tmp_path, "slurm-8.0").check()
    else:
        Ownership(tmp_path, "slurm-8.0").check()
