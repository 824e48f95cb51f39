"""``sgt-titan tables``: the paper's Tables I and III and Figures 3 and 4 on a trunk of your own, beside the published.

Six trainings that differ in the objective alone, each evaluated, through the commands that anybody would type; each is
a process of its own and goes on where an interruption left it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgt_titan import disk
from sgt_titan.arguments import Parser, number, seed_argument
from sgt_titan.config.door import read_config, split_words
from sgt_titan.config.load import dump, load
from sgt_titan.config.overrides import parse_overrides
from sgt_titan.config.schema import PRESETS
from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure.evaluate import benchmark_names
from sgt_titan.evaluation.measure.parts import write
from sgt_titan.evaluation.options import study_arguments
from sgt_titan.evaluation.studies.grid import Execute, Step, command, execute, objective, shared_cache, training

ROWS = tuple(PRESETS)
PAPER_ROWS = tuple(name for name, terms in PRESETS.items() if "rate" not in terms)  # Table I, in the paper's order
PII_ROWS = ("mi", "abs_cos", "mi_abs_cos", "mi_abs_cos_norm")  # Table III
REFERENCE = "mi_abs_cos_norm"  # the row whose evaluation carries the baselines, which are the same for all


def steps(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[Step]:
    """Everything to run, in order: row by row, so that an interruption leaves whole rows."""
    config, _ = read_config(arguments.config, overrides)
    found, cache = [], shared_cache(config, overrides)
    for row in arguments.rows:
        home = arguments.out / row
        run, export = home / "run", home / "run" / "export"
        found.append(training(row, arguments.config, run, [*objective(row), *overrides, *cache]))
        measure = ["evaluate", str(export), "--trunk", config.trunk.path, "--suite", arguments.suite]
        measure += ["--seed", str(arguments.seed), *(["--no-baselines"] if row != REFERENCE else [])]
        measure += ["--zero-steps", str(arguments.zero_steps)]
        if arguments.prompts:
            measure += ["--rows", str(arguments.prompts)]
        bench = ["--benchmarks", arguments.benchmarks] if arguments.benchmarks else []
        bench += ["--benchmark-dir", arguments.benchmark_dir] if arguments.benchmark_dir else []
        own = ["--data", config.data.source, "--out", str(home / "evaluation")]
        found.append(Step((*measure, *own, *bench), home / "evaluation" / "results.json"))
        if arguments.pii and arguments.pii != config.data.source and row in PII_ROWS:
            length = str(arguments.pii_seq_len or config.training.seq_len)
            other = ["--data", arguments.pii, "--out", str(home / "pii"), "--training.seq_len", length]
            found.append(Step((*measure, *other), home / "pii" / "results.json"))
    return found


def read(out: Path, rows: Sequence[str], folder: str) -> dict[str, Any]:
    """Results by row, of the rows that have them."""
    found = {}
    for row in rows:
        file = out / row / folder / "results.json"
        if file.is_file():
            found[row] = json.loads(file.read_text(encoding="utf-8"))
    return found


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="sgt-titan tables",
        description="Train and evaluate the rows of the paper's Table I (and Table III, Figures 3 and 4) and print "
        "them beside the published ones.",
        epilog="Further words are config overrides of every training (--training.steps 500 ...). Run it again to go "
        "on. OUT/tables.md, tables.html and tables.json hold the tables.",
    )
    study_arguments(found, "tables")
    found.add_argument(
        "--rows", metavar="A,B", default=",".join(PAPER_ROWS), help=f"presets (default Table I: {','.join(PAPER_ROWS)})"
    )
    found.add_argument("--pii", metavar="SOURCE", help="data with marked private values for Table III (pupa, demo)")
    found.add_argument(
        "--pii-seq-len", type=number(int, 2), metavar="N", help="tokens of its rows (default: as in training)"
    )
    found.add_argument(
        "--benchmarks", metavar="A,B", default="", help="lm-eval tasks for the utility column, or `paper`"
    )
    found.add_argument("--benchmark-dir", metavar="DIR", help="local copies of the benchmarks; default: from the hub")
    seed_argument(found, "the evaluations")
    return found


def foresee(arguments: argparse.Namespace) -> None:
    """Raises UserError for what would stop an evaluation only after the trainings before it."""
    from sgt_titan.config.schema import Data
    from sgt_titan.data.sources import load_rows

    disk.writable(arguments.out, "--out")
    benchmark_names(arguments)
    if arguments.pii:
        load_rows(Data(source=arguments.pii))


def main(argv: Sequence[str] | None = None, execute: Execute = execute) -> int:
    """Run what is missing, then write and print the tables; returns the exit code of the first command that fails.

    Raises:
        UserError: an unknown config, row or option.
    """
    arguments, overrides = split_words(parser(), sys.argv[2:] if argv is None else argv)
    arguments.rows = [row for row in arguments.rows.split(",") if row]
    if unknown := [row for row in arguments.rows if row not in ROWS]:
        raise UserError(f"--rows: {unknown[0]!r} is unknown; there are {', '.join(ROWS)}")
    if not arguments.rows:
        raise UserError(f"--rows: names no row; there are {', '.join(ROWS)}")
    for key in parse_overrides(list(overrides)):
        if key == "run.output_dir":
            raise UserError("--run.output_dir: every row has its own below --out; leave it out")
        if (
            key.startswith("objective.")
            and key.endswith((".preset", ".weight"))
            and not key.startswith("objective.mi.")
        ):
            raise UserError(f"--{key}: the rows decide it; leave it out")
    arguments.out = arguments.out or Path("outputs") / f"tables-{Path(arguments.config).stem}"
    if not arguments.dry_run:
        foresee(arguments)
    todo = steps(arguments, overrides)
    if arguments.dry_run:
        for step in todo:
            print(f"{'(done) ' if step.is_done() else ''}{command(step.words)}")
        return 0
    done = [step.is_done() for step in todo]  # all of them asked before the first is run
    for index, step in enumerate(todo, start=1):
        if done[index - 1]:
            continue
        print(f"[{index}/{len(todo)}]", file=sys.stderr, flush=True)
        if code := execute(step.words):
            return code
    from sgt_titan.evaluation.studies import published

    rows = read(arguments.out, arguments.rows, "evaluation")
    # Where the training data has marked values itself, its own evaluation says it all.
    own = arguments.pii == read_config(arguments.config, overrides)[0].data.source
    pii_rows = [row for row in arguments.rows if row in PII_ROWS]
    pii = read(arguments.out, pii_rows, "evaluation" if own else "pii") if arguments.pii else {}
    about = {
        "config": dump(load(arguments.config, overrides)),
        "command": command(["tables", *(sys.argv[2:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    shown = {"about": about, "tables": published.tables(rows, pii)}
    write(arguments.out / "tables.json", json.dumps(shown, indent=1))
    write(arguments.out / "tables.md", published.markdown(rows, pii, about))
    write(arguments.out / "tables.html", published.page(rows, pii, about))
    print(published.terminal(rows, pii))
    print(f"\n{arguments.out / 'tables.md'}\n{arguments.out / 'tables.html'}")
    return 0
