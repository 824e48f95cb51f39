"""``sgt-titan doctor``: is this machine, or every node of a job, fit to train? Under a minute.

Under Slurm a process a GPU runs it before training (``slurm/run.sh``) and writes a report, which ``cluster/preflight.py``
judges. Phases, each in the report when it is done, so that it shows who kept the others waiting:

    begun        Slurm has started the process (slurm/run.sh writes it, before there is any Python)
    started      Python runs
    imported     torch is there
    local        device, memory, a matrix product; disks, clock, versions, network interfaces, trunk, dataset cache
    pairs        bytes over TCP to two other nodes: the one way to name a bad link or a node that hangs
    rendezvous   torch's process group of all
    node         all-reduce inside the node, checked
    all          all-reduce of everything, checked

    report: {"node", "process", "phase", "device", "errors": {name: text}, "versions": {}, "same": {}, "matmul": TFLOP/s,
    "pair": GB/s, "node_all_reduce": GB/s, "all_reduce": GB/s, "clock": s, "tmp_bytes", "output_free", "output_needed", "import_seconds",
    "stopped": why its collectives ended}
"""

# ruff: noqa: E501

from __future__ import annotations

import faulthandler
import json
import os
import platform
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sgt_titan
from sgt_titan import disk
from sgt_titan.arguments import Parser, number
from sgt_titan.cluster import preflight
from sgt_titan.config.check import validate
from sgt_titan.config.door import read_config, split_words
from sgt_titan.config.paths import expand, unset
from sgt_titan.config.schema import Config
from sgt_titan.config.trunk import read_trunk
from sgt_titan.errors import UserError
from sgt_titan.plan.weights import checkpoint_bytes

DEADLINE = 60.0  # seconds; a phase that hangs ends the process with its stacks
PAIR_BYTES = 32 << 20
MATMUL = {"cuda": 8192, "cpu": 768}  # rows and columns: long enough to time, short enough to bear
REDUCE_FLOATS = {"cuda": 1 << 26, "cpu": 1 << 20}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; alone, print what was found. Returns 0 fit, 1 not.

    Raises:
        UserError: an unknown option, or a config that cannot be read.
    """
    parser = Parser(
        prog="sgt-titan doctor",
        description="Check this machine: devices, disks, clock, versions, trunk and data of a config. Jobs run it on all "
        "their nodes before they train (docs/CLUSTER.md).",
        epilog="Further words are config overrides.",
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a config, whose trunk, data and directories are checked too"
    )
    parser.add_argument("--reports", type=Path, help="directory for the reports of a job's processes")
    parser.add_argument(
        "--deadline", type=number(float, above=0), default=DEADLINE, help="seconds (default %(default)g)"
    )
    arguments, overrides = split_words(parser, sys.argv[1:] if argv is None else argv)
    if overrides and not arguments.name:
        raise UserError(f"{overrides[0]}: overrides need the NAME of a config")
    config = read_config(arguments.name, overrides)[0] if arguments.name else None
    faulthandler.dump_traceback_later(arguments.deadline, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        if arguments.reports:
            return in_a_job(config, arguments.reports, arguments.deadline)
        return alone(config)
    finally:
        faulthandler.cancel_dump_traceback_later()


def alone(config: Config | None) -> int:
    report: dict[str, Any] = {"node": socket.gethostname(), "errors": {}}
    local(report, config, 0)
    report["phase"] = preflight.PHASES[-1]  # there is nobody to wait for
    found = preflight.judge([report], [report["node"]], 1)
    lines = [("device", f"{report['device']}  {report['same'].get('device', '')}")]
    lines += [("product", f"{report['matmul']:.3g} TFLOP/s")] if "matmul" in report else []
    lines += [("temporary files", f"{report['tmp_bytes'] / 2**30:.1f} GiB free in {tempfile.gettempdir()}")]
    if config is not None:
        free = f"{report['output_free'] / 2**30:.1f} GiB free at " if "output_free" in report else ""
        lines += [("checkpoints", f"{free}{config.run.output_dir}")]
        where = "not known" if unset(config.trunk.path) else config.trunk.path
        lines += [("trunk", f"{where}  {report['same'].get('trunk', '')[:12]}".rstrip())]
        lines += [("dataset cache", report["cache"])]
    lines += [(name, text) for name, text in report["versions"].items()]
    for name, text in lines:
        print(f"  {name:<16} {text}")
    problems = [*found.bad.values(), *found.problems]
    for text in problems:
        print(f"  PROBLEM          {text}")
    print("not fit to train" if problems else "fit to train")
    return 1 if problems else 0


def in_a_job(config: Config | None, folder: Path, deadline: float) -> int:
    """One process of many; what it finds is in its report, and the exit code says nothing about the others."""
    rank, size = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    here, node = int(os.environ.get("SLURM_LOCALID", "0")), os.environ.get("SLURMD_NODENAME", socket.gethostname())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{node}-{here}.json"
    report: dict[str, Any] = {
        "node": node,
        "process": here,
        "index": int(os.environ.get("SLURM_NODEID", "0")),
        "errors": {},
    }
    listener = Listener() if here == 0 else None
    report["address"] = [socket.gethostname(), listener.port] if listener else None

    def done(phase: str) -> None:
        report["phase"] = phase
        disk.write(file, json.dumps(report))

    begun = file.stat().st_mtime if file.is_file() else None
    done("started")
    import torch  # noqa: F401 (what takes longest, and fails where the environment is another)

    done("imported")
    if begun is not None:
        report["import_seconds"] = file.stat().st_mtime - begun
    local(report, config, here, beside=folder)
    done("local")
    if listener:
        pairs(report, folder, int(os.environ.get("SLURM_NNODES", "1")), patience=deadline / 4)
    done("pairs")
    collectives(report, rank, size, here, size // int(os.environ.get("SLURM_NNODES", "1")), deadline / 3, done)
    return 0


# -- local -------------------------------------------------------------------------------------------------------------


def local(report: dict[str, Any], config: Config | None, process: int, beside: Path | None = None) -> None:
    """Everything that one process can find out by itself."""
    import torch

    report["versions"] = versions()
    report["device"] = device = "cuda" if torch.cuda.is_available() else "cpu"
    report["same"] = {"device": device}
    attempt(report, device, lambda: _device(report, device, process))
    report["tmp_bytes"] = disk.free(tempfile.gettempdir())
    attempt(
        report, "network interface", lambda: check_interfaces(os.environ, [name for _, name in socket.if_nameindex()])
    )
    attempt(report, "clock", lambda: report.update(clock=_clock(beside or Path(tempfile.gettempdir()))))
    if config is None:
        return
    attempt(report, "trunk", lambda: report["same"].update(trunk=_trunk(expand(config.trunk.path, "trunk.path"))))
    attempt(report, "run.output_dir", lambda: report.update(output_free=_free(config.run.output_dir)))
    if "trunk" not in report["errors"]:  # all that `train` would refuse of it, from config.json and headers
        attempt(report, "trunk", lambda: validate(config, None, read_trunk(config)))
    if config.run.task == "sgt" and "trunk" not in report["errors"]:
        attempt(report, "trunk", lambda: report.update(output_needed=checkpoint_bytes(config, read_trunk(config))))
    cache = Path(config.data.cache_dir)
    made = [entry for entry in cache.iterdir() if entry.is_dir() and len(entry.name) == 64] if cache.is_dir() else []
    report["cache"] = f"{len(made)} in {cache}" if made else f"none in {cache}: the first start will tokenize"


def attempt(report: dict[str, Any], name: str, action: Callable[[], Any]) -> None:
    """A check that fails is a finding, not the end of the others."""
    try:
        action()
    except Exception as error:
        report["errors"][name] = " ".join(str(error).removeprefix(f"{name}: ").split())[:300] or type(error).__name__


def versions() -> dict[str, str]:
    import torch

    found = {"sgt_titan": sgt_titan.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchtitan", "transformers", "safetensors"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    with suppress(OSError):
        found["driver"] = Path("/proc/driver/nvidia/version").read_text().split("Module")[1].split()[0]
    return found


def _device(report: dict[str, Any], device: str, process: int) -> None:
    import torch

    if device == "cuda":
        if process >= torch.cuda.device_count():
            raise RuntimeError(f"{torch.cuda.device_count()} GPUs are visible, process {process} has none")
        torch.cuda.set_device(process)
        props = torch.cuda.get_device_properties(process)
        report["same"]["device"] = f"{props.name} {props.total_memory / 2**30:.0f} GiB"
        free, total = torch.cuda.mem_get_info(process)
        if free < 0.9 * total:
            raise RuntimeError(f"GPU {process}: {(total - free) / 2**30:.1f} GiB are in use by somebody else")
    report["matmul"] = matmul(device)


def matmul(device: str) -> float:
    """TFLOP/s of a square product, bfloat16 on a GPU and float32 on a CPU: the fastest of five.

    What else runs on a machine slows some of them; a throttled device is slow every time.
    """
    import torch

    n, dtype = MATMUL[device], torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    if not product.isfinite().all():
        raise RuntimeError("a matrix product is not finite")
    return 2 * n**3 / min(seconds[1:]) / 1e12


def check_interfaces(env: Mapping[str, str], present: Sequence[str]) -> None:
    """Raises RuntimeError where NCCL or gloo is told to talk over an interface that this machine does not have; they would
    say so in a process's log alone, or wait.
    """
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        text = env.get(variable, "")
        if not text or text.startswith("^"):  # all but these
            continue
        exact = variable.startswith("GLOO") or text.startswith("=")
        names = [name.strip() for name in text.lstrip("=").split(",") if name.strip()]
        if not any(have == name or (not exact and have.startswith(name)) for have in present for name in names):
            raise RuntimeError(f"{variable}={text}: no such interface; here are {', '.join(present)}")


def _clock(folder: Path) -> float:
    """Seconds by which this clock is ahead of the file server's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
        file.write(b"0")
        file.flush()
        return time.time() - os.stat(file.name).st_mtime


def _trunk(path: str) -> str:
    from sgt_titan.transform.trunk_files import TrunkFiles

    return TrunkFiles(path).fingerprint()


def _free(folder: str) -> int:
    return disk.free(disk.writable(folder, "run.output_dir"))


# -- between nodes -----------------------------------------------------------------------------------------------------


class Listener:
    """Sends ``PAIR_BYTES`` to whoever connects, from a thread."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("", 0), backlog=8)
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        payload = bytes(1 << 20)
        while True:
            connection, _ = self.socket.accept()
            with suppress(OSError), connection:
                for _ in range(PAIR_BYTES // len(payload)):
                    connection.sendall(payload)


def pairs(report: dict[str, Any], folder: Path, nodes: int, patience: float) -> None:
    """Read from the next two nodes; ``pair`` is the better rate in GB/s, since one bad neighbour is not our fault."""
    rates, unreached = [], []
    for step in {1 % nodes, 2 % nodes} - {0}:
        peer = _wait_for((report["index"] + step) % nodes, folder, patience)
        if peer is None:
            continue  # absent: the judge names it, and nobody else is to blame
        try:
            rates.append(_read_from(peer, patience))
        except OSError as error:
            unreached.append(f"{peer['node']} ({error})")
    if rates:
        report["pair"] = max(rates)
    elif unreached:
        report["errors"]["network"] = f"cannot read from {', '.join(unreached)}"


def _wait_for(index: int, folder: Path, patience: float) -> Any:
    """The report of the first process of a node, once it listens; None if it does not come."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        for found in preflight.read_reports(folder):
            if found["index"] == index and found["address"]:
                return found
        time.sleep(0.1)
    return None


def _read_from(peer: Any, patience: float) -> float:
    with socket.create_connection(tuple(peer["address"]), timeout=patience) as connection:
        got = len(connection.recv(1))  # others may be served first, and waiting for them is not the link's doing
        began = time.perf_counter()
        while chunk := connection.recv(1 << 20):
            got += len(chunk)
    if got != PAIR_BYTES:
        raise OSError("cut off")
    return got / (time.perf_counter() - began) / 1e9


class WrongSumError(Exception):
    """An all-reduce that lies."""


def collectives(
    report: dict[str, Any], rank: int, size: int, here: int, per_node: int, patience: float, done: Callable[[str], None]
) -> None:
    """All-reduces as training does them; what cannot be done in time ends here, with the phase it got to on record."""
    import torch.distributed as dist

    if size == 1:
        return done("all")
    backend = "nccl" if report["device"] == "cuda" else "gloo"
    address = f"tcp://{os.environ['SGT_HEAD']}:{os.environ['SGT_PREFLIGHT_PORT']}"
    try:
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=patience)
        )
        done("rendezvous")
        groups = [dist.new_group(range(i, i + per_node)) for i in range(0, size, per_node)]
        if per_node > 1:
            report["node_all_reduce"] = all_reduce(report["device"], groups[rank // per_node])
        done("node")
        report["all_reduce"] = all_reduce(report["device"], dist.group.WORLD)
        done("all")
    except WrongSumError as error:
        report["errors"]["all-reduce"] = str(error)
        done(report["phase"])
        os._exit(0)
    except RuntimeError as error:  # a time limit, or a peer that is gone: the judge sees who got how far
        report["stopped"] = " ".join(str(error).split())[:300]
        print(f"preflight: process {here} of {report['node']}: {report['stopped']}", file=sys.stderr)
        done(report["phase"])
        os._exit(0)  # destroying a group that hangs would hang


def all_reduce(device: str, group: Any) -> float:
    """GB/s on the bus of a checked sum (each rank moves 2 (n - 1) / n of the bytes), the fastest of five: a degraded
    link is slow every time.

    Raises:
        WrongSumError: what came out is not the sum.
        RuntimeError: a rank did not take part in time.
    """
    import torch
    import torch.distributed as dist

    n, count, rank = dist.get_world_size(group), REDUCE_FLOATS[device], dist.get_rank(group)
    seconds = []
    for _ in range(6):
        values = torch.full((count,), float(rank + 1), device=device)
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        low, high = values.min().item(), values.max().item()
        seconds.append(time.perf_counter() - began)
        if (low, high) != (n * (n + 1) / 2,) * 2:
            raise WrongSumError(f"an all-reduce over {n} ranks gave {low} to {high}, not {n * (n + 1) / 2}")
    return 2 * (n - 1) / n * count * 4 / min(seconds[1:]) / 1e9


if __name__ == "__main__":
    from sgt_titan.errors import guarded

    code = guarded(main)
    sys.stdout.flush()
    os._exit(code)
