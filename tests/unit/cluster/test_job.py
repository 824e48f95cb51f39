"""What a batch script asks before and after an attempt, and what it does before it asks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sgt_titan import checkpoint
from sgt_titan.cluster import attempts, directory, job, notice, preflight, progress, status
from sgt_titan.cluster.ownership import Ownership, read_owner
from sgt_titan.config.door import read_config
from sgt_titan.config.load import RECORDED, dump
from sgt_titan.errors import UserError

REPO = Path(__file__).resolve().parents[3]
LAUNCH = sorted((REPO / "launch").glob("*.sh"))


def commit(out: Path, step: int) -> None:
    folder = checkpoint.step_dir(out, step)
    folder.mkdir(parents=True)
    checkpoint.commit(folder, {})


@pytest.fixture
def begin(tmp_path, monkeypatch, capsys):
    """``cluster.job begin`` of the demo as attempt 7.``restart``: (exit code, what the script evaluates, told)."""

    def begin(restart: int = 0, nodes: int = 1, *words: str, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        where = ["--shared", "/nowhere", "--run.output_dir", str(out)]
        code = job.main(["begin", "demo", "--nodes", str(nodes), *where, *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return begin


def test_begin_records_the_attempt(begin, tmp_path):
    code, script, told = begin()
    out = tmp_path / "out"
    assert code == 0 and script == f"OUTPUT_DIR={out}\nLOGS={out}/logs/7.0\nPROCS=1\n"
    assert told.splitlines()[:2] == [f"output {out}", f"logs   {out}/logs/7.0"] and "attempt slurm-7.0" in told
    assert read_owner(out)["attempt"] == "slurm-7.0"
    assert status.read(out) == {"state": "running", "attempt": "slurm-7.0", "step": 0, "reason": ""}
    assert [a.attempt for a in attempts.read(tmp_path / "out")] == ["slurm-7.0"]


def test_degrees_that_the_allocation_does_not_hold(begin, tmp_path):
    with pytest.raises(UserError, match="world size"):
        begin(0, 3, "--parallelism.tensor_parallel_degree", "2")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_refused_but_not_to_the_job_that_finished_it(begin, tmp_path):
    """Ranks that Slurm had lost sight of may finish a run while its next attempt is about to begin."""
    commit(tmp_path / "out", 99000)
    status.write(tmp_path / "out", "finished", attempt="slurm-7.0", step=99000)
    code, script, told = begin(1)
    assert (code, script) == (0, "FINISHED=1\n") and "finished by slurm-7.0" in told
    status.write(tmp_path / "out", "finished", attempt="slurm-6.0", step=99000)
    with pytest.raises(UserError, match=r"holds a finished run \(step 99000\)"):
        begin(1)
    shutil.rmtree(tmp_path / "out" / checkpoint.FOLDER)
    assert begin(1)[0] == 0  # its last checkpoint has been deleted: there is something left to do


def test_another_config_is_refused_before_anything(begin, tmp_path):
    """And not minutes later, when nodes have been checked and data tokenized."""
    out = tmp_path / "out"
    stored, _ = read_config("demo", ["--run.output_dir", str(out)], world_size=1)
    stored.data.template = "chat"  # what the data have decided since
    out.mkdir()
    (out / RECORDED).write_text(dump(stored))
    (out / directory.RUN_FILE).write_text(json.dumps({"fingerprints": {"data": "ab"}}))
    assert begin()[0] == 0
    Ownership(out, "slurm-7.0").drop()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"belongs to a run that differs: optimizer\.lr: 0\.003 -> 0\.01\. Choose"):
        begin(1, 1, "--optimizer.lr", "0.01")
    with pytest.raises(UserError, match=r"training\.global_batch_size"):
        begin(1, 1, "--training.global_batch_size", "32")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_of_two_jobs_of_a_directory_one_begins(begin, tmp_path, monkeypatch):
    """Tasks of an array with one run.name, say; the loser leaves no trace that could be taken for the other's end."""
    begin()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(UserError, match=r"is in use by slurm-7\.0"):
        begin()
    assert [a.attempt for a in attempts.read(tmp_path / "out")] == ["slurm-7.0"]
    assert status.read(tmp_path / "out")["attempt"] == "slurm-7.0"


def test_a_job_without_time_to_train_or_without_return(begin, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(
        "#!/bin/sh\necho JobId=7 JobState=RUNNING Requeue=0 BatchFlag=1 TimeLimit=$LIMIT Command=/x\n"
    )
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LIMIT", "00:10:00")
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --signal=B:USR1@600\n")
    with pytest.raises(UserError, match="leaves 0 s before the notice to stop"):
        begin(0, 1, "--script", str(script))
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("LIMIT", "01:00:00")
    code, _, told = begin(0, 1, "--script", str(script))
    assert code == 0 and "note: Slurm was told not to requeue it" in told


@pytest.mark.parametrize(
    ("words", "env", "size"),
    [
        ((), {}, ["--nodes=2", "--job-name=sgt-mine", "--gpus-per-node=4"]),
        (("--cluster.nodes", "1"), {}, ["--nodes=1", "--job-name=sgt-mine", "--gpus-per-node=4"]),
        ((), {"SGT_PROCS_PER_NODE": "1"}, ["--nodes=2", "--job-name=sgt-mine"]),
        ((), {"SLURM_NNODES": "3"}, []),  # sbatch --nodes=3
        ((), {"SLURM_GPUS_PER_NODE": "8"}, []),
    ],
)
def test_a_config_of_one_s_own_says_how_large_its_job_is(words, env, size, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(
        "run: {name: mine}\ncluster: {nodes: 2, gpus_per_node: 4}\ntrunk: {path: demo}\ndata: {source: demo}\n"
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert job.main(["size", str(tmp_path / "mine.yaml"), *words]) == 0
    assert capsys.readouterr().out.split() == size


def test_follow_says_what_is_new(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    written = iter([None, 1.0, 1.0, 2.0])

    def sleep(seconds):
        at = next(written, "end")
        if at == "end":
            monkeypatch.setattr(os, "getppid", lambda: -1)
        elif at is not None:
            facts = {"step": int(at), "steps": 4, "at": at, "terms": {"loss": 1.5}, "tokens_per_second": 1234.5}
            progress.write(tmp_path, facts | {"attempt": "slurm-7.0", "seconds_per_step": 60})

    monkeypatch.setattr(time, "sleep", sleep)
    job.main(["follow", str(tmp_path)])
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "no step yet after 0 min",
        "step 1/4  loss 1.5  1,234 tok/s  eta 0:03:00",
        "step 2/4  loss 1.5  1,234 tok/s  eta 0:02:00",
    ]


def test_end_prints_the_decision(begin, tmp_path, monkeypatch, capsys):
    begin()
    commit(tmp_path / "out", 40)
    words = ["end", str(tmp_path / "out"), "--logs", str(tmp_path), "--restarts", "0", "--max-restarts", "5"]
    assert job.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == "requeue\n" and "at step 40 (died): requeue, died" in printed.err
    assert "What happened: it ended without a word of any rank, before the first logged step" in printed.err
    assert "Next:          Slurm starts the job again, from step 40 (restart 1 of at most 5)" in printed.err
    assert read_owner(tmp_path / "out") is None  # given back, for whoever comes next


def test_notices_are_kept(monkeypatch):
    """In a process of its own: dying of SIGUSR1 would end this one."""
    code = (
        "import os, signal; from sgt_titan.cluster import notice; notice.listen(); "
        "os.kill(os.getpid(), signal.SIGUSR1); print(sorted(notice.heard))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "SIGUSR1" in done.stdout and done.returncode == 0
    assert not notice.heard


def test_a_launcher_hands_a_notice_to_its_ranks(tmp_path):
    """A rank that needs a second to save, below a launcher that is told to end."""
    rank = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda n, f: (time.sleep(0.3), sys.exit(75)))\n"
        "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n"
    )
    code = (
        "import subprocess, sys; from sgt_titan.cluster import notice; notice.pass_on()\n"
        f"sys.exit(subprocess.Popen([sys.executable, '-c', {rank!r}, {str(tmp_path / 'up')!r}]).wait())"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.terminate()
    assert launcher.wait(timeout=60) == 75


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
