"""What is guessed without looking at what was sent does not depend on a mechanism: found once for all evaluations of
the same prompts.

It costs as much as the strongest attack. What the attack returned is kept beside the data's cache, in a file named by
all that decides it: the prompts' hidden positions and clean tokens, the public rows, the table, and the effort.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sgt_titan import disk
from sgt_titan.data.cache import filled_once
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.evaluation.world.threat import Curve, Guess

VERSION = {False: 1, True: 2}  # of the attack, without and with the answer: part of a file's name
SEED = 0  # of its network, in every evaluation: another seed would be another file


def location(
    folder: Path,
    prompts: Sequence[Sample],
    corpus: Sequence[Sample],
    table_VD: torch.Tensor,
    effort: Mapping[str, Any],
    *,
    answered: bool = False,
) -> Path:
    """The file of these prompts under ``folder``, a cache of data. answered: of who has their answers."""
    digest = hashlib.sha256(json.dumps({"version": VERSION[answered], "seed": SEED, **effort}, sort_keys=True).encode())
    for rows in (prompts, corpus):
        digest.update(str(len(rows)).encode())
        for row in rows:
            answer = (row.answer.astype("<i8"),) if answered else ()
            for part in (row.ids.astype("<i8"), row.obfuscate.astype("u1"), *answer):
                digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    digest.update(table_VD.detach().float().cpu().contiguous().numpy().tobytes())
    return folder / "guesses" / f"{digest.hexdigest()[:32]}.safetensors"


def once(path: Path, find: Callable[[], Guess]) -> Guess:
    """The guess of ``path``, found and written there where it is missing or damaged.

    Raises:
        UserError: the cache cannot be written.
    """
    with filled_once(path):  # several evaluations side by side find it once
        if (known := _read(path)) is None:
            known = find()
            _write(path, known)
        return known


def _write(path: Path, found: Guess) -> None:
    curve = found.curve
    if curve is None:
        raise ValueError("a guess without its curve")
    tensors = {"top": found.top_NK, **{f"curve.{i}": top_N for i, top_N in enumerate(curve.top_N)}}
    about = {"flops": found.flops, "notes": found.notes, "axis": curve.axis, "at": curve.at, "extra": curve.extra}
    about["extra_label"] = curve.extra_label
    with disk.replacing(path) as work:
        save_file({name: t.contiguous() for name, t in tensors.items()}, work, metadata={"about": json.dumps(about)})


def _read(path: Path) -> Guess | None:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tops = tuple(file.get_tensor(f"curve.{i}") for i in range(len(about["at"])))
            curve = Curve(about["axis"], tuple(about["at"]), tops, tuple(about["extra"]), about["extra_label"])
            return Guess(file.get_tensor("top"), curve, about["flops"], tuple(about["notes"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
