"""What the weakest observer would read from one request: the row of the embedding table nearest to each position.

Shapes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sgt_titan.client.encoder import StainedGlassTransform
from sgt_titan.client.prompt import Prompt
from sgt_titan.errors import UserError
from sgt_titan.metrics.ranks import token_ranks

WARNING = (
    "This is the weakest observer there is. One who trains a model on his own obfuscations, or knows a few hundred "
    "pairs of token and embedding, reads far more: believe the best attacker of `sgt-titan evaluate`, not this."
)


@dataclass(frozen=True)
class Reading:
    """text: what he reads. hidden, right: obfuscated tokens, and how many of them he reads right. tokens: all sent."""

    text: str
    hidden: int
    right: int
    tokens: int
    tokens_read: list[str]
    tokens_right: list[bool]

    @property
    def share(self) -> float:
        """Of the obfuscated tokens, read right; NaN if none is obfuscated."""
        return self.right / self.hidden if self.hidden else math.nan


def read_nearest(sgt: StainedGlassTransform, prompt: Prompt, embeds_TD: torch.Tensor) -> Reading:
    """Nearest neighbour (L2) of every position of ``(T, D)`` embeddings that were made of ``prompt``."""
    ids_T = torch.tensor(prompt.ids)
    ranks = token_ranks(embeds_TD.float(), sgt.embed_tokens.weight.detach().cpu(), ids_T)
    nearest = ranks.nearest_N.tolist()
    # A row equal to the token's own counts as right: nobody can do better.
    right = [rank == 1 for rank in ranks.rank_N.tolist()]
    hidden = [bool(m) for m in prompt.mask]
    return Reading(
        text=sgt.tokenizer.decode(nearest),
        hidden=sum(hidden),
        right=sum(r for r, h in zip(right, hidden, strict=True) if h),
        tokens=len(nearest),
        tokens_read=[sgt.tokenizer.decode([i]) for i in nearest],
        tokens_right=right,
    )


def best_attacker(path: str | Path | None) -> str:
    """One line of an evaluation's best attacker, from its results.json. Raises UserError for a file that is none."""
    if path is None:
        return "best attacker: not measured; run `sgt-titan evaluate` and pass --results DIR/results.json"
    path = Path(path)
    try:
        about: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sgt = about["mechanisms"]["sgt"]
        attack = sgt["attacks"][sgt["best"]]
        top1 = attack["top1"]
        line = (
            f"best attacker measured ({attack.get('title') or sgt['best']}): reads {100 * top1['value']:.1f}% of the "
            f"hidden tokens (95% interval {100 * top1['low']:.1f} to {100 * top1['high']:.1f}, "
            f"{about['about']['rows']} prompts)"
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the results.json of `sgt-titan evaluate`") from error
    return line
