"""One page: the ratios that this project is held to, on this machine: ``make bench``, minutes.

    python benchmarks/page.py [--out FILE] [--only WORD]

Runs the benchmarks that measure them one after the other, each smaller than by its own command, and says at the end
what they found, with the goal where there is one. Rows of a piece in which others used the machine, or whose steps were
far apart, say so: those ratios are not to be trusted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import ROOT, add_out, written

Row = tuple[str, float, str] | tuple[str, float, str, bool]
Rows = Iterator[Row]
"""What, the ratio, the goal in words; and whether others have disturbed it, where that is known of a row."""


class Piece(NamedTuple):
    """A benchmark, and how its tables, as rows by their first cell, become ratios."""

    name: str
    words: list[str]
    ratios: Callable[[dict[str, list[Any]]], Rows]
    needs: str = ""  # a variable of the environment


def median(cell: Any) -> float:
    return cell[0] if isinstance(cell, list) else cell


ARMS = {
    "naive": "(a) naive: transformers twice, whole logits",
    "eager": "(b) + loss in chunks of tokens",
    "compiled": "(b) + torch.compile",
    "products": "(d) the products of a step alone",
    "least": "(d) and every other pass once, and AdamW",
}


def steps(rows: dict[str, list[Any]]) -> Rows:
    """Of training.py: cells are s, bound, tokens/s, times (a), HFU, peak, faults, others."""
    of = {name: rows[arm] for name, arm in ARMS.items()}
    yield "tokens a second, eager / naive", of["eager"][3], "1.8"
    yield "tokens a second, compiled / naive", of["compiled"][3], "1.8"
    yield "tokens a second, the matrix products of a step alone / naive", of["products"][3], "no way has more"
    yield "tokens a second, every pass of a step once / naive", of["least"][3], "none of torch's operators has more"
    yield "of the ceiling (HFU), eager", of["eager"][4], "0.75"
    yield "of the ceiling (HFU), compiled", of["compiled"][4], "0.75"
    yield "peak memory, eager / naive", of["eager"][5] / of["naive"][5], "0.25"


def guarded(rows: dict[str, list[Any]]) -> Rows:
    """Of guard.py: cells are time, its limit, memory, its limit, remark. What it holds nobody else changes."""
    for name, (seconds, most, memory, most_memory, remark) in rows.items():
        yield f"{name}: time", seconds, f"at most {most}", bool(remark)
        yield f"{name}: memory", memory, f"at most {most_memory}", False


def start(rows: dict[str, list[Any]]) -> Rows:
    first = median(rows["the demo's first step"][0])
    floor = median(rows["`import torch, transformers`"][0])
    yield "seconds from the command to the demo's first step", first, "3"
    yield "the same / `import torch, transformers` alone", first / floor, ""


def compiled(rows: dict[str, list[Any]]) -> Rows:
    seconds = {name: median(cells[0]) for name, cells in rows.items()}
    first = seconds["compiled, nothing kept"]
    yield "seconds to a first step that is compiled, nothing kept", first, ""
    yield "the next start / that", seconds["compiled, the next start"] / first, ""


def memory(rows: dict[str, list[Any]]) -> Rows:
    for config, (_, _, ratio) in rows.items():
        yield f"memory of {config}, measured / `sgt-titan plan`", ratio, "0.9 to 1.1"


def tokens(rows: dict[str, list[Any]]) -> Rows:
    for way in ("`datasets.map` with the tokenizer", "a preparation, plain", "a preparation, chat"):
        yield f"tokens a second a core, {way} / `encode_batch` alone", rows[way][1], ""


def training(size: str) -> list[str]:
    names = "|".join(arm.replace("(", r"\(").replace(")", r"\)").replace("+", r"\+") for arm in ARMS.values())
    return ["training.py", "--sizes", size, "--arms", f"^({names})$", "--repeats", "4"]


PIECES = (
    Piece("a step, V 32,000", training("V 32,000"), steps),
    Piece("a step, V 128,256", training("V 128,256"), steps),
    Piece("loss and small steps", ["guard.py"], guarded),
    Piece("a start", ["process.py", "start", "--repeats", "2"], start),
    Piece("a compiled start", ["process.py", "compile", "--repeats", "1"], compiled),
    Piece("memory of a run", ["process.py", "memory"], memory),
    Piece("preparation", ["tokenizing.py", "speed", "--rows", "3000"], tokens, "SGT_TITAN_ASSETS"),
)


def taken(piece: Piece) -> tuple[list[Row], int]:
    """Its ratios, and how many lines say that they are not to be trusted. Ends the program where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "tables.json")
        command = [sys.executable, str(ROOT / "benchmarks" / piece.words[0]), *piece.words[1:], "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not out.exists():
            sys.exit(f"{piece.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        tables = json.loads(out.read_text(encoding="utf-8"))["tables"]
    rows = {row[0]: row[1:] for table in tables for row in table["cells"]}
    doubts = sum("not to be trusted" in line.lower() for line in (done.stdout + done.stderr).split("\n"))
    return list(piece.ratios(rows)), doubts


def versions() -> str:
    """This machine, and what it runs, in a line."""
    cpu, commit = platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(": ")[2]
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0:
        commit = f", {found.stdout.strip()}"
    libraries = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "torchtitan")
    )
    return f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, {libraries}{commit}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only pieces whose name contains this")
    add_out(parser)
    words = parser.parse_args()
    pieces = [piece for piece in PIECES if words.only in piece.name]
    if not pieces:
        parser.error(f"no such piece; there are {', '.join(piece.name for piece in PIECES)}")
    found = []
    for piece in pieces:
        if piece.needs and not os.environ.get(piece.needs):
            print(f"{piece.name}: left out, needs {piece.needs}", file=sys.stderr, flush=True)
            continue
        began = time.monotonic()
        found.append((piece, *taken(piece)))
        print(f"{piece.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    with written(words.out, versions()) as tables:
        tables.start("", {"what": "", "ratio": ".2f", "goal": "", "remark": ""})
        for piece, ratios, doubts in found:
            for what, ratio, goal, *known in ratios:
                disturbed = known[0] if known else doubts
                tables.row(f"{piece.name}: {what}", ratio, goal, "not to be trusted" if disturbed else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
