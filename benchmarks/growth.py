"""How time and memory of a step grow with each dimension, ours beside the naive way: ``python benchmarks/growth.py``.

From one small shape, one dimension at a time is changed. Prints a table; ``--plots FOLDER`` draws it. Memory is
what torch holds at most during a step beyond what it holds between steps. Both ways keep the memory that they free
(``titan/cpu_support.py``). Beside them what no way to make the step can leave out: its matrix products alone, these
with attention and a softmax of every logit, and with ``--passes`` these with every other pass over activations and
logits, by torch's operators, each once. All alternate.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms import Arm, Size, device, naive, necessary, ours
from benchmarks.tables import add_out, written
from benchmarks.timing import Watched, doubts, machine, peak_bytes, watched
from sgt_titan.processes import keep_memory

BASE = Size(width=128, layers=4, hidden=344, heads=4, kv_heads=2, vocab=16_000, rows=4, length=128)
AXES: dict[str, tuple[str, list[int]]] = {
    "T": ("tokens of a row", [64, 128, 256, 512]),
    "V": ("vocabulary", [8_000, 16_000, 32_000, 64_000]),
    "D": ("width", [64, 128, 256, 512]),
    "layers": ("layers of the trunk", [2, 4, 8, 16]),
    "B": ("rows, one pair group", [2, 4, 8, 16]),
}
WAYS: dict[str, Callable[[Size], Arm]] = {
    "ours": ours,
    "naive": naive,
    "products": necessary,
    "attention": lambda size: necessary(size, more=True),
}
COLUMNS = {
    "size": "",
    "peak MiB, ours": ",.0f",
    "naive": ",.0f",
    "s a step, ours": ".3f",
    "naive way": ".3f",
    "times the naive way": ".2f",
    "products alone": ".2f",
    "with attention and softmax": ".2f",
}


def at(axis: str, value: int) -> Size:
    """The base shape with one dimension changed; the MLP's width follows D."""
    if axis == "D":
        return replace(BASE, width=value, hidden=value * 43 // 16)
    return replace(BASE, **{{"T": "length", "V": "vocab", "layers": "layers", "B": "rows"}[axis]: value})


def measure(arms: dict[str, Arm], repeats: int) -> dict[str, tuple[list[Watched], float]]:
    """Every step of each, in turn, and the peak above what is held between steps, MiB."""
    for arm in arms.values():
        arm.step()
        arm.step()
    calls: dict[str, list[Watched]] = {way: [] for way in arms}
    for _ in range(repeats):
        for way, arm in arms.items():
            calls[way].append(watched(arm.step))
    return {way: (calls[way], peak_bytes(arm.step) / 2**20) for way, arm in arms.items()}


def figures(measured: dict[str, tuple[list[Watched], float]]) -> dict[str, dict[str, float]]:
    """Way -> median, lowest and highest seconds, and peak."""
    found = {}
    for way, (calls, peak) in measured.items():
        seconds = [call.seconds for call in calls]
        found[way] = {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds), "peak": peak}
    return found


def draw(found: dict, folder: Path) -> None:
    """found: axis -> its values, as numbers -> way -> figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    lines = {"ours": ("ours", "tab:blue"), "naive": ("naive", "tab:orange"), "products": ("products alone", "tab:gray")}
    for axis, points in found.items():
        figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        for panel, what, unit in zip(panels, ("seconds", "peak"), ("s a step", "peak MiB above rest"), strict=True):
            for way, (label, colour) in lines.items():
                of = [ways[way] for ways in points.values()]
                if what == "peak" and way == "products":
                    continue
                panel.plot(list(points), [p[what] for p in of], "o-", label=label, color=colour)
                if what == "seconds":
                    panel.fill_between(list(points), [p["low"] for p in of], [p["high"] for p in of], alpha=0.2)
            panel.set(xlabel=f"{axis}: {AXES[axis][0]}", ylabel=unit, xscale="log", yscale="log", xticks=list(points))
            panel.set_xticks([], minor=True)
            panel.set_xticklabels([f"{value:,}" for value in points])
            panel.grid(alpha=0.3)
        panels[0].legend(frameon=False)
        figure.savefig(folder / f"growth-{axis}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    add_out(parser)
    parser.add_argument("--plots", help="draw into this folder; of all sizes")
    parser.add_argument("--compiled", action="store_true", help="ours by torch.compile")
    parser.add_argument(
        "--passes", action="store_true", help="beside them what torch's operators need for all of a step"
    )
    parser.add_argument("--sizes", default="", help="only sizes whose name this regular expression is found in")
    words = parser.parse_args()
    if words.plots and words.sizes:
        parser.error("--plots: needs all sizes")
    ways, columns = WAYS, COLUMNS
    if words.compiled:
        ways = WAYS | {"ours": lambda size: ours(size, compiled=True)}
        columns = {name.replace("s a step, ours", "s a step, ours compiled"): form for name, form in COLUMNS.items()}
    keep_memory()
    dist.init_process_group("nccl" if device().type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    bounds = ["products", "attention"]
    if words.passes:
        ways = ways | {"passes": lambda size: necessary(size, passes=True)}
        columns = columns | {"and every pass": ".2f"}
        bounds.append("passes")
    known: dict[Size, dict[str, dict[str, float]]] = {}
    with written(words.out, machine()) as tables:
        tables.start("", columns)

        def point(name: str, size: Size) -> dict[str, dict[str, float]]:
            """Each size once: every axis goes through the first."""
            if not re.search(words.sizes, name):
                return {}
            if size not in known:
                measured = measure({way: build(size) for way, build in ways.items()}, words.repeats)
                known[size] = of = figures(measured)
                shown = [*(of[way]["peak"] for way in ("ours", "naive"))]
                shown += [(of[way]["seconds"], of[way]["low"], of[way]["high"]) for way in ("ours", "naive")]
                shown += [of["naive"]["seconds"] / of[way]["seconds"] for way in ("ours", *bounds)]
                tables.row(name, *shown)
                for doubt in doubts({way: calls for way, (calls, _) in measured.items()}):
                    print(f"NOT TO BE TRUSTED: {doubt}", file=sys.stderr, flush=True)
            return known[size]

        point("D 128, 4 layers, V 16,000, B 4, T 128", BASE)
        found = {
            axis: {value: point(f"{axis} {value:,}", at(axis, value)) for value in values}
            for axis, (_, values) in AXES.items()
        }
    if words.plots:
        draw(found, Path(words.plots))


if __name__ == "__main__":
    main()
