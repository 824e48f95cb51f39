"""What a batch script asks before and after an attempt, and what it does before it asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sgt_titan import checkpoint
from sgt_titan.cluster import attempts, job, notice, preflight, status
from sgt_titan.errors import UserError

REPO = Path(__file__).resolve().parents[3]
LAUNCH = sorted((REPO / "launch").glob("*.sh"))


@pytest.fixture
def begin(tmp_path, monkeypatch, capsys):
    """``cluster.job begin`` of the demo as attempt 7.``restart``: (exit code, what the script evaluates, told)."""

    def begin(restart: int = 0, nodes: int = 1, *words: str, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        where = ["--shared", "/nowhere", "--run.output_dir", str(out)]
        code = job.main(["begin", "demo", "--nodes", str(nodes), "--gpus", "1", *where, *words])
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
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
    (tmp_path / "site.env").write_text(f"SGT_ACTIVATE=true\nSGT_SHARED={tmp_path}\n")
    done = script("llama1b.sh", **slurm, SLURM_RESTART_COUNT="51")  # by Slurm alone, as after node failures
    assert done.returncode == 2 and "51 restarts, 50 are allowed (SGT_MAX_RESTARTS)" in done.stderr
    (tmp_path / "site.env").write_text("SGT_ACTIVATE=true\nSGT_SHARED=/proc/no/such\n")
    done = script("llama1b.sh", **slurm)
    assert done.returncode == 2 and "SGT_SHARED=/proc/no/such cannot be made" in done.stderr


SCONTROL = """
case "$*" in
  "show hostnames "*) echo n1 ;;
  "show job "*) test -e asked || { touch asked; exit 1; }; echo "JobState=RUNNING Reason=None ExcNodeList=$EXCLUDED" ;;
  requeue*) test -e requeued || { touch requeued; exit 1; } ;;
esac
echo "$*" >>scontrol.log
"""
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
"$@" >srun.log
exit 1
"""


@pytest.fixture
def attempt(tmp_path):
    """An attempt of the demo whose ranks die, with commands in the place of Slurm's: what they were given."""
    commands = {"scontrol": SCONTROL, "srun": SRUN, "sleep": ""}
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(f"CONFIG=demo\n. {REPO}/slurm/run.sh\n")

    def attempt(*words: str, site: str = "", excluded: str = "(null)") -> tuple[list[str], list[str]]:
        ours = "SGT_ACTIVATE='test -z $NO_SUCH_VARIABLE'\nSGT_SHARED=shared\nSGT_PREFLIGHT=0\nSGT_WRAP='echo wrapped'\n"
        (tmp_path / "site.env").write_text(ours.replace("=shared", f"={tmp_path}/shared") + site)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SGT"))} | {
            "PATH": os.pathsep.join((str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])),
            "PYTHONPATH": str(REPO),
            "SGT_SITE": str(tmp_path / "site.env"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NNODES": "1",
            "SLURM_NODEID": "0",
            "EXCLUDED": excluded,
        }
        done = subprocess.run(
            ["bash", str(tmp_path / "job.sh"), *words], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1 and "died without a new checkpoint" in done.stderr, done.stderr
        given = (tmp_path / name for name in ("srun.log", "scontrol.log"))
        return tuple(file.read_text().splitlines() for file in given)

    return attempt


def test_ranks_run_in_the_container_and_a_controller_that_is_away_is_asked_again(attempt):
    (train,), controller = attempt()
    assert train.startswith("wrapped python -m torch.distributed.run --nnodes=1 --nproc-per-node=1")
    assert controller[-2:] == ["show job 7 -o", "requeue 7"]  # the second time; nothing is to be left out


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ((), "shared/demo"),
        (("--run.name", "mi02"), "shared/mi02"),
        (("--run.output-dir", "{tmp}/mine"), "mine"),
        (("--run.output_dir={tmp}/mine", "--run.name", "mi02"), "mine"),
    ],
)
def test_where_a_run_goes(words, folder, attempt, tmp_path):
    (train,), _ = attempt(*(word.format(tmp=tmp_path) for word in words))
    assert train.endswith(f"--run.output_dir {tmp_path / folder}") and (tmp_path / folder / "attempts.jsonl").is_file()


def test_bad_nodes_are_left_out_beside_those_of_sbatch(attempt, tmp_path):
    (tmp_path / "shared" / "demo").mkdir(parents=True)
    preflight.exclude(tmp_path / "shared" / "demo", {"n3": "slow"})
    _, controller = attempt(excluded="n[5-6]")
    assert controller[-1] == "update JobId=7 ExcNodeList=n3,n[5-6]"


@pytest.mark.skipif(not shutil.which("pkill"), reason="the pod's script needs pkill")
def test_on_kubernetes_a_notice_reaches_the_ranks(tmp_path):
    """The pod's own script, with a launcher that does not listen and a rank that ends a second after it is told."""
    documents = yaml.safe_load_all((REPO / "launch" / "kubernetes.yaml").read_text())
    container = next(d for d in documents if d["kind"] == "Job")["spec"]["template"]["spec"]["containers"][0]
    (tmp_path / "rank.py").write_text(
        "import pathlib, signal, time\n"
        "log, until = (pathlib.Path(__file__).with_name('heard').open('a', buffering=1), [time.time() + 15])\n"
        "def hear(number, frame): log.write('heard\\n'); until[:] = [min(until[0], time.time() + 1)]\n"
        "signal.signal(signal.SIGTERM, hear)\n"
        "pathlib.Path(__file__).with_name('up').touch()\n"
        "while time.time() < until[0]: time.sleep(0.05)\n"
    )
    launcher = f'case "$*" in *--dry-run*) exit 0 ;; esac\n{sys.executable} {tmp_path}/rank.py\nexit 1\n'
    (tmp_path / "python").write_text(f"#!/bin/bash\n{launcher}")
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0"}
    words = [*container["command"], container["args"][0].replace("/shared", str(tmp_path))]
    pod = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        pod.terminate()
        assert pod.wait(timeout=30) == 1
    finally:
        pod.kill()
    assert (tmp_path / "heard").read_text() == "heard\n"
