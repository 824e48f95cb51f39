"""Every kind of bad node is named from hand-made reports, and only that one."""

from __future__ import annotations

import json
import os
import shlex

import pytest

from sgt_titan.cluster import preflight, status
from sgt_titan.cluster.preflight import PHASES, exclude, excluded, judge
from sgt_titan.errors import UserError

NODES = ("n1", "n2", "n3", "n4")


def report(node: str, process: int = 0, **changes) -> dict:
    return {
        "node": node,
        "process": process,
        "phase": PHASES[-1],
        "device": "cuda",
        "errors": {},
        "versions": {"torch": "2.13.0", "driver": "580.1"},
        "same": {"device": "A100 80 GiB", "trunk": "aa" * 16},
        "matmul": 240.0,
        "pair": 10.0,
        "node_all_reduce": 200.0,
        "clock": 0.01,
        "tmp_bytes": 50 << 30,
        "output_free": 1 << 40,
    } | changes


def group(**odd) -> list[dict]:
    """Two processes of each node; n3 has ``odd``."""
    return [report(node, i, **(odd if node == "n3" else {})) for node in NODES for i in range(2)]


def test_a_healthy_group():
    found = judge(group(), NODES, 2)
    assert (found.bad, found.problems, found.remarks) == ({}, [], [])


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"errors": {"cuda": "7 GPUs are visible, process 7 has none"}}, "cuda: 7 GPUs are visible"),
        ({"matmul": 120.0}, "matmul 120 TFLOP/s, elsewhere 240"),
        ({"pair": 1.0}, "pair 1 GB/s, elsewhere 10"),
        ({"node_all_reduce": 20.0}, "node all reduce 20 GB/s, elsewhere 200"),
        ({"versions": {"torch": "2.12.0", "driver": "580.1"}}, "torch 2.12.0, elsewhere 2.13.0"),
        ({"same": {"device": "A100 40 GiB", "trunk": "aa" * 16}}, "device A100 40 GiB, elsewhere A100 80 GiB"),
        ({"same": {"device": "A100 80 GiB", "trunk": "bb" * 16}}, "trunk " + "bb" * 12 + ", elsewhere"),
        ({"clock": 3600.0}, "its clock is +3600 s off"),
        ({"tmp_bytes": 1 << 20}, "1 MiB free in its temporary directory"),
        ({"phase": "rendezvous"}, "did not get beyond 'rendezvous' in time"),
    ],
)
def test_what_is_wrong_with_one_node(odd, reason):
    found = judge(group(**odd), NODES, 2)
    assert list(found.bad) == ["n3"] and reason in found.bad["n3"] and not found.problems


def test_one_of_its_processes_is_enough():
    reports = [*group()[:-1], report("n4", 1, matmul=100.0)]
    assert list(judge(reports, NODES, 2).bad) == ["n4"]


def test_the_slow_one_of_two_is_named():
    assert list(judge([report("n1", matmul=100.0), report("n2")], ["n1", "n2"], 1).bad) == ["n1"]


def test_the_absent_one_is_named_and_not_those_who_waited_for_it():
    waiting = [report(node, i, phase="pairs") for node in NODES[:3] for i in range(2)]
    assert judge(waiting, NODES, 2).bad == {"n4": "did not report; Slurm started no process on it"}
    begun = [*waiting, *(report("n4", i, phase="begun") for i in range(2))]
    assert judge(begun, NODES, 2).bad == {"n4": "did not report"}
    said = {"n4": "ImportError: libcudart.so.13: cannot open shared object file"}
    assert judge(begun, NODES, 2, said).bad == {"n4": f"did not report: {said['n4']}"}
    half = judge([*waiting, report("n4", 0, phase="pairs")], NODES, 2)
    assert half.bad == {"n4": "1 of 2 processes reported"}


def test_if_all_are_stuck_nobody_is_blamed():
    found = judge([report(node, i, phase="node") for node in NODES for i in range(2)], NODES, 2)
    assert not found.bad and found.problems == ["no node got beyond 'node' in time; SGT_PREFLIGHT_SECONDS gives more"]
    reports = [report(node, i, phase="pairs", stopped="no route") for node in NODES for i in range(2)]
    assert judge(reports, NODES, 2).problems == ["no node got beyond 'pairs': no route (on n1)"]


def test_what_every_node_has_is_no_node_s_fault():
    absent = judge([], NODES, 2, seconds=90)
    assert not absent.bad and absent.problems == ["no process was started within 90 s"]
    broken = judge([report(node, errors={"trunk": f"no file on {node}"}) for node in NODES], NODES, 1)
    assert not broken.bad and broken.problems == ["every node: trunk: no file on n1"]


@pytest.mark.parametrize("nodes", [NODES[:1], NODES], ids=["one node", "four"])
@pytest.mark.parametrize("phase", ["begun", "started"])
def test_a_process_that_cannot_start_says_nothing_of_its_node(phase, nodes):
    """A container that is missing, an environment without torch: what all have, or one alone, is the job's doing."""
    reports = [report(node, i, phase=phase) for node in nodes for i in range(2)]
    found = judge(reports, nodes, 2, {"n1": "bash: line 4: apptainer: command not found"}, 90)
    assert not found.bad
    assert found.problems == ["no process could start: bash: line 4: apptainer: command not found (on n1)"]


def test_a_deadline_shorter_than_the_imports_blames_nobody():
    slow = [report(node, i, phase="started") for node in NODES for i in range(2)]
    said = "no process got past its imports within 20 s; SGT_PREFLIGHT_SECONDS gives more"
    assert judge(slow, NODES, 2, {}, 20).problems == [said]
    # Some were just in time: the others are no worse for that.
    half = [*slow[:4], *(report(node, i, import_seconds=15.0) for node in NODES[2:] for i in range(2))]
    found = judge(half, NODES, 2, {}, 20)
    assert not found.bad and found.problems == [
        "2 of 4 nodes: no process got past its imports within 20 s; where it did, that took 15 s; "
        "SGT_PREFLIGHT_SECONDS gives more"
    ]
    # With time to spare elsewhere it is the node.
    assert list(judge(half, NODES, 2, {}, 90).bad) == ["n1", "n2"]


def test_one_node_is_left_out_only_for_what_a_machine_can_have():
    alone = ["n1"]
    assert judge([report("n1", errors={"cuda": "GPU 0: 30 GiB are in use by somebody else"})], alone, 1).bad
    found = judge([report("n1", errors={"trunk": "no such file"})], alone, 1)
    assert not found.bad and found.problems == ["n1: trunk: no such file"]
    assert not judge([], alone, 2).bad


@pytest.mark.parametrize(
    ("said", "variables"),
    [
        ("no process could start: apptainer: command not found (on n1)", ["SGT_WRAP", "SGT_ACTIVATE"]),
        ("no process could start: ModuleNotFoundError: No module named 'torch' (on n1)", ["SGT_ACTIVATE", "SGT_WRAP"]),
        ("no node got beyond 'pairs': no route (on n1)", ["NCCL_SOCKET_IFNAME"]),
        ("every node: trunk: no such file", []),
    ],
)
def test_the_variable_that_matters_is_named(said, variables):
    env = {"SGT_WRAP": "apptainer exec", "SGT_ACTIVATE": "true", "NCCL_SOCKET_IFNAME": "ib0"}
    given = " and ".join(f"{name}={shlex.quote(env[name])}" for name in variables)
    assert preflight._variable(said, env) == (f"; look at {given} in slurm/site.env" if given else "")


def test_a_little_skew_is_a_remark_and_noise_on_cpus_is_nothing():
    assert judge(group(clock=5.0), NODES, 2).remarks == ["n3: its clock is +5.0 s off"]
    cpus = [report(node, device="cpu", matmul=rate) for node, rate in zip(NODES, (1.0, 0.04, 0.9, 1.1), strict=True)]
    assert not judge(cpus, NODES, 1).bad


def test_a_full_output_directory_is_nobody_s_fault():
    found = judge([report(node, output_free=1 << 30, output_needed=4 << 30) for node in NODES], NODES, 1)
    assert not found.bad and "4.0 GiB are needed for checkpoints, 1.0 GiB are free" in found.problems[0]


def test_exclusion_ends(tmp_path):
    exclude(tmp_path, {"n1": "slow"}, now=0.0)
    exclude(tmp_path, {"n2": "absent"}, now=preflight.EXCLUDED_SECONDS - 10)
    assert excluded(tmp_path, now=preflight.EXCLUDED_SECONDS - 5) == {"n1": "slow", "n2": "absent"}
    assert excluded(tmp_path, now=preflight.EXCLUDED_SECONDS + 5) == {"n2": "absent"}
    for spoilt in ("not JSON", "[]", '{"n1": "slow"}', '{"n1": {"until": 1e99}}'):
        (tmp_path / preflight.EXCLUDED).write_text(spoilt)
        assert excluded(tmp_path) == {}
        exclude(tmp_path, {"n2": "absent"})
        assert excluded(tmp_path) == {"n2": "absent"}


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    def verdict(reports: list[dict], usable: int | None) -> int:
        monkeypatch.setattr(preflight, "usable_nodes", lambda partition, without: usable)
        folder = tmp_path / "reports"
        folder.mkdir()
        for one in reports:
            (folder / f"{one['node']}-{one['process']}.json").write_text(json.dumps(one))
        (folder / "cut.json").write_text('{"node": "n')  # a process that died while writing
        words = [str(tmp_path), "--reports", str(folder), "--processes", "2", "--nodes", *NODES]
        return preflight.main(["verdict", *words])

    return verdict


def test_a_bad_node_leads_to_another_start_without_it(verdict, tmp_path, capsys):
    assert verdict(group(matmul=10.0), usable=4) == 3
    assert list(excluded(tmp_path)) == ["n3"] and "bad node n3: matmul 10" in capsys.readouterr().err
    assert status.read(tmp_path)["state"] == "unfit"
    assert preflight.main(["excluded", str(tmp_path)]) == 0 and capsys.readouterr().out == "n3\n"


def test_too_few_good_nodes_is_the_end(verdict, tmp_path):
    with pytest.raises(UserError, match=r"4 nodes are needed, 3 are up and not excluded \(n3: matmul 10"):
        verdict(group(matmul=10.0), usable=3)
    assert status.read(tmp_path)["state"] == "refused"


def test_checks_that_were_ended_with_their_job_blame_nobody(tmp_path):
    words = [str(tmp_path), "--reports", str(tmp_path), "--processes", "2", "--nodes", *NODES]
    assert preflight.main(["verdict", *words, "--notice", "SIGTERM"]) == 3
    assert excluded(tmp_path) == {}
    assert status.read(tmp_path)["state"] == "stopped" and status.read(tmp_path)["reason"] == "SIGTERM before training"


@pytest.mark.parametrize(
    ("state", "up"), [("idle", 2), ("plnd", 2), ("mix-", 2), ("alloc^", 2), ("drain", 1), ("down*", 1)]
)
def test_nodes_that_can_be_had(state, up, tmp_path, monkeypatch):
    (tmp_path / "sinfo").write_text(
        f'#!/bin/sh\ntest "$3" = "--format=%N %t" || exit 3\necho n1 {state}\necho n2 idle\n'
    )
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert preflight.usable_nodes("gpu", ["n9"]) == up


def test_fit(verdict, tmp_path):
    assert verdict(group(), usable=None) == 0 and status.read(tmp_path) is None
