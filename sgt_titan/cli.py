"""The command ``sgt-titan``. Imports nothing heavy before it knows that the input is good."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from sgt_titan import __version__, train
from sgt_titan.arguments import Parser, number
from sgt_titan.cluster import notice
from sgt_titan.config.door import name_argument, read_config, split_words
from sgt_titan.config.help import help_text
from sgt_titan.config.load import available, dump, load
from sgt_titan.errors import UserError, guarded

_CONFIG_COMMANDS = ("train", "prepare", "preview")

# Commands with arguments of their own: module whose main(argv) runs it, what it does, and words before the user's.
_FORWARDED: Mapping[str, tuple[str, ...]] = {
    "report": (
        "sgt_titan.evaluation.measure.evaluate",
        "Print what an export costs and hides, in seconds, before and after: evaluate --suite glance.",
        *("--suite", "glance"),
    ),
    "evaluate": (
        "sgt_titan.evaluation.measure.evaluate",
        "Attack an export in every way we know, and report what is left.",
    ),
    "private": (
        "sgt_titan.evaluation.measure.private_values",
        "Measure surrogates for private values: what is found, what is left, what an attacker reads.",
    ),
    "zero": ("sgt_titan.evaluation.scores.zero", "Fit the constant prompt that `kept` counts from."),
    "convert-trunk": (
        "sgt_titan.transform.convert_trunk",
        "Write a checkpoint as safetensors: from pickles, or with a LoRA adapter merged.",
    ),
    "plan": (
        "sgt_titan.plan.command",
        "Memory, communication and time of a config, and how often to save, by arithmetic.",
    ),
    "doctor": ("sgt_titan.doctor", "Check this machine and what a config needs; jobs run it on all their nodes."),
    "status": ("sgt_titan.cluster.overview", "A run at a glance, running or ended: progress, checkpoints, attempts."),
    "serve": (
        "sgt_titan.serving.main",
        "A local OpenAI-compatible proxy: prompts leave only as obfuscated embeddings.",
    ),
    "inspect": ("sgt_titan.inspect_command", "What a text of yours would reveal, token by token."),
    "readings": ("sgt_titan.readings", "One prompt through the client: who reads what of it, and what comes back."),
    "conjformer": (
        "sgt_titan.conjformer.command",
        "A checkpoint in a secretly rotated basis: convert | serve | generate.",
    ),
    "frontier": (
        "sgt_titan.evaluation.studies.frontier",
        "Train and attack a grid: what is kept against what is read.",
    ),
    "tables": ("sgt_titan.evaluation.studies.tables", "Train and evaluate the paper's tables on a trunk of your own."),
}


# What a command was called before.
_RENAMED = {
    "conjform": "conjformer convert",
    "conjserve": "conjformer serve",
    "conjgenerate": "conjformer generate",
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, the run's, 2 for bad input, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    if argv and argv[0] in _FORWARDED:
        module, _, *words = _FORWARDED[argv[0]]
        return import_module(module).main([*words, *argv[1:]]) or 0
    if argv and argv[0] in _RENAMED:
        raise UserError(f"sgt-titan {argv[0]} is now sgt-titan {_RENAMED[argv[0]]}")
    parser, commands = _parser()
    if argv and argv[0] in _CONFIG_COMMANDS:
        arguments, overrides = split_words(commands[argv[0]], argv[1:])
        return {"train": _train, "prepare": _prepare, "preview": _preview}[argv[0]](arguments, overrides)
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        program = " ".join(filter(None, ("sgt-titan", arguments.command)))
        raise UserError(f"unrecognized arguments: {' '.join(rest)} (see {program} --help)")
    if arguments.command is None:
        parser.print_help()
        return 0
    if arguments.command == "export":
        return _export(arguments)
    return _configs()


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all commands, and those of each."""
    text = "Train and export Stained Glass Transforms against a frozen language model."
    parser = Parser(prog="sgt-titan", description=text)
    parser.add_argument("--version", action="version", version=f"sgt-titan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    run = command("train", "Train a run: on this machine, or on this rank when started by torchrun.", help_text())
    name_argument(run)
    run.add_argument(
        "--nproc",
        type=number(int, 1),
        help="processes (default: cluster.gpus_per_node if there are that many GPUs, else 1)",
    )
    run.add_argument("--dry-run", action="store_true", help="check the config, print it with every value, and stop")

    export = command("export", "Write a checkpoint's transform as a directory that clients load.")
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run's directory (its newest), or one of checkpoints/"
    )
    export.add_argument("out", metavar="OUT", help="the directory to write")
    export.add_argument("--trunk", metavar="DIR", help="where the trunk lies now, if not where it was trained")
    export.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")

    prepare = command("prepare", "Tokenize the data of a run into its cache, and stop.", help_text())
    name_argument(prepare)

    preview = command("preview", "Show a row of a run's data as it will be trained on.", help_text())
    name_argument(preview)
    preview.add_argument("--row", type=int, default=1, metavar="N", help="number of the row in the source (default: 1)")
    preview.add_argument("--source", default="", metavar="NAME", help="of several, by name (default: the first)")

    for name, (_, text, *_words) in _FORWARDED.items():
        command(name, text)

    command("configs", "List the configs of train_configs/.")
    return parser, commands.choices


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    name, nproc = arguments.name, arguments.nproc
    if arguments.dry_run:
        cluster = load(name, overrides).cluster
        size = nproc or int(os.environ.get("WORLD_SIZE", cluster.nodes * cluster.gpus_per_node))
        print(dump(train.prepared(name, overrides, size, weights=False)), end="")
        return 0
    if "RANK" in os.environ:
        if nproc is not None:
            raise UserError("--nproc is for starting a run; torchrun has already started this process (RANK is set)")
        return train.run_rank(name, overrides)
    gpus = train.visible_gpus()
    if nproc is None:
        wanted = load(name, overrides).cluster.gpus_per_node
        nproc = wanted if gpus >= wanted else 1
    if 0 < gpus < nproc:
        raise UserError(f"--nproc {nproc}: only {gpus} GPUs are visible")
    # Checked here too: a launched rank can only fail, and the launcher wraps that in a report of its own.
    train.prepared(name, overrides, nproc)
    if nproc > 1:
        return _launch(nproc, [name, *overrides])
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=_free_port(),
    )
    return train.run_rank(name, overrides)


def _launch(nproc: int, words: list[str]) -> int:
    """torchrun on this machine; returns the exit code of the rank that failed first, as a shell counts it.

    ``python -m torch.distributed.run`` exits with 1 whatever its ranks exit with, so its API is called.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun would end its ranks on SIGTERM without waiting for their last save.
    options = ["--standalone", f"--nproc-per-node={nproc}", "--max-restarts=0", "--signals-to-handle=SIGINT"]
    options += ["-m", "sgt_titan.train", *words]
    notice.pass_on()
    try:
        torchrun.run(torchrun.parse_args(options))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (2, notice.EXIT_STOPPED):
            print(f"sgt-titan: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _free_port() -> str:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _prepare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config, _ = read_config(arguments.name, overrides, trunk="config")
    if not config.trunk.path:
        raise UserError("trunk.path is not set: the tokenizer is read from there")
    from sgt_titan.data.cache import prepare, remarks

    dataset = prepare(config, config.trunk.path, progress=True)
    for line in remarks(dataset.meta):
        print(line)
    print(f"{len(dataset.train)} training and {len(dataset.validation)} validation samples in {config.data.cache_dir}")
    return 0


def _preview(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config, _ = read_config(arguments.name, overrides, trunk="config")
    if not config.trunk.path:
        raise UserError("trunk.path is not set: the tokenizer is read from there")
    from sgt_titan.data.preview import preview

    print(preview(config, arguments.row, color=sys.stdout.isatty(), source=arguments.source))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    if not Path(arguments.checkpoint).is_dir():
        raise UserError(f"no checkpoint directory {arguments.checkpoint}")
    from sgt_titan.export import export_checkpoint

    export_checkpoint(arguments.checkpoint, arguments.out, overwrite=arguments.overwrite, trunk_path=arguments.trunk)
    print(f"exported to {arguments.out}")
    return 0


def _configs() -> int:
    shipped = available()
    width = max(map(len, shipped)) + 2
    for name, path in shipped.items():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        comment = next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")
        print(f"{name:<{width}}{comment}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
