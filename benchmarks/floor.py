"""What follows from an answer, and from the places of what it repeats: ``python benchmarks/floor.py EXPORT``.

Three readers without anything that was sent, trained as the sequence attacker is (same suite, same public rows):

* who has the true answer (the attack ``answer``);
* who has it and, in their places, the marked values that it holds: what a transform gives away that sends the values
  which an answer copies, where they stand, and not a nat of any other token;
* who has it and, in their places, all hidden tokens that it repeats.

Tokens in place count as read. The last two are in no evaluation: it takes an oracle to know what an answer repeats.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import add_out, written
from benchmarks.timing import machine
from sgt_titan.config.door import split_words
from sgt_titan.config.origin import settle
from sgt_titan.data.cache import cache_dir
from sgt_titan.evaluation.attacks import ATTACKS
from sgt_titan.evaluation.measure.setting import Setting, load_setting
from sgt_titan.evaluation.measure.suite import SUITES
from sgt_titan.evaluation.options import ANSWER, suite_argument
from sgt_titan.evaluation.scores import guessing, recovery
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import nothing
from sgt_titan.evaluation.world.samples import Sample, data_config

GROUPS = {
    "all hidden tokens": "top1",
    "not repeated by the answer": "unrepeated_top1",
    "repeated": "repeated_top1",
    "content": "content_top1",
    "marked values": "marked_top1",
    "of unneeded values": "unneeded_top1",
    "those whole": "unneeded_span_exact",
}


def repeated(rows: Sequence[Sample], tokenizer) -> list[Sample]:
    """The rows with the hidden tokens that their answers repeat in clear."""
    world = World(rows, (), nothing(), None)  # type: ignore[arg-type]
    repeated_N = recovery.repeated_tokens(world, {}, tokenizer)
    found, at = [], 0
    for row in rows:
        shown = row.obfuscate.copy()
        count = int(row.obfuscate.sum())
        shown[row.obfuscate] = ~repeated_N[at : at + count]
        found.append(row._replace(obfuscate=shown))
        at += count
    return found


def needed_values(rows: Sequence[Sample], tokenizer) -> list[Sample]:
    """The rows with the marked values that their answers hold in clear."""
    others = recovery.with_unneeded(World(rows, (), nothing(), None), tokenizer)  # type: ignore[arg-type]
    return [
        row._replace(obfuscate=row.obfuscate & (~row.marked | other.marked))
        for row, other in zip(rows, others, strict=True)
    ]


READERS: dict[str, tuple[str, Callable | None]] = {
    "answer": ("the answer", None),
    "values": ("the answer, and the values that it holds in their places", needed_values),
    "repeats": ("the answer, and all that it repeats in its place", repeated),
}


def read(setting: Setting, suite: str, in_place: Callable | None) -> dict:
    """Scores of the reader who has the answers, of all hidden tokens. Who has them alone is found once, as in an
    evaluation."""
    attack, rows, corpus = ATTACKS[ANSWER], setting.prompts, setting.corpus
    effort = attack.arguments(suite) or {}
    world = whole = World(rows, corpus, nothing(), setting.trunk, guessing.SEED)
    if in_place:
        shown = (in_place(part, setting.tokenizer) for part in (rows, corpus))
        world = World(*shown, nothing(), setting.trunk, guessing.SEED)
    kept = guessing.kept(cache_dir(setting.config), world.rows, world.corpus, world.table_VD)
    guess = attack.run(**world.granted(attack.run) | {"checkpoints": kept}, **effort)
    top_NK = whole.truth_N[:, None].repeat(1, guess.top_NK.shape[1])
    hidden_N = np.concatenate([row.obfuscate[before.obfuscate] for row, before in zip(world.rows, rows, strict=True)])
    top_NK[torch.from_numpy(hidden_N)] = guess.top_NK
    found = recovery.score(top_NK, whole, setting.tokenizer, frequent=recovery.frequent_tokens(corpus))
    return found | {"notes": guess.notes}


def percent(estimate: dict | None) -> str | None:
    if estimate is None:
        return None
    return f"{100 * estimate['value']:.1f}% [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="its template and rows are taken, nothing else")
    parser.add_argument("--trunk", help="directory or a config's name (default: the run's own)")
    parser.add_argument("--data", help="as data.source, or a config's name (default: the run's)")
    suite_argument(parser, "of the readers' effort, prompts and public rows (default quick)")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), help="default: all")
    add_out(parser)
    arguments, overrides = split_words(parser, sys.argv[1:])
    settle(arguments)
    config = data_config(arguments.export, arguments.trunk, arguments.data, overrides)
    suite = SUITES[arguments.suite]
    setting = load_setting(arguments.export, config, rows=suite.rows, corpus=suite.corpus)
    with written(arguments.out, machine()) as tables:
        tables.start("", dict.fromkeys(("who has", *GROUPS), ""))
        for name, in_place in (READERS[reader] for reader in arguments.readers):
            found = read(setting, arguments.suite, in_place)
            tables.row(name, *(percent(found.get(key)) for key in GROUPS.values()))
            print(f"({'; '.join(found['notes'])})", file=sys.stderr)


if __name__ == "__main__":
    main()
