"""How time and memory of a step grow with each dimension, ours beside the naive way: ``python benchmarks/growth.py``.

From one small shape, one dimension at a time is changed. Prints a table; ``--plots FOLDER`` draws it. Memory is
what torch holds at most during a step beyond what it holds between steps. Both ways keep the memory that they free
(``titan/cpu_support.py``), and alternate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms import Arm, Size, device, naive, ours
from benchmarks.tables import add_out, written
from benchmarks.timing import Watched, doubts, machine, peak_bytes, watched
from sgt_titan.titan.cpu_support import keep_memory

BASE = Size(width=128, layers=4, hidden=344, heads=4, kv_heads=2, vocab=16_000, rows=4, length=128)
AXES: dict[str, tuple[str, list[int]]] = {
    "T": ("tokens of a row", [64, 128, 256, 512]),
    "V": ("vocabulary", [8_000, 16_000, 32_000, 64_000]),
    "D": ("width", [64, 128, 256, 512]),
    "layers": ("layers of the trunk", [2, 4, 8, 16]),
    "B": ("rows, one pair group", [2, 4, 8, 16]),
}
WAYS = {"ours": ours, "naive": naive}


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


def summary(of: dict[str, dict[str, dict]], what: str, form: str) -> str:
    """``ours ... / naive ...`` along an axis."""
    return " / ".join(", ".join(format(ways[way][what], form) for ways in of.values()) for way in WAYS)


def draw(found: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for axis, (words, values) in AXES.items():
        figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        for panel, what, unit in zip(panels, ("seconds", "peak"), ("s a step", "peak MiB above rest"), strict=True):
            for way, colour in zip(WAYS, ("tab:blue", "tab:orange"), strict=True):
                points = [found[axis][str(value)][way] for value in values]
                panel.plot(values, [p[what] for p in points], "o-", label=way, color=colour)
                if what == "seconds":
                    panel.fill_between(values, [p["low"] for p in points], [p["high"] for p in points], alpha=0.2)
            panel.set(xlabel=f"{axis}: {words}", ylabel=unit, xscale="log", yscale="log", xticks=values)
            panel.set_xticks([], minor=True)
            panel.set_xticklabels([f"{value:,}" for value in values])
            panel.grid(alpha=0.3)
        panels[0].legend(frameon=False)
        figure.savefig(folder / f"growth-{axis}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    add_out(parser)
    parser.add_argument("--plots", help="draw into this folder")
    words = parser.parse_args()
    keep_memory()
    dist.init_process_group("nccl" if device().type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, dict] = {}
    with written(words.out, machine()) as tables:
        for axis, (about, values) in AXES.items():
            columns = {f"{axis}: {about}": ",d", "way": "", "s a step, median (spread)": ".3f", "peak MiB": ",.0f"}
            tables.start("", columns)
            for value in values:
                measured = measure({way: build(at(axis, value)) for way, build in WAYS.items()}, words.repeats)
                for way, (calls, peak) in measured.items():
                    seconds = [call.seconds for call in calls]
                    figures = {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
                    found.setdefault(axis, {}).setdefault(str(value), {})[way] = figures | {"peak": peak}
                    tables.row(value, way, tuple(figures.values()), peak)
                for doubt in doubts({way: calls for way, (calls, _) in measured.items()}):
                    print(f"NOT TO BE TRUSTED: {doubt}", flush=True)
        tables.start("", {"": "", "peak MiB, ours / naive": "", "seconds, ours / naive": ""})
        for axis, of in found.items():
            points = ", ".join(value if axis != "V" else f"{int(value) // 1000}k" for value in of)
            tables.row(f"{axis} {points}", summary(of, "peak", ".0f"), summary(of, "seconds", ".2f"))
    if words.plots:
        draw(found, Path(words.plots))


if __name__ == "__main__":
    main()
