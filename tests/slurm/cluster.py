"""A real Slurm of several nodes on one machine, for the tests of this folder: one controller, a slurmd per node.

    python tests/slurm/cluster.py up [NODES]     # prints the SLURM_CONF to export
    python tests/slurm/cluster.py down

Needs root on a Debian-like system (it installs Slurm and munge where they are missing) and leaves nothing behind but
its directory: no service, no line in /etc/hosts. Nodes are processes that pretend to have CPUs and memory; each has a
host name of its own where the kernel lets it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
CONTROLLER_PORT, NODE_PORT = 26817, 27000
HOSTS_TAG = "# sgt_titan test cluster"
NODE_VARIABLE = "SGT_TEST_NODE"  # slurmd is started with it
CPUS = 8
GPUS = 8  # files that Slurm counts: there is no device behind them
# A deadline that is too long costs nothing where a test passes; one that is too short fails it on a machine under load.
PATIENCE = 3.0

# Timeouts are short, so that a lost node is noticed in seconds, and long enough for a machine under load: srun ends a
# step whose node is slow to answer. cred_expire is also how long a requeued job waits; for
# less than 5 Slurm takes its default of 120.
CONFIG = """
ClusterName=sgttest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=1
SlurmdTimeout=10
TCPTimeout=3
MessageTimeout=15
KillWait=30
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=15 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def why_not() -> str:
    """Why no cluster can be had here; empty if one can."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    if all(map(shutil.which, PACKAGES)):
        return ""
    if not shutil.which("apt-get"):
        return "Slurm is not installed and there is no apt-get to install it"
    return install()


def install() -> str:
    """Install what is missing without starting a service; why that failed, or empty."""
    policy = Path("/usr/sbin/policy-rc.d")  # Debian asks it before it starts a service after an installation
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES.values()]
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (command, ["apt-get", "update", "-qq"], command):
            done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600)
            if done.returncode == 0 and words is command:
                return ""
        return f"Slurm could not be installed: {done.stderr.strip().splitlines()[-1:]}"
    finally:
        if ours:
            policy.unlink()


class Cluster:
    """``up`` starts it, ``down`` ends it and everything that ran in it."""

    def __init__(self, folder: Path, nodes: int = 4):
        self.folder, self.nodes = folder, [f"sgt{i}" for i in range(1, nodes + 1)]
        self.conf = folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.own_names = subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0

    # -- the whole ---------------------------------------------------------------------------------------------------

    def up(self) -> None:
        self.kill_everything()
        for name in ("state", "spool", "run", "log", "munge"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        host = os.uname().nodename.split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={name if self.own_names else host} NodeAddr=127.0.1.{i} "
            f"Port={NODE_PORT + i} CPUs={CPUS} RealMemory=16384 Gres=gpu:{GPUS} State=UNKNOWN"
            for i, name in enumerate(self.nodes, start=1)
        ]
        self.conf.write_text(CONFIG.format(host=host, port=CONTROLLER_PORT, folder=self.folder, nodes="\n".join(lines)))
        # Naming a plugin spares slurmd a search that fails in containers.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for index in range(GPUS):
            (self.folder / f"gpu{index}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        self._hosts(f"127.0.1.{i} {name}" for i, name in enumerate(self.nodes, start=1))
        munge = self.folder / "munge"
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(os.urandom(1024))
        munge.chmod(0o755)
        words = ["--socket", munge / "socket", "--key-file", munge / "key", "--pid-file", munge / "pid"]
        words += ["--log-file", munge / "log", "--seed-file", munge / "seed"]
        self._start("munged", ["munged", *map(str, words)], munge / "pid")
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        self.wait_idle(30)

    def down(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.call("scancel", "--user=root", check=False)
            self._until(lambda: not self.call("squeue", "-h", check=False), 10)
        self.kill_everything()
        self._hosts(())

    def kill_everything(self) -> None:
        for pid in [*self.processes(), *self._daemons()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_idle(self, seconds: float = 60) -> None:
        """Until every node is up and has nothing to do."""
        idle = lambda: self.call("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() == str(len(self.nodes))  # noqa: E731
        assert self._until(idle, seconds * PATIENCE), self.call("sinfo", "-R") + self.call("sinfo", "-N", "-l")

    # -- parts -------------------------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        self._start("slurmctld", ["slurmctld", "-f", str(self.conf)], self.folder / "run" / "slurmctld.pid")

    def stop_controller(self) -> None:
        self._stop(self.folder / "run" / "slurmctld.pid")

    def start_node(self, name: str) -> None:
        prefix = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name] if self.own_names else []
        words = [*prefix, "slurmd", "-N", name, "-f", str(self.conf)]
        self._start(name, words, self.folder / "run" / f"{name}.pid", {NODE_VARIABLE: f"{self.folder}:{name}"})

    def stop_slurmd(self, name: str) -> None:
        """The daemon alone dies; what it had started lives on."""
        self._stop(self.folder / "run" / f"{name}.pid")

    def kill_node(self, name: str) -> None:
        """As if the power had gone: daemon and everything it had started."""
        self.stop_slurmd(name)
        for pid in self.processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def set_node(self, name: str, state: str) -> None:
        """As an administrator would: down, resume, drain."""
        self.call("scontrol", "update", f"NodeName={name}", f"State={state}", "Reason=test")

    def processes(self, name: str = "", command: str = "") -> list[int]:
        """PIDs of everything the node (or any) has started, slurmd aside, whose command line holds ``command``."""
        ours, conf = f"{NODE_VARIABLE}={self.folder}:".encode(), f"SLURM_CONF={self.conf}".encode()
        found = []
        for pid, environment in _environments():
            # What slurmd starts inherits its environment; tasks have their job's, and the node's name.
            nodes = [line.removeprefix(ours) for line in environment if line.startswith(ours)]
            if conf in environment:
                nodes += [v.removeprefix(b"SLURMD_NODENAME=") for v in environment if v.startswith(b"SLURMD_NODENAME=")]
            if name.encode() in nodes or (nodes and not name):
                line = Path(f"/proc/{pid}/cmdline")
                with contextlib.suppress(OSError):
                    words = line.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if command in words and not words.startswith("slurmd "):
                        found.append(pid)
        return found

    # -- jobs --------------------------------------------------------------------------------------------------------

    def call(self, *words: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(words, env=self.env | (env or {}), capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """``scontrol show job`` as a table; empty for a job that is unknown or while the controller is away."""
        out = self.call("scontrol", "-o", "show", "job", str(number), check=False)
        return dict(word.split("=", 1) for word in out.split() if "=" in word)

    def state(self, number: int) -> str:
        return self.job(number).get("JobState", "")

    def wait_state(self, number: int, *states: str, seconds: float = 120) -> str:
        assert self._until(lambda: self.state(number) in states, seconds * PATIENCE), (
            f"job {number} is {self.state(number)}, not {states}"
        )
        return self.state(number)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _start(self, name: str, words: list[str], pid_file: Path, env: dict[str, str] | None = None) -> None:
        pid_file.unlink(missing_ok=True)
        log = self.folder / "log" / f"{name}.out"
        with log.open("a") as stream:
            done = subprocess.run(
                words,
                env=self.env | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                timeout=30,
            )
        assert done.returncode == 0 and self._until(pid_file.exists, 10), f"{name}: {log.read_text()[-2000:]}"

    def _stop(self, pid_file: Path) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = int(pid_file.read_text())
            os.kill(pid, signal.SIGKILL)
            self._until(lambda: not Path(f"/proc/{pid}").exists(), 10)
        pid_file.unlink(missing_ok=True)

    def _daemons(self) -> Iterator[int]:
        for file in [*(self.folder / "run").glob("*.pid"), self.folder / "munge" / "pid"]:
            with contextlib.suppress(OSError, ValueError):
                pid = int(file.read_text())
                if Path(f"/proc/{pid}/comm").read_text().strip() in ("slurmctld", "slurmd", "munged"):
                    yield pid

    def _hosts(self, lines) -> None:
        file = Path("/etc/hosts")  # written in place: in a container it may be a mount
        kept = [line for line in file.read_text().splitlines() if HOSTS_TAG not in line]
        file.write_text("\n".join([*kept, *(f"{line} {HOSTS_TAG}" for line in lines)]) + "\n")

    @staticmethod
    def _until(condition, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (found := condition()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return bool(found)


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), (folder / "environ").read_bytes().split(b"\0")


if __name__ == "__main__":
    home = Path(os.environ.get("SGT_TEST_CLUSTER", "/tmp/sgt-test-cluster"))
    cluster = Cluster(home, int(sys.argv[2]) if len(sys.argv) > 2 else 4)
    if sys.argv[1:2] == ["up"]:
        if reason := why_not():
            sys.exit(reason)
        cluster.up()
        print(f"export SLURM_CONF={cluster.conf}")
    elif sys.argv[1:2] == ["down"]:
        cluster.down()
    else:
        sys.exit(__doc__)
