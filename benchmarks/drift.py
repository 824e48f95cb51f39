"""The frontier of drift: what a model that was moved away from its public original costs, and what of it is still read.

    python benchmarks/drift.py OUT --export EXPORT [--trunk demo] [--data demo] [--shares 0,0.3,0.5,0.7,0.8] \
        [--config YAML] [--figure FILE.svg] [--out FILE.json] [--training.steps N ...]

For every share S of `sgt-titan conjformer convert --plain --shake S`: one model for the server and one of the
attacker's own, of the same recipe and other noise, both fine-tuned by --config; then the first in a secret basis and
every attack on it, once with the public model in hand and once with his own. Share 0 is drift by the fine-tuning alone.
Goes on where it was interrupted: what lies in OUT is not done again. EXPORT names the rows under attack.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.conjformer import attacked, held_out, model_of
from benchmarks.tables import ROOT, Tables, add_out, written
from benchmarks.timing import machine
from sgt_titan import disk
from sgt_titan.config.door import split_words
from sgt_titan.config.origin import trunk_directory
from sgt_titan.evaluation.measure.setting import Setting, load_setting
from sgt_titan.evaluation.report import plots
from sgt_titan.evaluation.scores import recovery
from sgt_titan.evaluation.studies import grid
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import nothing
from sgt_titan.evaluation.world.rotated import load_rotation
from sgt_titan.evaluation.world.samples import data_config, load_trunk

PROMPTS = 32
MATCHING = {
    "spectral": "spectral",
    "fingerprints": "fingerprints",
    "norm_matching": "norms",
    "gram_matching": "Gram",
    "invariant_inverter": "learned",
    "procrustes": "Procrustes",
}
"""Attack -> its column; each is tried with the public model and with the attacker's own."""
CIPHERS = {"substitution": "cipher", "substitution_table": "cipher, then Procrustes"}
"""These know public text, the second the public table too, and no weights."""
PUBLIC, OWN = "public", "own"


def command(*words: str | Path) -> None:
    """One of ours, as anybody would type it."""
    if code := grid.execute([str(word) for word in words]):
        raise SystemExit(code)


def once(file: Path, measured: Callable[[], dict]) -> dict:
    """What ``file`` holds; if it is not there, it is measured and kept."""
    if not file.is_file():
        disk.write(file, json.dumps(measured(), indent=1))
    return json.loads(file.read_text(encoding="utf-8"))


def converted(model: str | Path, out: Path, *words: str | Path) -> Path:
    """``out``, which `conjformer convert` writes."""
    if not (out / "config.json").is_file():
        command("conjformer", "convert", model, out, *words)
    return out


def fine_tuned(name: str, config: str, run: Path, overrides: list[str]) -> Path:
    """``run``, the directory of a training."""
    step = grid.training(name, config, run, overrides)
    if not step.is_done():
        command(*step.words)
    return run


def trained(home: Path, start: list[str], config: str, overrides: list[str]) -> Path:
    """The export of a fine-tuning in ``home/run``, from what ``convert *start home/start --plain`` writes."""
    begun = converted(start[0], home / "start", "--plain", *start[1:])
    words = ["--trunk.path", str(begun), *overrides]
    return fine_tuned("-".join(home.parts[-2:]), config, home / "run", words) / "export"


def rotated(model: Path, home: Path) -> tuple[Path, Path, Path]:
    """Server, client and secret of a model."""
    secret = home / "secret.json"
    return converted(model, home / "server", "--secret", secret), home / "server-client", secret


def attacks(setting: Setting, server: tuple[Path, Path, Path], own: Path | None, steps: int) -> dict:
    """Per attack of ``MATCHING`` top-1, top-10, what it notes and its curve; own: in the place of the public model."""
    trunk = load_trunk(own, torch.device("cpu")) if own else setting.trunk
    public = own or setting.config.trunk.path
    mechanism = load_rotation(nothing(), *server, public, own=own is not None)
    world = World(setting.prompts[:PROMPTS], setting.corpus, mechanism, trunk, 0)
    frequent, found = recovery.frequent_tokens(setting.corpus), {}
    for key in [*MATCHING, *([] if own else CIPHERS)]:
        guess = attacked(key, world, steps)
        scores = recovery.score(guess.top_NK, world, setting.tokenizer, frequent=frequent)
        curve = {}
        if guess.curve:
            shares = [(top_N == world.truth_N).double().mean().item() for top_N in guess.curve.top_N]
            curve = dict(zip((f"{at:g}" for at in guess.curve.at), shares, strict=True))
        found[key] = {"top1": scores["top1"], "top10": scores["top10"], "notes": list(guess.notes), "curve": curve}
    return found


def point(arguments: argparse.Namespace, overrides: list[str], setting: Setting, share: float | None) -> dict:
    """Everything that is said of one share, None being the original itself; kept in its directory."""
    home = arguments.dir / ("exact" if share is None else f"{share:g}")
    theirs, own = Path(setting.config.trunk.path), None
    if share is not None:
        start = [setting.config.trunk.path, *(["--shake", f"{share:g}"] if share else [])]
        theirs, own = (
            trained(home / whose, start, arguments.config, [*overrides, "--run.seed", seed])
            for whose, seed in (("theirs", "0"), (OWN, "1"))
        )

    def measured() -> dict:
        server = rotated(theirs, home)
        nats, count = held_out(model_of(str(theirs)), setting.full_batches)
        found = {"share": share, "perplexity": math.exp(nats), "tokens": count}
        found[PUBLIC] = attacks(setting, server, None, arguments.steps)
        return found | ({OWN: attacks(setting, server, own, arguments.steps)} if own else {})

    return once(home / "point.json", measured)


def best(p: dict, key: str, score: str) -> float:
    """What the better attacker reads; a cipher asks nothing of his model."""
    attackers = (PUBLIC,) if key in CIPHERS else (PUBLIC, OWN)
    return max(p[who][key][score]["value"] for who in attackers if who in p)


def reported(points: list[dict], original: float, tables: Tables) -> None:
    """One table of top-1, the better of both attackers in each; one of what a longer list of guesses holds."""
    head = {"share of noise": "", "perplexity": ".3f", "above the original": "+.1%"}
    for title, score in (("top-1", "top1"), ("top-10", "top10")):
        tables.start(title, head | dict.fromkeys((*MATCHING.values(), *CIPHERS.values()), ".1%"))
        for p in points:
            read = [best(p, key, score) for key in (*MATCHING, *CIPHERS)]
            name = "none: the original" if p["share"] is None else f"{p['share']:g}"
            tables.row(name, p["perplexity"], p["perplexity"] / original - 1, *read)


def figure(points: list[dict], original: float) -> str:
    """Top-1 over the cost; the better of both attackers."""
    cost = [100 * (p["perplexity"] / original - 1) for p in points]

    def draw(axes: Any) -> None:
        names = {**MATCHING, **CIPHERS}
        for (key, name), colour, mark in zip(
            names.items(), (*plots.COLOURS, *2 * [plots.GREY]), (*plots.MARKERS, "x", "+"), strict=True
        ):
            axes.plot(cost, [100 * best(p, key, "top1") for p in points], color=colour, marker=mark, label=name)
        axes.axhline(1.3, color=plots.GREY, linestyle=":")
        axes.set_xlabel("perplexity above the original, %")
        axes.set_ylabel("tokens read (top-1), %")
        axes.legend(fontsize=7)

    return plots.figure(draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="OUT", type=Path)
    parser.add_argument("--export", required=True)
    parser.add_argument("--trunk", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--config", default=str(ROOT / "train_configs/conjformer/drift_demo.yaml"))
    parser.add_argument("--shares", default="0,0.3,0.5,0.7,0.8")
    parser.add_argument(
        "--rows", type=int, default=64, help="of which the perplexity is taken; the first 32 are attacked"
    )
    parser.add_argument("--steps", type=int, default=60, help="of the learned attack (default 60)")
    parser.add_argument("--figure", type=Path)
    add_out(parser)
    arguments, overrides = split_words(parser, sys.argv[1:])
    disable_progress_bar()
    config = data_config(arguments.export, trunk_directory(arguments.trunk), arguments.data, [])
    setting = load_setting(arguments.export, config, rows=arguments.rows, corpus=2000)
    original = math.exp(held_out(setting.trunk, setting.full_batches)[0])
    with written(arguments.out, machine()) as tables:
        shares = [None, *map(float, arguments.shares.split(","))]
        points = [point(arguments, overrides, setting, share) for share in shares]
        reported(points, original, tables)
    if arguments.figure:
        arguments.figure.write_text(figure(points, original), encoding="utf-8")


if __name__ == "__main__":
    main()
