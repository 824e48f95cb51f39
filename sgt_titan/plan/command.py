"""``sgt-titan plan``."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from math import isfinite
from typing import Any

from sgt_titan.arguments import Parser, number, seed_argument
from sgt_titan.config.door import name_argument, split_words
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError

from .arithmetic import Plan, fewest_nodes, plan, prepared
from .goodput import Conditions
from .hardware import (
    KINDS,
    LOAD_SECONDS,
    NODE_MTBF_DAYS,
    NOTICE_SECONDS,
    PREFLIGHT_SECONDS,
    REQUEUE_SECONDS,
    gpu_name,
)
from .interval import DAY, Saving, saving
from .report import SHIPPED, figures, goodput_lines, simulated, steps_of_run, summary, terminal

MOST_NODES = 1024  # looked at for the fewest that fit
COUNT, TIME = number(int, 1), number(float, above=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of a config; returns 0.

    Raises:
        UserError: an unknown config, option or GPU, degrees that do not divide the allocation, a run that does not fit.
    """
    parser = Parser(
        prog="sgt-titan plan",
        description="Memory by kind, communication, time and checkpoint interval of a config, by arithmetic.",
        epilog="Further words are config overrides (--training.local_batch_size 4 ...). Without NAME: the tables of "
        "docs/MEMORY.md.",
    )
    name_argument(parser, needed=False)
    parser.add_argument("--nodes", type=COUNT, metavar="N", help="instead of the config's cluster.nodes")
    parser.add_argument("--gpus-per-node", type=COUNT, metavar="G", help="instead of cluster.gpus_per_node")
    parser.add_argument("--gpu", metavar="KIND", help=f"instead of cluster.gpu: {', '.join(KINDS)}")
    parser.add_argument(
        "--rows", type=COUNT, metavar="N", help="packed rows (or samples) of an epoch, for the run's length"
    )
    parser.add_argument("--node-mtbf-days", type=TIME, default=NODE_MTBF_DAYS, metavar="D", help="mean days between "
                        "failures of one node (default %(default).0f, of Llama 3's training)")  # fmt: skip
    parser.add_argument(
        "--simulate", action="store_true", help="also live through the run under node failures, many times"
    )
    for name, default, text in (
        ("notice", NOTICE_SECONDS, "from a failure until the attempt is known to be dead"),
        ("requeue", REQUEUE_SECONDS, "in the queue"),
        ("preflight", PREFLIGHT_SECONDS, "of the checks before training"),
        ("start", LOAD_SECONDS, "from there to the first step"),
    ):
        parser.add_argument(
            f"--{name}-seconds",
            type=TIME,
            default=default,
            metavar="S",
            help=f"simulated: {text} (default %(default)g)",
        )
    parser.add_argument(
        "--days", type=TIME, metavar="D", help="simulated: training in all (default: the config's, or 30)"
    )
    seed_argument(parser, "the simulation")
    parser.add_argument("--json", action="store_true", help="numbers instead of a page")
    arguments, overrides = split_words(parser, sys.argv[1:] if argv is None else argv)
    if arguments.name is None:
        if overrides:
            raise UserError(f"{overrides[0]}: overrides need the NAME of a config")
        print(summary(SHIPPED))
        return 0
    words = list(overrides)
    for key, value in (("nodes", arguments.nodes), ("gpus_per_node", arguments.gpus_per_node)):
        words += [f"--cluster.{key}", str(value)] if value else []
    words += ["--cluster.gpu", gpu_name(arguments.gpu)] if arguments.gpu else []
    config, trunk = prepared(arguments.name, words)
    found = plan(config, trunk)
    enough = fewest_nodes(arguments.name, words, MOST_NODES) if found.gpu else None
    fewest = enough[0] if enough else None
    asynchronous = config.checkpoint.asynchronous
    saved = saving(found, config.cluster.nodes, arguments.node_mtbf_days, asynchronous=asynchronous)
    told = config, found, saved, arguments.rows, fewest
    good = None
    if arguments.simulate:
        if not found.gpu:
            raise UserError("--simulate: how long a step takes is not known on CPUs; set cluster.gpu or give --gpu")
        good = simulated(conditions(arguments, *told[:-1]), arguments.seed)
    if arguments.json:
        print(json.dumps(_strict(figures(*told) | ({"goodput": good} if good else {})), indent=1))
    else:
        print(terminal(*told) + ("\n\n" + goodput_lines(good) if good else ""))
    if not found.fits:
        least = f"{fewest} nodes hold it" if fewest else f"not even {MOST_NODES} nodes hold it at these degrees"
        raise UserError(
            f"{arguments.name}: {found.memory.peak / 1e9:.0f} GB are needed on a GPU of {found.capacity / 1e9:.0f}; "
            f"{least}, "
            "or use activation_checkpoint.mode full, a smaller training.local_batch_size, a larger "
            "parallelism.tensor_parallel_degree"
        )
    return 0


def conditions(arguments: Namespace, config: Config, found: Plan, saved: Saving, rows: int | None) -> Conditions:
    """Of the config's own run; a step takes the geometric mean of the best and the worst."""
    best, worst = found.seconds_range
    step = (best * worst) ** 0.5
    steps = steps_of_run(config, found, rows)
    if arguments.days:
        work = arguments.days * DAY
    else:
        work = steps * step if steps else 30 * DAY
    return Conditions(
        work=work,
        mtbf=saved.mtbf,
        interval=config.checkpoint.interval * step,
        stall=saved.stall,
        write=saved.write,
        notice=arguments.notice_seconds,
        requeue=arguments.requeue_seconds,
        preflight=arguments.preflight_seconds,
        start=arguments.start_seconds,
    )


def _strict(value: Any) -> Any:
    """JSON has neither NaN nor infinity: what is not known is null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return value if not isinstance(value, float) or isfinite(value) else None
