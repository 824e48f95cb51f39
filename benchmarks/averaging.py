"""What averaging a trunk's gains costs, and how much of it a fine-tuning takes back.

    python benchmarks/averaging.py OUT --trunk TRUNK --config train_configs/conjformer/stories3m.yaml \
        [--rates 3e-5,1e-4,5e-5:constant --short 400] [--seeds 0,1,2] [--out FILE.json] [--training.steps N ...]

Converts (`--norms mean`, and `fold` for comparison), fine-tunes for --short steps at every rate (RATE:SCHEDULE: of
another schedule than the config's), then with the config's own rate and steps for every seed. Perplexities are those of
every checkpoint on all held-out rows of the config. Goes on where it was interrupted: what lies in OUT is not done
again.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.conjformer import held_out, model_of
from benchmarks.drift import converted, fine_tuned, once
from benchmarks.tables import Tables, add_out, written
from benchmarks.timing import machine
from sgt_titan.config.door import read_config, split_words
from sgt_titan.config.origin import trunk_directory
from sgt_titan.data.cache import prepare
from sgt_titan.evaluation.world.samples import Padded, Sample, batched, padded
from sgt_titan.export import export_checkpoint

STARTS = ("mean", "fold")
SCHEDULES = {
    "": [],  # the config's
    "linear": ["--lr_scheduler.decay_type", "linear"],
    "constant": ["--lr_scheduler.min_lr_factor", "1"],
}


def rows_of(config: Any) -> list[Padded]:
    """All rows that the config holds out, whole."""
    view = prepare(config, config.trunk.path, progress=False).validation
    ids = [view.tokens(i).astype("int64") for i in range(len(view))]
    rows = [Sample(x, x < 0, x < 0) for x in ids]  # nothing to hide, nothing answered
    vocab = model_of(config.trunk.path).config.vocab_size
    return [padded(part, 0, torch.device("cpu")) for part in batched(rows, vocab)]


def trained(out: Path, name: str, start: str, arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """The directory of a fine-tuning from what ``convert --plain --norms start`` wrote."""
    words = ["--trunk.path", str(out / start), "--finetune.teacher", arguments.trunk, *overrides]
    return fine_tuned(name, arguments.config, out / name, words)


def curve(run: Path, batches: list[Padded]) -> dict[int, float]:
    """Step -> perplexity of its checkpoint; kept beside them."""

    def measured() -> dict:
        found = {}
        for step in sorted((run / "checkpoints").glob("step-*")):
            model = export_checkpoint(step, run / "at-step", overwrite=True)
            found[int(step.name.removeprefix("step-"))] = math.exp(held_out(model_of(str(model)), batches)[0])
        return found

    return {int(step): value for step, value in once(run / "curve.json", measured).items()}


def measure(arguments: argparse.Namespace, overrides: list[str], tables: Tables) -> None:
    """Both tables."""
    out, trunk = arguments.dir, arguments.trunk
    for start in STARTS:
        converted(trunk, out / start, "--plain", "--norms", start)
    config, _ = read_config(
        arguments.config, ["--trunk.path", str(out / "mean"), "--finetune.teacher", trunk, *overrides]
    )
    batches, rate = rows_of(config), f"{config.optimizer.lr:g}"
    plain = {path: math.exp(held_out(model_of(str(path)), batches)[0]) for path in (trunk, *(out / s for s in STARTS))}
    original = plain[trunk]

    def short(start: str, rate: str, schedule: str) -> float:
        words = [*overrides, "--optimizer.lr", rate, *SCHEDULES[schedule], "--training.steps", str(arguments.short)]
        run = trained(out, "-".join(filter(None, (start, rate, schedule))), start, arguments, words)
        return curve(run, batches)[arguments.short]

    tables.start(
        "Rates",
        {
            "start": "",
            "rate": ".0e",
            "schedule": "",
            f"perplexity after {arguments.short} steps": ".3f",
            "above the original": "+.1%",
        },
    )
    for start, one in [("averaged gains", r) for r in arguments.rates.split(",")] + [("folded gains", rate)]:
        lr, _, schedule = one.partition(":")
        found = short({"averaged gains": "mean", "folded gains": "fold"}[start], lr, schedule)
        tables.row(start, float(lr), schedule or config.lr_scheduler.decay_type, found, found / original - 1)

    runs = [
        trained(out, f"seed-{s}", "mean", arguments, [*overrides, "--run.seed", s]) for s in arguments.seeds.split(",")
    ]
    curves = [curve(run, batches) for run in runs]
    tables.start("Settled", {"": "", "perplexity": ".3f", "above the original": "+.2%"})
    tables.row("original", original, None)
    tables.row("gains folded", plain[out / "fold"], plain[out / "fold"] / original - 1)
    tables.row("gains averaged", plain[out / "mean"], plain[out / "mean"] / original - 1)
    found = {step: sorted(c[step] for c in curves) for step in sorted(set.intersection(*map(set, curves)))}
    for step, values in found.items():
        cell = (median(values), values[0], values[-1]) if len(values) > 1 else tuple(values)
        over = tuple(value / original - 1 for value in cell)
        tables.row(f"averaged, fine-tuned {step:,} steps", *((cell, over) if len(values) > 1 else (cell[0], over[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="OUT", type=Path)
    parser.add_argument("--trunk", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rates", default="3e-5,1e-4,3e-4")
    parser.add_argument("--short", type=int, default=400)
    parser.add_argument("--seeds", default="0,1,2")
    add_out(parser)
    arguments, overrides = split_words(parser, sys.argv[1:])
    if unknown := {rate.partition(":")[2] for rate in arguments.rates.split(",")} - {*SCHEDULES}:
        parser.error(f"--rates: RATE:SCHEDULE with {' or '.join(filter(None, SCHEDULES))}, not {', '.join(unknown)}")
    arguments.trunk = trunk_directory(arguments.trunk)
    disable_progress_bar()
    with written(arguments.out, machine()) as tables:
        measure(arguments, overrides, tables)


if __name__ == "__main__":
    main()
