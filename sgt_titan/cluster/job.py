"""What a batch script asks before and after an attempt: ``python -m sgt_titan.cluster.job begin|end ...``.

``begin`` checks the run against the allocation and prints shell assignments; ``end`` prints what to do next, and why.

Neither imports torch: both run on a head node while GPUs wait.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sgt_titan.arguments import Parser
from sgt_titan.cluster import attempts, status, storage
from sgt_titan.cluster.ownership import Ownership, attempt_name
from sgt_titan.config.load import load, read_trunk, resolve, validate
from sgt_titan.errors import UserError, guarded
from sgt_titan.folders import writable


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m sgt_titan.cluster.job", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    begin = commands.add_parser("begin", allow_abbrev=False)
    begin.add_argument("name")
    begin.add_argument("--nodes", type=int, required=True)
    begin.add_argument("--gpus", type=int, required=True, help="processes per node")
    begin.add_argument("--shared", required=True, help="where run.output_dir is, unless the config says otherwise")
    end = commands.add_parser("end", allow_abbrev=False)
    end.add_argument("output_dir")
    end.add_argument("--restarts", type=int, required=True)
    end.add_argument("--max-restarts", type=int, required=True)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "begin":
        return _begin(arguments.name, rest, arguments.nodes, arguments.gpus, arguments.shared)
    entry = attempts.end(
        arguments.output_dir, attempt_name(), restarts=arguments.restarts, max_restarts=arguments.max_restarts
    )
    print(entry.summary(), file=sys.stderr)
    print(entry.decision)
    return 0


def _begin(name: str, overrides: list[str], nodes: int, gpus: int, shared: str) -> int:
    config = load(name, overrides)
    config.run.output_dir = config.run.output_dir or os.path.join(shared, config.run.name)
    config = resolve(config, world_size=nodes * gpus)
    validate(config, nodes * gpus, None)
    validate(config, nodes * gpus, read_trunk(config, weights=True))
    folder = Path(config.run.output_dir)
    writable(folder, "run.output_dir")
    found = status.read(folder) or {}
    over = found.get("state") == "finished"
    if over and found.get("attempt", "").rpartition(".")[0] == attempt_name().rpartition(".")[0]:
        print(f"{folder}: finished by {found['attempt']}, which this job had lost sight of", file=sys.stderr)
        print("FINISHED=1")
        return 0
    if over and found.get("step", 0) >= (config.training.steps or float("inf")):
        raise UserError(
            f"run.output_dir: {folder} holds a finished run (step {found['step']}); choose another directory, or more "
            "training.steps"
        )
    if told := storage.warning(folder, nodes):
        print(f"warning: {told}", file=sys.stderr)
    Ownership(folder).check()
    entry = attempts.begin(folder, attempt_name(), nodes)
    # From here on the run may say how it ended, be it before its first collective.
    status.write(folder, "running", attempt=entry.attempt, step=entry.first_step)
    print(entry.summary(), file=sys.stderr)
    print(f"OUTPUT_DIR={shlex.quote(os.path.abspath(folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
