"""What is guessed without looking at what was sent does not depend on a mechanism: found once for all evaluations of
the same prompts.

It costs as much as the strongest attack. What the attack returned is kept beside the data's cache
(``world/checkpoints.py``), in a file named by all that decides it: the prompts' hidden positions and clean tokens, the
public rows, the table, and the effort.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sgt_titan.evaluation.options import ANSWER
from sgt_titan.evaluation.world.checkpoints import in_files
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.evaluation.world.threat import Checkpoints

VERSION = {False: 2, True: 3}  # of the attack, without and with the answer: part of a file's name
SEED = 0  # of its network, in every evaluation: another seed would be another file


def kept(folder: Path, prompts: Sequence[Sample], corpus: Sequence[Sample], table_VD: torch.Tensor) -> Checkpoints:
    """What is found of these prompts without looking, under ``folder``, a cache of data."""

    def path(name: str, effort: Mapping[str, Any]) -> Path:
        return location(folder, prompts, corpus, table_VD, effort, answered=name == ANSWER)

    return in_files(path)


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
