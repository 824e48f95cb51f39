"""What a batch script asks before and after an attempt, and what it does before it asks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sgt_titan import checkpoint
from sgt_titan.cluster import attempts, job, notice, status
from sgt_titan.errors import UserError

REPO = Path(__file__).resolve().parents[3]
LAUNCH = sorted((REPO / "launch").glob("*.sh"))


@pytest.fixture
def begin(tmp_path, monkeypatch, capsys):
    """``cluster.job begin`` of the demo as attempt 7.``restart``: (exit code, what the script evaluates, told)."""

    def begin(restart: int = 0, nodes: int = 1, *words: str, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        code = job.main(["begin", "demo", "--nodes", str(nodes), "--gpus", "1", "--run.output_dir", str(out), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return begin


def test_begin_records_the_attempt(begin, tmp_path):
    code, script, told = begin()
    assert code == 0 and script == f"OUTPUT_DIR={tmp_path / 'out'}\n" and "attempt slurm-7.0" in told
    assert status.read(tmp_path / "out") == {"state": "running", "attempt": "slurm-7.0", "step": 0, "reason": ""}
    assert [a.attempt for a in attempts.read(tmp_path / "out")] == ["slurm-7.0"]


def test_degrees_that_the_allocation_does_not_hold(begin, tmp_path):
    with pytest.raises(UserError, match="world size"):
        begin(0, 3, "--parallelism.tensor_parallel_degree", "2")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_refused_but_not_to_the_job_that_finished_it(begin, tmp_path):
    """Ranks that Slurm had lost sight of may finish a run while its next attempt is about to begin."""
    status.write(tmp_path / "out", "finished", attempt="slurm-7.0", step=300)
    code, script, told = begin(1)
    assert (code, script) == (0, "FINISHED=1\n") and "finished by slurm-7.0" in told
    status.write(tmp_path / "out", "finished", attempt="slurm-6.0", step=300)
    with pytest.raises(UserError, match=r"holds a finished run \(step 300\)"):
        begin(1)


def test_end_prints_the_decision(begin, tmp_path, monkeypatch, capsys):
    begin()
    folder = checkpoint.step_dir(tmp_path / "out", 40)
    folder.mkdir(parents=True)
    checkpoint.commit(folder, {})
    words = ["end", str(tmp_path / "out"), "--restarts", "0", "--max-restarts", "5"]
    assert job.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == "requeue\n" and "at step 40 (died): requeue, died" in printed.err


def test_notices_are_kept(monkeypatch):
    """In a process of its own: dying of SIGUSR1 would end this one."""
    code = (
        "import os, signal; from sgt_titan.cluster import notice; notice.listen(); "
        "os.kill(os.getpid(), signal.SIGUSR1); print(sorted(notice.heard))"
    )
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "SIGUSR1" in done.stdout and done.returncode == 0
    assert not notice.heard


# -- the scripts -------------------------------------------------------------------------------------------------------


def script(name: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SGT"))}
    command = ["bash", str(REPO / "launch" / name), *words]
    return subprocess.run(command, env=clean | env, capture_output=True, text=True, timeout=60, cwd=REPO)


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_scripts_parse_and_explain_themselves_without_slurm(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    done = script(path.name, "--help")
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 1
    if path.name != "local.sh":
        assert "sbatch --nodes=" in done.stdout


@pytest.mark.parametrize("path", [p for p in LAUNCH if p.name != "local.sh"], ids=lambda path: path.name)
def test_directives_stand_before_the_first_command(path):
    """sbatch silently ignores those after it."""
    lines = path.read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert directives and max(directives) < first
    said = " ".join(lines[i] for i in directives)
    assert "--requeue" in said and "--open-mode=append" in said and "--signal=B:USR1@" in said


def test_a_site_file_that_is_missing_or_lacks_a_variable(tmp_path):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(REPO), "SGT_SITE": str(tmp_path / "site.env")}
    done = script("llama1b.sh", **slurm)
    assert done.returncode == 2 and "site.env is missing; copy slurm/site.env.example" in done.stderr
    (tmp_path / "site.env").write_text("SGT_ACTIVATE=true\n")
    done = script("llama1b.sh", **slurm)
    assert done.returncode == 2 and "SGT_SHARED is not set" in done.stderr
    (tmp_path / "site.env").write_text("SGT_ACTIVATE=true\nSGT_SHARED=/proc/no/such\n")
    done = script("llama1b.sh", **slurm)
    assert done.returncode == 2 and "SGT_SHARED=/proc/no/such cannot be made" in done.stderr
