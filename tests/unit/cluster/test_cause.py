"""The first failure is found among what everybody says once one rank is gone."""

# ruff: noqa: E501  (a row of a table stays on a line)

from __future__ import annotations

from pathlib import Path

import pytest

from sgt_titan.cluster.cause import error_line, failures, first, paragraph

REPORT = """
[default0]:Traceback (most recent call last):
[default0]:  File "/x/errors.py", line 3, in body
[default0]:    raise RuntimeError("boom: not found here")
[default0]:{line}
E1124 12:00:01.000000 77 torch/distributed/elastic/multiprocessing/api.py:1000] failed (exitcode: {code}) of binary
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
sgt_titan.train FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_12:00:{second}
  host      : {node}
  rank      : {rank} (local_rank: 0)
  exitcode  : {code} (pid: 4711)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 4711
============================================================
"""


@pytest.fixture
def logs(tmp_path) -> Path:
    def write(node: str, rank: int, code: int, second: int, line: str) -> None:
        text = REPORT.format(line=line, code=code, node=node, rank=rank, second=f"{second:02d}")
        (tmp_path / f"{node}.log").write_text(text)

    write("n1", 0, 1, 2, "RuntimeError: [gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:9")
    write("n2", 1, -9, 3, "step 5")
    write("n3", 2, -15, 1, "step 5")
    (tmp_path / "preflight-n1.log").write_text("ValueError: of the checks\n")
    return tmp_path


def told(logs: Path, **changes) -> list[str]:
    facts = {"state": "", "reason": "died", "decision": "requeue", "step": 4, "steps": 10, "restart": 0, "most": 50}
    return paragraph(**facts | {"logs": logs, "again": "sbatch launch/x.sh"} | changes).splitlines()


def test_the_rank_that_was_killed_and_not_those_that_lost_it(logs):
    found = first(failures(logs))
    assert (found.node, found.rank, found.code) == ("n2", 1, -9) and len(failures(logs)) == 3
    assert told(logs, reached={"step": 5}) == [
        "What happened: rank 1 on n2 was killed by SIGKILL (out of memory, or somebody's kill), after step 5 of 10",
        "Last error:    none: it had no time for a word",
        f"Look at:       {logs}/n2.log",
        "Next:          Slurm starts the job again, from step 4 of 10 (restart 1 of at most 50)",
    ]


def test_an_exception_is_quoted(logs):
    (logs / "n2.log").write_text(REPORT.format(line="RuntimeError: boom", code=1, node="n2", rank=1, second="01"))
    lines = told(logs, decision="stop", reason="3 attempts in a row ended without a new checkpoint", step=0)
    assert lines[0] == "What happened: rank 1 on n2 ended with exit code 1, before the first logged step"
    assert lines[1] == "Last error:    RuntimeError: boom"
    assert lines[3].endswith(
        "not started again: 3 attempts in a row ended without a new checkpoint. To go on from the beginning "
        "(there is no checkpoint yet): sbatch launch/x.sh"
    )


def test_a_launcher_that_lost_its_store_leaves_the_exception_of_its_rank(logs):
    """The other rank's watchdog, seconds later, is the only failure that a launcher lived to report."""
    for name in ("n1", "n2", "n3"):
        (logs / f"{name}.log").unlink()
    (logs / "n1.log").write_text(
        REPORT.format(line="Timeout (0:00:10)!", code=1, node="n1", rank=0, second="02").replace(
            '[default0]:    raise RuntimeError("boom: not found here")\n', ""
        )
    )
    (logs / "n2.log").write_text(
        "[default0]:[rank1]:     raise RuntimeError('boom')\n[default0]:[rank1]: RuntimeError: boom\n"
        "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: The connection has failed.\n"
    )
    assert told(logs)[:2] == [
        "What happened: rank 1 on n2 ended with exit code 1, before the first logged step",
        "Last error:    RuntimeError: boom",
    ]
    (logs / "n2.log").unlink()
    assert "rank 0 on n1 did not come to its next step in time" in told(logs)[0]


def test_a_launcher_that_was_killed_is_known_from_srun(logs):
    (logs / "n2.log").write_text("[default0]:step 5\n")
    (logs / "srun.log").write_text("srun: error: n2: task 1: Killed\nsrun: error: n3: task 2: Terminated\n")
    assert told(logs)[0].startswith("What happened: the launcher on n2 was killed by SIGKILL")


def test_what_the_run_said_and_why_it_is_not_started_again(tmp_path):
    lines = told(
        tmp_path, state="stopped", reason="SIGTERM", decision="stop", decided="cancelled (scancel), after saving"
    )
    assert lines[0] == "What happened: ended on notice: SIGTERM"
    assert "not started again: cancelled (scancel), after saving. To go on from step 4 of 10: sbatch" in lines[-1]


@pytest.mark.parametrize(
    ("state", "reason", "decision", "first_line", "next_line"),
    [
        ("finished", "", "done", "the run is finished, at step 4 of 10", "nothing"),
        ("stopped", "SIGTERM", "requeue", "ended on notice: SIGTERM", "Slurm starts the job again"),
        ("", "cancelled (scancel)", "stop", "cancelled (scancel), before the first logged step", "not started again: cancelled"),
        ("", "Slurm has put the job back itself", "requeued", "Slurm has put the job back itself", "Slurm has put the job back"),
        ("refused", "preflight: no process could start", "stop", "refused: preflight: no process could start", "not started"),
        ("", "died", "requeue", "it ended without a word of any rank", "Slurm starts the job again"),
    ],
)  # fmt: skip
def test_every_way_to_end_has_its_words(state, reason, decision, first_line, next_line, tmp_path):
    lines = told(tmp_path, state=state, reason=reason, decision=decision)
    assert first_line in lines[0] and next_line in lines[-1]


def test_the_last_line_of_an_error(tmp_path):
    file = tmp_path / "x.log"
    file.write_text(
        "[default1]:ValueError: of rank 1\n[default0]:KeyError: of rank 0\nslurmstepd-n1: error: *** STEP 4.0 ON n1 CANCELLED ***\n"
        'Timeout (0:00:30)!\nThread 0x7f (most recent call first):\n  File "/x/errors.py", line 2 in error:\n'
    )
    assert error_line(file) == "KeyError: of rank 0" and error_line(file, 1) == "ValueError: of rank 1"
    file.write_text("bash: line 5: apptainer: command not found\n")
    assert error_line(file) == "bash: line 5: apptainer: command not found"
    file.write_text("loading\nTimeout (0:00:30)!\n")
    assert error_line(file) == "" and error_line(tmp_path / "none.log") == ""
