"""What attacks read beyond what is guessed without looking, and the best of each threat model.

Works on the parts that the runner saved (``recovery.score``): a part's ``counts`` hold hits and tokens of each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sgt_titan.evaluation.world.threat import KINDS
from sgt_titan.metrics.interval import ratio

# The first leads: what one who sees the traffic of a client with held noise has (the export's default). Fresh repeats
# are had by whoever makes a client without it send a prompt again; z by nobody.
BEST = {"single": "best", "repeats": "best_repeats", "noisy": "best_noisy"}


# What a reading is compared with (``threat.KINDS``), and under which two keys of its part: what that reads, and what is
# read beyond it.
BESIDE = {"guess": ("guesses", "difference"), "answer": ("answer_tells", "beyond_answer")}


def compared(
    attacks: Mapping[str, dict[str, Any]], unsent: Mapping[str, dict[str, Any] | None], *, seed: int = 0
) -> dict[str, Any]:
    """Attack -> its part with ``guesses`` and ``difference`` by group (``top1``, ``content_top1`` ...), if there is a
    guess: what the same attacker gets right without what was sent, and what seeing it added; with ``answer_tells`` and
    ``beyond_answer`` likewise, of who has the true answer instead.

    The interval of a difference resamples prompts, both attacks on the same ones. unsent: by kind.
    """
    found = {}
    for name, part in attacks.items():
        shown = {key: value for key, value in part.items() if key != "counts"}
        for kind, (told, beyond) in BESIDE.items():
            other = unsent.get(kind)
            if not other or part.get("kind") in ("guess", kind) or "counts" not in part or "counts" not in other:
                continue
            shared = [group for group in part["counts"] if group in other["counts"]]
            shown[told] = {group: other[group] for group in shared}
            shown[beyond] = {
                group: difference(part["counts"][group], other["counts"][group], seed=seed) for group in shared
            }
        found[name] = shown
    return found


def difference(read: list[list[int]], guessed: list[list[int]], *, seed: int = 0) -> dict[str, Any]:
    """Share read less share guessed, of the same tokens, as ``Estimate.as_dict``."""
    (read_B, tokens_B), (guessed_B, same_B) = (tuple(map(np.asarray, part)) for part in (read, guessed))
    if not np.array_equal(tokens_B, same_B):
        raise ValueError("the two attacks were scored on other tokens")
    return ratio(read_B - guessed_B, tokens_B, seed=seed).as_dict()


def best(attacks: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """``best``, ``best_repeats``, ``best_noisy``: the attack that reads most under each threat model there is.

    Whoever has repeats, or z, has one observation as well: the attacks on that count for him too.
    """
    kinds = {name: part.get("kind", "single") for name, part in attacks.items()}
    found = {}
    for kind in KINDS:
        among = [name for name in attacks if kinds[name] in (kind, "single")]
        if kind in BEST and kind in kinds.values():
            found[BEST[kind]] = max(among, key=lambda name: attacks[name]["top1"]["value"] or 0.0)
    if found:  # a run of few attacks may have none of a single observation
        found.setdefault("best", next(iter(found.values())))
    return found
