"""``sgt-titan frontier``: trains and attacks a grid of objectives and seeds, and draws what is kept and what is read.

Each training and each evaluation is a process of its own, through the commands that anybody would type, several at a
time where cores allow; what is finished is not done again, and the picture is drawn anew whenever one more is there.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgt_titan import __version__, disk
from sgt_titan.arguments import Parser, number, seed_number
from sgt_titan.config.door import read_config, split_words
from sgt_titan.config.load import dump
from sgt_titan.config.overrides import parse_overrides
from sgt_titan.config.schema import PRESETS, Config
from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure.evaluate import FORMAT as EVALUATION_FORMAT
from sgt_titan.evaluation.measure.parts import write
from sgt_titan.evaluation.options import GLANCE, UNSENT, study_arguments
from sgt_titan.evaluation.studies.grid import Chain, Pool, Step, command, cores, objective, shared_cache, training
from sgt_titan.terminal import say

FORMAT = 1
WEIGHTS = "0.02,0.05,0.1,0.2"


@dataclass(frozen=True)
class Row:
    """A point of the grid: what it is called, and the overrides that make it. export: trained elsewhere."""

    name: str
    words: tuple[str, ...] = ()
    export: Path | None = None

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=+-]", "-", self.name)


# -- the grid ----------------------------------------------------------------------------------------------------------


def rows(specs: Sequence[str], grid: Sequence[str], config: Config) -> list[Row]:
    """Rows of ``--rows`` (and ``--weights``) times the options of ``--grid``.

    A row is parts joined by +: ``rate=W`` (that weight, in the config's preset if it prices information, else in the
    preset rate), ``preset:NAME``, or ``section.key=value``.

    Raises:
        UserError: a part that is none of these, an unknown preset, two rows of one name.
    """
    axes = []
    for axis in grid:
        key, equals, values = axis.partition("=")
        if not equals or "." not in key or not all(values.split(",")):
            raise UserError(f"--grid: give section.key=value,value, not {axis!r}")
        axes.append([f"{key}={value}" for value in values.split(",")])
    found = {}
    for spec, *more in itertools.product(specs, *axes):
        name = "+".join([spec, *more])
        words = [word for part in name.split("+") for word in _part(part, config)]
        row = Row(name, tuple(words))
        if row.folder in found:
            raise UserError(f"--rows: {name!r} is there twice")
        found[row.folder] = row
    return list(found.values())


def _part(part: str, config: Config) -> list[str]:
    name, equals, value = part.partition("=")
    if part.startswith("preset:"):
        preset = part.removeprefix("preset:")
        if preset not in PRESETS:
            raise UserError(f"--rows: no preset {preset!r}; there are {', '.join(PRESETS)}")
        return objective(preset)
    if name == "rate" and equals:
        try:
            float(value)
        except ValueError:
            raise UserError(f"--rows: {part!r} is no weight, as in rate=0.05") from None
        preset = config.objective.preset
        own = "rate" in PRESETS.get(preset, {})
        return [*([] if own else objective("rate")), "--objective.rate.weight", value]
    if equals and "." in name:
        return [f"--{name}", value]
    raise UserError(f"--rows: {part!r} is neither rate=WEIGHT, preset:NAME nor section.key=value")


def _named(word: str) -> tuple[str, Path]:
    """[NAME=]DIR; a directory may have an = in its own name, as those of a grid have."""
    name, equals, path = word.partition("=")
    return ("", Path(word)) if not equals or Path(word).exists() else (name, Path(path))


def trained_elsewhere(words: Sequence[str]) -> list[Row]:
    """Rows of ``--run [NAME=]DIR``: a run's directory, or an export.

    Raises:
        UserError: nothing exported there; two of one name.
    """
    found: dict[str, Row] = {}
    for word in words:
        name, folder = _named(word)
        export = folder / "export" if (folder / "export" / "config.json").is_file() else folder
        if not (export / "config.json").is_file():
            raise UserError(f"--run {folder}: neither a run with an export/ nor an export (no config.json)")
        row = Row(name or (folder.name if folder.name != "export" else folder.resolve().parent.name), export=export)
        if row.folder in found:
            raise UserError(f"--run: two are called {row.name!r}; name them, as in --run NAME={folder}")
        found[row.folder] = row
    return list(found.values())


def chains(arguments: argparse.Namespace, overrides: Sequence[str], config: Config) -> list[tuple[Row, int, Chain]]:
    """(row, seed, steps) of everything, seed by seed, so that an interruption leaves a whole picture of fewer seeds.

    The first evaluation carries the baselines, which are the same for all.
    """
    found: list[tuple[Row, int, Chain]] = []
    cache = shared_cache(config, overrides)
    grid = [(row, seed) for seed in arguments.seeds for row in arguments.rows]
    for row, seed in [*grid, *((row, arguments.seeds[0]) for row in arguments.run)]:
        if row.export is None:
            home, name = arguments.out / row.folder / f"seed-{seed}", f"{row.name} seed {seed}"
            options = [*overrides, *cache, *row.words, "--run.seed", str(seed)]
            steps = [training(f"{row.folder}-{seed}", arguments.config, home / "run", options)]
            export = home / "run" / "export"
        else:
            home, name, steps, export = arguments.out / row.folder, row.name, [], row.export
        words = ["evaluate", str(export), "--trunk", config.trunk.path, "--data", config.data.source]
        words += ["--suite", arguments.suite, "--seed", str(seed), "--zero-steps", str(arguments.zero_steps)]
        words += ["--rows", str(arguments.prompts)] if arguments.prompts else []
        words += ["--attacks", arguments.attacks] if arguments.attacks else []
        words += [] if not found else ["--no-baselines"]
        words += ["--out", str(home / "evaluation"), *(cache if row.export else [])]
        steps.append(Step(tuple(words), home / "evaluation" / "results.json"))
        found.append((row, seed, Chain(name, tuple(steps), home / "log.txt")))
    return found


# -- what came out -----------------------------------------------------------------------------------------------------


def measured_before(words: Sequence[str]) -> list[tuple[str, int, Path]]:
    """(row, seed, results.json) of ``--measured [NAME=]DIR``; those of one name are seeds of one row.

    Raises:
        UserError: no evaluation there.
    """
    found: list[tuple[str, int, Path]] = []
    for word in words:
        name, folder = _named(word)
        file = folder / "results.json" if folder.is_dir() else folder
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            point(results["mechanisms"]["sgt"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"--measured {folder}: no results.json of `sgt-titan evaluate` there") from None
        if results.get("format") != EVALUATION_FORMAT:
            raise UserError(
                f"--measured {folder}: of an earlier version, whose `kept` counts from another zero; run it again"
            )
        if (results.get("about") or {}).get("suite") == GLANCE:
            raise UserError(f"--measured {folder}: a glance, which has met no attacker but the weakest; run evaluate")
        row = name or folder.name
        found.append((row, sum(known == row for known, _, _ in found), file))
    return found


def collected(files: Sequence[tuple[str, int, Path]], about: Mapping[str, Any]) -> dict[str, Any]:
    """``results.json``: every run that is measured, the baselines, and what the picture's limits are drawn from.

    Args:
        files: row, seed and results.json of each evaluation; those that are not there yet are left out.
    """
    runs: list[dict[str, Any]] = []
    baselines: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    for row, seed, file in files:
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not there yet, or being written by somebody else
        mechanisms = results["mechanisms"]
        runs.append({"row": row, "seed": seed, "results": str(file), **point(mechanisms["sgt"])})
        baselines |= {name: point(entry) for name, entry in mechanisms.items() if name != "sgt"}
        facts, no_prompt = results["about"], results.get("no_prompt") or {}
        limits = limits or {
            "stake": no_prompt.get("stake"),
            "zero": no_prompt.get("zero"),
            "hidden_tokens": facts.get("hidden_tokens"),
            "prompts": facts.get("rows"),
        }
    return {"format": FORMAT, "about": dict(about), "limits": limits, "runs": runs, "baselines": baselines}


SCORES = ("top1", "content_top1", "marked_top1", "span_exact")


def point(mechanism: Mapping[str, Any]) -> dict[str, Any]:
    """What the picture and its table need of one mechanism of an evaluation."""
    use, attacks = mechanism.get("utility") or {}, mechanism.get("attacks") or {}
    found: dict[str, Any] = {
        "title": mechanism.get("title"),
        "facts": mechanism.get("facts") or {},
        **{key: use.get(key) for key in ("kept", "kl", "perplexity")},
    }
    for key in ("best", "best_repeats", "best_noisy"):
        if (attack := attacks.get(mechanism.get(key, ""))) is not None:
            found[key] = {
                "attack": mechanism[key],
                **{
                    name: attack.get(name)
                    for name in ("title", "kind", "guesses", "difference", "answer_tells", "beyond_answer", "notes")
                },
                **{name: attack.get(name) for name in SCORES if name in attack},
            }
    for kind in UNSENT:
        if (unsent := attacks.get(kind)) is not None:
            found[kind] = {name: unsent.get(name) for name in SCORES if name in unsent}
    for key in ("certificate", "certificates", "rate"):
        if key in mechanism:
            found[key] = mechanism[key]
    return found


# -- the command -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = Parser(
        prog="sgt-titan frontier",
        description="Train and attack a grid of objectives and seeds, and draw what is kept against what the best "
        "attacker reads.",
        epilog="Further words are config overrides of every training (--training.steps 2400 ...). Run it again to go "
        "on. OUT/results.json and frontier.svg, .md and .html are written anew whenever one more is measured.",
    )
    study_arguments(found, "frontier")
    found.add_argument(
        "--weights", metavar="W,W", help=f"rows rate=W (default without --rows, --run and --measured: {WEIGHTS})"
    )
    found.add_argument(
        "--rows", metavar="R,R", default="",
        help="rows, each of parts joined by +: rate=0.05, preset:mi_abs_cos_norm, denoiser.layers=2, "
        "preset:rate+objective.rate.weight=0.1 ...",
    )  # fmt: skip
    found.add_argument(
        "--grid", metavar="KEY=V,V", action="append", default=[], help="every row with each of these values, too"
    )
    found.add_argument("--seeds", metavar="S,S", default="0", help="of trainings and their evaluations (default 0)")
    found.add_argument(
        "--run",
        metavar="[NAME=]DIR",
        action="append",
        default=[],
        help="also attack this run or export, trained before",
    )
    found.add_argument(
        "--measured", metavar="[NAME=]DIR", action="append", default=[],
        help="also draw this evaluation, made before; several of one NAME are its seeds",
    )  # fmt: skip
    found.add_argument("--jobs", type=number(int, 1), help="commands at a time (default: one for every two cores)")
    found.add_argument(
        "--attacks", metavar="A,B", default="", help="only these, and guessing (default: all of the suite)"
    )
    found.add_argument("--draw", action="store_true", help="run nothing, draw what is there")
    return found


def main(argv: Sequence[str] | None = None, start: Any = None) -> int:
    """Run what is missing; returns the exit code of the first command that failed.

    Args:
        start: of a command, for tests; as ``grid.Pool`` takes it.

    Raises:
        UserError: an unknown config, row, preset or option; a training of another config in ``--out``.
    """
    arguments, overrides = split_words(parser(), sys.argv[2:] if argv is None else argv)
    config = checked(arguments, overrides)
    todo = chains(arguments, overrides, config)
    if arguments.dry_run:
        for step in (step for _, _, chain in todo for step in chain.steps):
            print(f"{'(done) ' if step.is_done() else ''}{command(step.words)}")
        return 0
    about = {
        "command": command(["frontier", *(sys.argv[2:] if argv is None else argv)]),
        "config": dump(config),
        "version": __version__,
    }

    def draw() -> None:
        from sgt_titan.evaluation.report import plane

        files = [(row.name, seed, chain.steps[-1].done) for row, seed, chain in todo] + arguments.measured
        found = collected(files, about | {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")})
        arguments.out.mkdir(parents=True, exist_ok=True)
        write(arguments.out / "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write(arguments.out / "frontier.md", plane.markdown(found))
        if (svg := plane.figure(found)) is not None:
            write(arguments.out / "frontier.svg", svg)
        write(arguments.out / "frontier.html", plane.page(found))

    code = 0
    if not arguments.draw:
        before = signal.signal(signal.SIGTERM, _interrupted)
        try:
            code = Pool(arguments.jobs, say, draw, start).run([chain for _, _, chain in todo])
        finally:
            signal.signal(signal.SIGTERM, before)
    draw()
    print((arguments.out / "frontier.md").read_text(encoding="utf-8"))
    print("\n".join(str(arguments.out / f"frontier.{kind}") for kind in ("svg", "html", "md")))
    return code


def checked(arguments: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """Parses what argparse left as text, in place; returns the config without the rows.

    Raises:
        UserError: as ``main``.
    """
    try:
        arguments.seeds = [seed_number(seed) for seed in arguments.seeds.split(",")]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--seeds: as in 0,1,2; each {error}") from None
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise UserError("--seeds: one is there twice")
    for key in parse_overrides(list(overrides)):
        if key in ("run.output_dir", "run.seed", "run.name"):
            raise UserError(f"--{key}: every run has its own; leave it out")
    config, _ = read_config(arguments.config, overrides)
    specs = [part for part in arguments.rows.split(",") if part]
    weights = (
        arguments.weights
        if arguments.weights is not None
        else ""
        if specs or arguments.run or arguments.measured
        else WEIGHTS
    )
    specs = [*(f"rate={weight}" for weight in weights.split(",") if weight), *specs]
    arguments.rows = rows(specs, arguments.grid, config)
    arguments.run = trained_elsewhere(arguments.run)
    if clash := {row.folder for row in arguments.rows} & {row.folder for row in arguments.run}:
        raise UserError(f"--run: a row is called {min(clash)!r} as well; name the run, as in --run NAME=DIR")
    arguments.measured = measured_before(arguments.measured)
    if not arguments.rows and not arguments.run and not arguments.measured:
        raise UserError("--rows: names no row")
    for row in arguments.rows:  # what would stop a training is said before the first of them
        read_config(arguments.config, [*overrides, *row.words], trunk="weights")
    from sgt_titan.evaluation.attacks import ATTACKS

    asked = arguments.attacks.split(",") if arguments.attacks else []
    arguments.attacks = ",".join([*asked, *(name for name in UNSENT if asked and name not in asked)])
    if unknown := [name for name in arguments.attacks.split(",") if name and name not in ATTACKS]:
        raise UserError(f"--attacks: {unknown[0]!r} is unknown; there are {', '.join(ATTACKS)}")
    arguments.out = arguments.out or Path("outputs") / f"frontier-{Path(arguments.config).stem}"
    arguments.jobs = arguments.jobs or max(1, cores() // 2)
    if not arguments.dry_run:
        disk.writable(arguments.out, "--out")
    return config


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt
