"""What an attacker has trained, kept for those that go on from it: his guesses and his network.

In memory, or in safetensors files that are named by all that decides them, where a process finds what another made and
an interrupted evaluation what it had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sgt_titan import disk
from sgt_titan.data.cache import filled_once
from sgt_titan.evaluation.world.threat import Checkpoints, Curve, Guess

WEIGHTS = "weights."


def in_memory() -> Checkpoints:
    """They live as long as this object."""
    held: dict[str, Guess] = {}

    def once(name: str, effort: Mapping[str, Any], train: Callable[[], Guess]) -> Guess:
        key = json.dumps([name, effort], sort_keys=True)
        if key not in held:
            held[key] = train()
        return held[key]

    return Checkpoints(once)


def in_files(path: Callable[[str, Mapping[str, Any]], Path], whose: str = "data.cache_dir") -> Checkpoints:
    """One file each, ``path(name, effort)`` below the folder of the option ``whose``, made anew where it is damaged.
    Several processes make it once. ``once`` raises UserError where it cannot be written."""

    def once(name: str, effort: Mapping[str, Any], train: Callable[[], Guess]) -> Guess:
        file = path(name, effort)
        with filled_once(file, whose):
            if (known := read(file)) is None:
                known = train()
                write(file, known)
            return known

    return Checkpoints(once)


def write(file: Path, found: Guess) -> None:
    """A guess of an attack that trains, with its curve."""
    curve = found.curve
    if curve is None:
        raise ValueError("a guess without its curve")
    tensors = {"top": found.top_NK, **{f"curve.{i}": top_N for i, top_N in enumerate(curve.top_N)}}
    tensors |= {WEIGHTS + name: t.cpu() for name, t in (found.weights or {}).items()}
    about = {"flops": found.flops, "notes": found.notes, "axis": curve.axis, "at": curve.at, "extra": curve.extra}
    about["extra_label"] = curve.extra_label
    with disk.replacing(file) as work:
        save_file({name: t.contiguous() for name, t in tensors.items()}, work, metadata={"about": json.dumps(about)})


def read(file: Path) -> Guess | None:
    """None where it is not there or damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            about = json.loads((tensors.metadata() or {})["about"])
            tops = tuple(tensors.get_tensor(f"curve.{i}") for i in range(len(about["at"])))
            curve = Curve(about["axis"], tuple(about["at"]), tops, tuple(about["extra"]), about["extra_label"])
            names = [name for name in tensors.keys() if name.startswith(WEIGHTS)]  # noqa: SIM118 (it is no dict)
            weights = {name.removeprefix(WEIGHTS): tensors.get_tensor(name) for name in names}
            return Guess(tensors.get_tensor("top"), curve, about["flops"], tuple(about["notes"]), weights or None)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
