"""Which nodes of an allocation are fit to train on, judged from what each measured; and which to leave out next time.

    <output_dir>/preflight/ATTEMPT/NODE-LOCALRANK.json   what a process of ``sgt_titan.doctor`` found, phase by phase
    <output_dir>/excluded_nodes.json                     {node: {"reason", "until"}}, until in seconds since 1970

Reports are files, not messages: a node that hangs or never starts is known by the file that is missing, and nobody
waits for it. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgt_titan import disk
from sgt_titan.arguments import Parser
from sgt_titan.cluster import status
from sgt_titan.cluster.cause import error_line
from sgt_titan.cluster.ownership import attempt_name
from sgt_titan.errors import UserError, guarded

EXCLUDED = "excluded_nodes.json"
REPORTS = "preflight"
EXCLUDED_SECONDS = 24 * 3600.0  # by then somebody has mended it, or it is found again

SLOW = 0.6  # of the group's median, for products and for links: a throttled or degraded device, beyond any noise
CLOCK_SECONDS = 60.0  # of skew; less is told, not punished
TMP_BYTES = 1 << 30

# sinfo's short states of a node that can be had sooner or later.
UP = ("idle", "alloc", "mix", "comp", "resv", "plnd", "boot")

# In the order in which a process comes to them. begun: Slurm has started it, before there is any Python; started:
# Python runs; imported: torch is there.
PHASES = ("begun", "started", "imported", "local", "pairs", "rendezvous", "node", "all")
# Findings that no other node's would be needed to believe: they are of the machine, not of what the job was given.
OF_THE_NODE = ("cpu", "cuda", "clock", "all-reduce")

Report = Mapping[str, Any]


@dataclass
class Verdict:
    """``bad``: reason by node, and each alone is enough to leave the node out. ``problems``: of no single node."""

    bad: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def judge(
    reports: Sequence[Report], nodes: Sequence[str], processes: int, said: Mapping[str, str] | None = None,
    seconds: float = float("inf"),
) -> Verdict:  # fmt: skip
    """What the reports say of the nodes.

    A node is blamed for what is seen on it and not on the others, or for what only a machine can have. What all have
    alike, or might have for all that is known of one node, is the job's own doing: other nodes would not help.

    Args:
        reports: one of each process that wrote one; ``sgt_titan/doctor.py`` says what is in them.
        nodes: all that should have.
        processes: that each of them should have.
        said: by node, the last error line that its processes printed.
        seconds: that they had.
    """
    found, said = Verdict(), said or {}
    by_node: dict[str, list[Report]] = {node: [r for r in reports if r["node"] == node] for node in nodes}

    def bad(node: str, reason: str) -> None:
        found.bad.setdefault(node, reason)  # the first is the nearest to the cause

    if _absent_ones(by_node, processes, said, seconds, bad, found.problems):
        return found
    errors = [(node, name, text) for node, own in by_node.items() for r in own for name, text in r["errors"].items()]
    for node, name, text in errors:
        having = {other for other, same, _ in errors if same == name}
        if name in OF_THE_NODE or len(having) < len(nodes):
            bad(node, f"{name}: {text}")
        elif not any(problem.startswith(f"every node: {name}") for problem in found.problems):
            found.problems.append(f"every node: {name}: {text}" if len(nodes) > 1 else f"{node}: {name}: {text}")
    for node, own in by_node.items():
        for report in own:
            if report.get("tmp_bytes", TMP_BYTES) < TMP_BYTES:
                bad(node, f"{report['tmp_bytes'] / 2**20:.0f} MiB free in its temporary directory")
    _odd_ones(by_node, bad)
    _slow_ones(by_node, bad)
    _clocks(by_node, bad, found.remarks)
    if not found.problems:
        _stragglers(by_node, bad, found.problems)
    if len(nodes) > 1 and len(found.bad) == len(nodes) and len(set(found.bad.values())) == 1:
        found.problems.append(f"every node: {found.bad[nodes[0]]}")  # the job's own doing: no other nodes would help
        found.bad.clear()
    needed = max((r.get("output_needed", 0) for r in reports), default=0)
    free = min((r["output_free"] for r in reports if "output_free" in r), default=needed)
    if free < needed:
        found.problems.append(
            f"run.output_dir: {needed / 2**30:.1f} GiB are needed for checkpoints, {free / 2**30:.1f} GiB are free"
        )
    return found


def _absent_ones(
    by_node: Mapping[str, Sequence[Report]], processes: int, said: Mapping[str, str], seconds: float,
    bad: Callable[[str, str], None], problems: list[str],
) -> bool:  # fmt: skip
    """Nodes with processes that did not get past their imports. True if nothing can be said of any node, and why.

    Such a process says nothing about its node, unless another node's had come further by then with time to spare.
    """
    imported = PHASES.index("imported")
    past = {n: sum(PHASES.index(r.get("phase", PHASES[0])) >= imported for r in own) for n, own in by_node.items()}
    absent = [node for node, count in past.items() if count < processes]
    if not absent:
        return False
    elsewhere = [node for node in by_node if node not in absent]
    took = max((r.get("import_seconds", 0.0) for own in by_node.values() for r in own), default=0.0)
    if not elsewhere or (took > seconds / 2 and not any(said.get(node) for node in absent)):
        problems.append(_why_absent(by_node, absent, said, seconds, took))
        return True
    for node in absent:
        count = f"{past[node]} of {processes} processes reported" if past[node] else "did not report"
        begun = "" if by_node[node] else "; Slurm started no process on it"
        bad(node, count + (f": {said[node]}" if said.get(node) else begun))
    return False


def _why_absent(
    by_node: Mapping[str, Sequence[Report]], absent: Sequence[str], said: Mapping[str, str], seconds: float, took: float
) -> str:
    everyone = "no process" if len(absent) == len(by_node) else f"{len(absent)} of {len(by_node)} nodes: no process"
    spoken = next((node for node in absent if said.get(node)), None)
    if spoken is not None:
        return f"{everyone} could start: {said[spoken]} (on {spoken})"
    if not any(by_node.values()):
        return f"{everyone} was started within {seconds:.0f} s"
    slow = f"; where it did, that took {took:.0f} s" if took else ""
    return f"{everyone} got past its imports within {seconds:.0f} s{slow}; SGT_PREFLIGHT_SECONDS gives more"


def _odd_ones(by_node: Mapping[str, Sequence[Report]], bad: Callable[[str, str], None]) -> None:
    """Versions, trunk and kind of device: what most have is taken to be right."""
    facts = [(node, name, str(value)) for node, own in by_node.items() for r in own for name, value in _facts(r)]
    for name in dict.fromkeys(name for _, name, _ in facts):
        usual = statistics.mode(value for _, other, value in facts if other == name)
        for node, other, value in facts:
            if other == name and value != usual:
                bad(node, f"{name} {value[:24]}, elsewhere {usual[:24]}")


def _facts(report: Report) -> list[tuple[str, Any]]:
    return [*report.get("versions", {}).items(), *report.get("same", {}).items()]


def _slow_ones(by_node: Mapping[str, Sequence[Report]], bad: Callable[[str, str], None]) -> None:
    if any(r.get("device") == "cpu" for own in by_node.values() for r in own):
        return  # CPUs share their cores with anything: twelve times slower was seen on a healthy one
    for name, unit in (("matmul", "TFLOP/s"), ("node_all_reduce", "GB/s"), ("pair", "GB/s")):
        worst = {n: min(r[name] for r in own if name in r) for n, own in by_node.items() if any(name in r for r in own)}
        if len(worst) < 2:
            continue
        for node, value in worst.items():
            # The others' median: of two nodes the slow one would pull its own yardstick down.
            median = statistics.median(other for name, other in worst.items() if name != node)
            if value < SLOW * median:
                bad(node, f"{name.replace('_', ' ')} {value:.3g} {unit}, elsewhere {median:.3g}")


def _clocks(by_node: Mapping[str, Sequence[Report]], bad: Callable[[str, str], None], remarks: list[str]) -> None:
    """Each clock against the file server's, which they share."""
    skew = {node: own[0]["clock"] for node, own in by_node.items() if own and "clock" in own[0]}
    if len(skew) < 2:
        return
    for node, value in skew.items():
        off = value - statistics.median(other for name, other in skew.items() if name != node)
        if abs(off) > CLOCK_SECONDS:
            bad(node, f"its clock is {off:+.0f} s off")
        elif abs(off) > 2:
            remarks.append(f"{node}: its clock is {off:+.1f} s off")


def _stragglers(by_node: Mapping[str, Sequence[Report]], bad: Callable[[str, str], None], problems: list[str]) -> None:
    """Who kept the others waiting: the nodes that came least far, if they are not all of them."""
    imported = PHASES.index("imported")
    reached = {node: min(PHASES.index(r.get("phase", PHASES[0])) for r in own) for node, own in by_node.items() if own}
    here = {node: phase for node, phase in reached.items() if phase >= imported}
    if not here or min(here.values()) == len(PHASES) - 1 or len(here) < len(by_node):
        return  # those that are absent are named already, and are why the others got no further
    least = min(here.values())
    behind = [node for node, phase in here.items() if phase == least]
    heard = {node: r["stopped"] for node, own in by_node.items() for r in own if "stopped" in r}
    if len(behind) < len(here):
        for node in behind:
            bad(node, f"did not get beyond {PHASES[least]!r} in time" + (f": {heard[node]}" if node in heard else ""))
    else:
        more = " in time; SGT_PREFLIGHT_SECONDS gives more"
        why = next((f": {text} (on {node})" for node, text in heard.items()), more)
        problems.append(f"no node got beyond {PHASES[least]!r}{why}")


def read_reports(folder: Path) -> list[Report]:
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            found.append(json.loads(file.read_text()))
        except (OSError, ValueError):
            continue  # cut off while it was written: as good as none
    return found


# -- nodes to leave out ------------------------------------------------------------------------------------------------


def excluded(output_dir: str | Path, now: float | None = None) -> dict[str, str]:
    """Reasons by node, of those whose time is not over."""
    return {node: entry["reason"] for node, entry in _entries(output_dir, time.time() if now is None else now).items()}


def exclude(output_dir: str | Path, bad: Mapping[str, str], now: float | None = None) -> None:
    """Leave out the nodes of ``bad`` from now on, beside those that are left out already."""
    now = time.time() if now is None else now
    until = {node: {"reason": reason, "until": now + EXCLUDED_SECONDS} for node, reason in bad.items()}
    disk.write(Path(output_dir) / EXCLUDED, json.dumps(_entries(output_dir, now) | until, indent=1))


def _entries(output_dir: str | Path, now: float) -> dict[str, dict[str, Any]]:
    """What is in the file, as far as its time is not over; a file that somebody has spoilt by hand holds nothing."""
    try:
        entries = json.loads((Path(output_dir) / EXCLUDED).read_text())
        return {node: {"reason": e["reason"], "until": e["until"]} for node, e in entries.items() if e["until"] > now}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def usable_nodes(partition: str, without: Sequence[str]) -> int | None:
    """How many nodes of a partition are up and not excluded; None where Slurm does not say."""
    words = ["sinfo", "--noheader", "--Node", "--format=%N %t"]
    words += [f"--partition={partition}"] if partition else []
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = {tuple(line.split()[:2]) for line in told.splitlines() if line.strip()}
    up = {name for name, state in lines if state.rstrip("*~#!%$@^-+") in UP}
    return len(up - set(without))


def main(argv: Sequence[str] | None = None) -> int:
    """``verdict``: judge, write it down, say so: exit code 0 fit, 3 bad nodes or told to end, 2 a restart is no use."""
    parser = Parser(prog="python -m sgt_titan.cluster.preflight", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    verdict = commands.add_parser("verdict")
    verdict.add_argument("output_dir", type=Path)
    verdict.add_argument("--reports", type=Path, required=True)
    verdict.add_argument("--nodes", nargs="+", required=True)
    verdict.add_argument("--processes", type=int, required=True)
    verdict.add_argument("--partition", default="")
    verdict.add_argument("--logs", type=Path, help="where preflight-NODE.log are: what the processes printed")
    verdict.add_argument("--seconds", type=float, default=float("inf"), help="that the processes had")
    verdict.add_argument("--notice", default="", help="the signal by which the job was told to end meanwhile")
    listing = commands.add_parser("excluded")
    listing.add_argument("output_dir", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "excluded":
        print(",".join(sorted(excluded(arguments.output_dir))))
        return 0
    if arguments.notice:  # it ended the checks, too: what is missing says nothing of the nodes
        _say(arguments.output_dir, "stopped", f"{arguments.notice} before training")
        return 3
    reports, logs = read_reports(arguments.reports), arguments.logs
    heard = {node: error_line(logs / f"preflight-{node}.log") for node in arguments.nodes} if logs else {}
    found = judge(reports, arguments.nodes, arguments.processes, heard, arguments.seconds)
    for line in [*found.remarks, *(f"bad node {node}: {reason}" for node, reason in found.bad.items())]:
        print(f"preflight: {line}", file=sys.stderr)
    if logs and (found.bad or found.problems):
        print(f"preflight: what the checks printed is in {logs}/preflight-NODE.log", file=sys.stderr)
    if not found.bad and not found.problems:
        print(f"preflight: {len(arguments.nodes)} nodes fit", file=sys.stderr)
        return 0
    said = "; ".join([*found.problems, *(f"{node}: {reason}" for node, reason in found.bad.items())])
    if found.problems:
        said += _variable(said, os.environ)
        _say(arguments.output_dir, "refused", said)
        raise UserError(f"preflight: {said}")
    exclude(arguments.output_dir, found.bad)
    left_out = excluded(arguments.output_dir)
    left = usable_nodes(arguments.partition, list(left_out))
    if left is not None and left < len(arguments.nodes):
        _say(arguments.output_dir, "refused", said)
        raise UserError(
            f"preflight: {len(arguments.nodes)} nodes are needed, {left} are up and not excluded ({said}); mend them "
            f"and delete {arguments.output_dir / EXCLUDED}, or start with fewer nodes"
        )
    _say(arguments.output_dir, "unfit", said)
    return 3


def _variable(said: str, env: Mapping[str, str]) -> str:
    """Which of the site's variables decides about what went wrong, to end the sentence with; empty where none does."""
    names = []
    if "No module named" in said or "ImportError" in said:
        names = ["SGT_ACTIVATE", "SGT_WRAP"]
    elif "could start" in said:
        names = ["SGT_WRAP", "SGT_ACTIVATE"]
    elif "'pairs'" in said or "'rendezvous'" in said or "interface" in said:
        names = ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"]
    given = [f"{name}={shlex.quote(env[name])}" for name in names if env.get(name)]
    return f"; look at {' and '.join(given)} in slurm/site.env" if given else ""


def _say(output_dir: Path, state: status.State, reason: str) -> None:
    step = (status.read(output_dir, attempt_name()) or {}).get("step", 0)
    status.write(output_dir, state, attempt=attempt_name(), step=step, reason=reason)


if __name__ == "__main__":
    sys.exit(guarded(main))
