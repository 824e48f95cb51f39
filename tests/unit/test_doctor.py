"""The measuring half: what one process finds out, and several that start, hang or are slow."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sgt_titan import disk, doctor
from sgt_titan.cluster import preflight
from sgt_titan.errors import UserError

REPO = Path(__file__).resolve().parents[2]


def test_this_machine(capsys, monkeypatch, tmp_path):
    assert doctor.main(["demo", "--run.output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for word in ("device", "product", "trunk", "dataset cache", "torch", "fit to train"):
        assert word in printed
    assert not (tmp_path / "out").exists()


def test_a_trunk_below_a_variable_that_is_not_set(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SGT_TRUNKS", raising=False)
    assert doctor.main(["llama3_1b", "--run.output_dir", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert (
        "trunk.path: environment variable SGT_TRUNKS is not set" in printed and "trunk            not known" in printed
    )


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "ib0", False),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),  # a prefix
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "^lo", True),
        ("NCCL_SOCKET_IFNAME", "ib,lo", True),
    ],
)
def test_a_network_interface_that_is_not_here(variable, value, fits):
    if fits:
        return doctor.check_interfaces({variable: value}, ["lo", "eth0"])
    with pytest.raises(RuntimeError, match=f"{variable}={value}: no such interface; here are lo, eth0"):
        doctor.check_interfaces({variable: value}, ["lo", "eth0"])


def test_a_damaged_trunk_is_a_finding(capsys, tmp_path):
    trunk = tmp_path / "trunk"
    trunk.mkdir()
    (trunk / "config.json").write_text("{}")
    (trunk / "model.safetensors").write_bytes(b"not safetensors")
    report = {"errors": {}, "same": {}}
    doctor.attempt(report, "trunk", lambda: doctor._trunk(str(trunk)))
    assert "model.safetensors" in report["errors"]["trunk"]


def test_a_deadline_that_has_passed():
    with pytest.raises(UserError, match="--deadline must be above 0, got 0"):
        doctor.main(["demo", "--deadline", "0"])


def test_an_output_directory_that_cannot_be(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert doctor.main(["demo", "--run.output_dir", str(tmp_path / "file" / "out")]) == 1
    assert (
        f"run.output_dir: {tmp_path}/file/out cannot be made: {tmp_path}/file is not a directory"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor.main(["demo", "--run.output_dir", str(tmp_path / "out")]) == 1
    assert f"run.output_dir: {tmp_path}/out cannot be written: no permission in {tmp_path}" in capsys.readouterr().out


def test_a_disk_without_room_for_a_checkpoint(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free", lambda folder: 1 << 20)
    assert doctor.main(["demo", "--run.output_dir", str(tmp_path / "out")]) == 1
    assert "GiB are needed for checkpoints, 0.0 GiB are free" in capsys.readouterr().out


def test_a_neighbour_that_serves_somebody_else_first_is_not_slow():
    listener = doctor.Listener()
    peer = {"address": ["127.0.0.1", listener.port], "node": "b"}
    with socket.create_connection(tuple(peer["address"])) as first:
        first.recv(1)
        reading = threading.Thread(target=lambda: rates.append(doctor._read_from(peer, 10.0)))
        rates: list[float] = []
        reading.start()
        time.sleep(2)
    reading.join()
    assert rates[0] > doctor.PAIR_BYTES / 1e9  # not as if it had taken the two seconds


def test_a_neighbour_that_is_cut_off():
    listener = doctor.Listener()
    rate = doctor._read_from({"address": ["127.0.0.1", listener.port], "node": "b"}, 5.0)
    assert 0 < rate < 1000
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        doctor._read_from({"address": ["127.0.0.1", port], "node": "b"}, 1.0)


@pytest.mark.distributed
def test_three_nodes_of_which_one_hangs(tmp_path):
    """All end in time, and the judge names the one; the reports of the others are whole but for what needs all."""
    began = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hang = "import os, time\nif os.environ.get('SLURMD_NODENAME') == 'n1': time.sleep(600)\n"
    (tmp_path / "sitecustomize.py").write_text(hang)
    processes = []
    for index in range(3):
        env = {
            "PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPO))),
            "SLURM_PROCID": str(index),
            "SLURM_NODEID": str(index),
            "SLURM_LOCALID": "0",
            "SLURM_NTASKS": "3",
            "SLURM_NNODES": "3",
            "SLURMD_NODENAME": f"n{index}",
            "SGT_HEAD": "127.0.0.1",
            "SGT_PREFLIGHT_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        words = [sys.executable, "-m", "sgt_titan.doctor", "--reports", str(tmp_path / "reports"), "--deadline", "28"]
        processes.append(subprocess.Popen(words, env=os.environ | env, stderr=subprocess.DEVNULL))
    for process in (processes[0], processes[2]):
        process.wait(timeout=120)
    processes[1].kill()
    processes[1].wait()
    assert time.monotonic() - began < 120
    reports = preflight.read_reports(tmp_path / "reports")
    assert {r["node"]: r["phase"] for r in reports} == {"n0": "pairs", "n2": "pairs"}
    assert all(r["pair"] > 0 for r in reports)
    found = preflight.judge(reports, ["n0", "n1", "n2"], 1)
    assert found.bad == {"n1": "did not report; Slurm started no process on it"} and not found.problems
