"""What one request reveals: what the weakest observer reads (the table's nearest rows), and nats a token at most.

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
from sgt_titan.terminal import printable
from sgt_titan.transform import glow
from sgt_titan.transform.tokenizer import decode

BRIGHTEST = 8  # tokens that are named where there are no colours
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
        text=decode(sgt.tokenizer, nearest),
        hidden=sum(hidden),
        right=sum(r for r, h in zip(right, hidden, strict=True) if h),
        tokens=len(nearest),
        tokens_read=[decode(sgt.tokenizer, [i]) for i in nearest],
        tokens_right=right,
    )


@dataclass(frozen=True)
class Revealed:
    """pieces: the text by tokens. nats: what one observation can tell of each at most, on average over the noise; None
    where a token is sent in clear. log_vocab: ln V, at which a token is readable."""

    pieces: list[str]
    nats: list[float | None]
    log_vocab: float

    @property
    def total(self) -> float:
        return sum(value for value in self.nats if value is not None)


def revealed(sgt: StainedGlassTransform, prompt: Prompt) -> Revealed:
    """Nats that one observation of each token of a prompt can tell, under the prior that the export carries."""
    ids_BT, mask_BT = torch.tensor([prompt.ids]), torch.as_tensor(prompt.mask)[None]
    device = sgt.embed_tokens.weight.device
    rate_T = sgt.rate(ids_BT.to(device), mask_BT.to(device))[0].tolist()
    hidden = mask_BT[0].tolist()
    return Revealed(
        pieces=glow.pieces(sgt.tokenizer, prompt.ids),
        nats=[value if there else None for value, there in zip(rate_T, hidden, strict=True)],
        log_vocab=math.log(sgt.config.vocab_size),
    )


def coloured(shown: Revealed) -> str:
    """For a terminal."""
    return glow.terminal(shown.pieces, shown.nats, shown.log_vocab)


def named(shown: Revealed) -> str:
    """Where there are no colours: the text, and its brightest tokens by name."""
    known = [(value, piece) for piece, value in zip(shown.pieces, shown.nats, strict=True) if value is not None]
    most = ", ".join(f"{printable(piece).strip()} {value:.1f}" for value, piece in sorted(known)[: -BRIGHTEST - 1 : -1])
    return f"{printable(''.join(shown.pieces))}\n\nmost nats: {most} (--color always shows all)"


def page(shown: Revealed) -> str:
    """A page of its own. It holds the text."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>What is revealed</title>"
        f"<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}"
        f"{glow.STYLE}</style></head><body>{glow.page(shown.pieces, shown.nats, shown.log_vocab)}"
        f"<p>At most {shown.total:.0f} nats in all. Bright: can be told; dark: nothing is told; underlined: sent in "
        "clear.</p></body></html>\n"
    )


def best_attacker(path: str | Path | None) -> str:
    """One line of an evaluation's best attacker, from its results.json. Raises UserError for a file that is none."""
    if path is None:
        return "best attacker: not measured; run `sgt-titan evaluate` and pass --results DIR/results.json"
    path = Path(path)
    try:
        about: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sgt = about["mechanisms"]["sgt"]
        if sgt["best"] is None:
            return f"best attacker: not measured ({path} is of `sgt-titan report`); run `sgt-titan evaluate`"
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
