"""What a batch script asks around an attempt: ``python -m sgt_titan.cluster.job begin|follow|end ...``.

``begin`` checks the run against the allocation, claims its directory and prints shell assignments; ``follow`` prints a
line of progress a minute; ``end`` prints what to do next on stdout, and on stderr what happened, where, and why.

None imports torch: they run on a head node while GPUs wait.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgt_titan.arguments import Parser
from sgt_titan.cluster import allocation, attempts, cause, directory, progress, status, storage
from sgt_titan.cluster.ownership import Ownership, attempt_name
from sgt_titan.config.door import read_config
from sgt_titan.config.schema import Config
from sgt_titan.config.tracking import require_tracking
from sgt_titan.errors import UserError, guarded


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m sgt_titan.cluster.job", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    begin = commands.add_parser("begin")
    begin.add_argument("name")
    begin.add_argument("--nodes", type=int, default=int(os.environ.get("SLURM_NNODES", "1")))
    begin.add_argument("--shared", required=True, help="where run.output_dir is, unless the config says otherwise")
    begin.add_argument("--script", default="", help="the batch script, for its --signal")
    begin.add_argument("--pid", type=int, default=os.getppid(), help="process that lives as long as the job")
    size = commands.add_parser("size")
    size.add_argument("name")
    follow = commands.add_parser("follow")
    follow.add_argument("output_dir", type=Path)
    follow.add_argument("--every", type=float, default=60.0, help="seconds between lines (default %(default)g)")
    end = commands.add_parser("end")
    end.add_argument("output_dir", type=Path)
    end.add_argument("--logs", type=Path, required=True)
    end.add_argument("--restarts", type=int, required=True)
    end.add_argument("--max-restarts", type=int, required=True)
    end.add_argument("--most-in-vain", type=int, default=attempts.MOST_IN_VAIN)
    end.add_argument("--again", default="submit the same command again")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "begin":
        return _begin(
            arguments.name, rest, arguments.nodes, arguments.shared, script=arguments.script, pid=arguments.pid
        )
    if arguments.command == "size":
        print(" ".join(_size(arguments.name, rest, os.environ)))
        return 0
    if arguments.command == "follow":
        return _follow(arguments.output_dir, arguments.every)
    told = allocation.ask(_job())
    entry = attempts.end(
        arguments.output_dir,
        attempt_name(),
        restarts=arguments.restarts,
        max_restarts=arguments.max_restarts,
        most_in_vain=arguments.most_in_vain,
        told=told,
    )
    Ownership(arguments.output_dir).drop()
    print(entry.summary(), file=sys.stderr)
    reached = progress.read(arguments.output_dir)
    export = arguments.output_dir / "export"
    text = cause.paragraph(
        state=entry.state,
        reason=entry.reason if entry.state not in attempts.SPEAKS else _said(arguments.output_dir, entry),
        decision=entry.decision,
        decided=entry.reason,
        step=entry.last_step,
        steps=reached["steps"] if reached else None,
        logs=arguments.logs,
        restart=arguments.restarts,
        most=arguments.max_restarts,
        again=arguments.again,
        reached=reached if reached and reached.get("attempt") == entry.attempt else None,
        export=export if export.is_dir() else None,
    )
    print(text, file=sys.stderr)
    print(entry.decision)
    return 0


def _said(output_dir: Path, entry: attempts.Attempt) -> str:
    return (status.read(output_dir, entry.attempt) or {}).get("reason", "") or entry.reason


def _job() -> str:
    """As scontrol takes it: an array's task, not the array."""
    return attempt_name().removeprefix("slurm-").rpartition(".")[0]


def _size(name: str, overrides: list[str], env: Mapping[str, str]) -> list[str]:
    """sbatch's options for a job of the size that a config asks for; none where it was asked for another size.

    Raises:
        UserError: anything wrong with the config.
    """
    config, _ = read_config(name, overrides)
    nodes, gpus = config.cluster.nodes, config.cluster.gpus_per_node
    given = [
        word for word in ("SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_JOB_GPUS") if env.get(word)
    ]
    counted = bool(env.get(allocation.OWN))  # processes without GPUs, or a site that says how many
    if int(env.get("SLURM_NNODES", "1")) > 1 or given or (nodes == 1 and counted):
        return []
    if env.get("SLURM_ARRAY_JOB_ID"):
        raise UserError(
            f"{name}: a task of an array cannot be given another size; tell sbatch --nodes and --gpus-per-node"
        )
    told = allocation.ask(_job())
    options = [f"--nodes={nodes}", f"--job-name=sgt-{config.run.name}"]
    options += [] if counted else [f"--gpus-per-node={gpus}"]
    return [*options, *(f"--{option}={value}" for option, value in told.kept.items())]


def _begin(name: str, overrides: list[str], nodes: int, shared: str, *, script: str, pid: int) -> int:
    ranks, rule = allocation.ranks_per_node(os.environ, nodes)
    told = allocation.ask(_job())
    notice = allocation.notice_seconds(allocation.submitted(script), os.environ)
    allocation.check_time(told.limit, notice)
    config, _ = read_config(name, overrides, world_size=nodes * ranks, trunk="weights", shared=shared)
    folder = Path(config.run.output_dir)
    if _is_over(folder, config):
        print("FINISHED=1")
        return 0
    require_tracking(config, os.environ)
    directory.check(config, unknown=("data.template",) if config.data.template == "auto" else ())
    Ownership(folder).claim(pid)
    entry = attempts.begin(folder, attempt_name(), nodes)
    # From here on the run may say how it ended, be it before its first collective.
    status.write(folder, "running", attempt=entry.attempt, step=entry.first_step)
    logs = folder.absolute() / "logs" / entry.attempt.removeprefix("slurm-")
    logs.mkdir(parents=True, exist_ok=True)
    print(f"output {folder.absolute()}\nlogs   {logs}", file=sys.stderr)
    print(f"ranks  {nodes} x {ranks}: {rule}", file=sys.stderr)
    if warning := storage.warning(folder, nodes):
        print(f"warning: {warning}", file=sys.stderr)
    if told.why_no_requeue:
        print(
            f"note: {told.why_no_requeue}; when it ends early, submit the same command again to go on", file=sys.stderr
        )
    print(entry.summary(), file=sys.stderr)
    for variable, value in (("OUTPUT_DIR", folder.absolute()), ("LOGS", logs), ("PROCS", ranks)):
        print(f"{variable}={shlex.quote(str(value))}")
    return 0


def _is_over(folder: Path, config: Config) -> bool:
    """Whether ranks of this job that Slurm had lost sight of have finished the run.

    Raises:
        UserError: another job has, or an earlier one.
    """
    found = status.finished(folder)
    if found is None:
        return False
    if found["attempt"].rpartition(".")[0] == attempt_name().rpartition(".")[0]:
        print(f"{folder}: finished by {found['attempt']}, which this job had lost sight of", file=sys.stderr)
        return True
    if found["step"] >= (config.training.steps or float("inf")):
        raise UserError(
            f"run.output_dir: {folder} holds a finished run (step {found['step']}); choose another directory, or more "
            "training.steps"
        )
    return False


def _follow(output_dir: Path, every: float) -> int:
    """A line whenever there is news, not more often than ``every`` seconds, until the batch script ends."""
    parent, attempt, began, told = os.getppid(), attempt_name(), time.monotonic(), None
    while os.getppid() == parent:
        time.sleep(every)
        found = progress.read(output_dir)
        if found is None or found.get("attempt") != attempt:
            print(f"{_now()}  no step yet after {(time.monotonic() - began) / 60:.0f} min", file=sys.stderr, flush=True)
        elif found["at"] != told:
            told = found["at"]
            print(f"{_now()}  {progress.line(found)}", file=sys.stderr, flush=True)
    return 0


def _now() -> str:
    return time.strftime("%H:%M:%S")


if __name__ == "__main__":
    sys.exit(guarded(main))
