"""Beam search over the tokens of some prompts: an emission score per position, and a language prior.

Maximises ``sum_t emission(t, x_1..x_t) + weight * log p_LM(x_t | x_1..x_t-1)`` left to right. Exact where the emission
is causal and the beam holds every prefix. Several prompts are searched side by side, since a step of one is too small
to keep a machine busy; none knows of another.

Legend: P prompts, B beams, L lanes (P x B, a prompt's beams together), C candidates, T positions, V vocabulary, K
guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from sgt_titan.evaluation.world.threat import UNKNOWN

GUESSES = 10
PROMPTS = 16  # searched side by side, at most
LANE_BUDGET = 1 << 24  # numbers that exist at a time for all lanes


class Emission(Protocol):
    """How likely what was sent is, given tokens; keeps the state of the lanes' prefixes. ``row_L``: which of the
    prompts each lane is of."""

    def shortlist(self, t: int, row_L: torch.Tensor, log_prior_LV: torch.Tensor) -> torch.Tensor:
        """Tokens worth scoring at t, (L, C) int64; ``log_prior_LV`` is already weighted, (L, 0) without a prior."""

    def score(self, t: int, row_L: torch.Tensor, tokens_LC: torch.Tensor) -> torch.Tensor:
        """Log likelihood of what was sent at t for each lane's prefix and candidate, (L, C) float64."""

    def advance(self, t: int, row_L: torch.Tensor, parent_M: torch.Tensor, token_M: torch.Tensor) -> None:
        """The lanes, which were ``row_L``, are now these parents, each with one more token; those of prompts that end
        at t are gone."""


class Path(NamedTuple):
    """tokens_T: the best sequence. guesses_TK: at each position, the candidates that its prefix had, best first, padded
    with UNKNOWN; the sequence's own token comes first. score: of the sequence."""

    tokens_T: torch.Tensor
    guesses_TK: torch.Tensor
    score: float


class _Prior:
    """Log-probabilities of the next token for every lane, from a cached causal LM; uniform (zeros) at weight 0."""

    def __init__(self, model: PreTrainedModel, weight: float, lanes: int):
        self.model, self.weight = model, weight
        self.vocab = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        self.cache = DynamicCache(config=model.config)
        self.log_LV = torch.zeros(1, self.vocab, device=model.device).expand(lanes, -1)

    def of(self, tokens_LC: torch.Tensor) -> torch.Tensor:
        return self.log_LV.gather(1, tokens_LC).double()

    def advance(self, parent_M: torch.Tensor, token_M: torch.Tensor) -> None:
        if self.weight == 0:
            self.log_LV = self.log_LV[:1].expand(len(token_M), -1)
            return
        select(self.cache, parent_M)
        out = self.model(input_ids=token_M[:, None], past_key_values=self.cache, use_cache=True)
        self.log_LV = self.weight * torch.log_softmax(out.logits[:, -1, : self.vocab].float(), -1)


class _Flat:
    """No prior: the emission says all."""

    def __init__(self, lanes: int):
        self.log_LV = torch.zeros(lanes, 0)

    def of(self, tokens_LC: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tokens_LC.shape, dtype=torch.float64, device=tokens_LC.device)

    def advance(self, parent_M: torch.Tensor, token_M: torch.Tensor) -> None:
        self.log_LV = torch.zeros(len(token_M), 0)


class _Step(NamedTuple):
    """What each lane became at a position: the lane it came from, its token, and that prefix's candidates."""

    parent_L: torch.Tensor
    token_L: torch.Tensor
    guesses_LK: torch.Tensor


@torch.no_grad()
def search(
    model: PreTrainedModel | None,
    prompts: Sequence[torch.Tensor],
    emission: Emission,
    *,
    beams: int,
    weight: float = 1.0,
) -> list[Path]:
    """Decode some prompts. ``prompts``: (T,) each, the id where it is known, UNKNOWN where it is to be found. ``model``
    None: there is no prior beside the emission."""
    device = prompts[0].device if model is None else model.device
    # The longest first: those that have ended are then at the end, and are cut off.
    order_P = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
    ids_PT = nn.utils.rnn.pad_sequence([prompts[p] for p in order_P], batch_first=True, padding_value=0).to(device)
    lengths = [len(prompts[p]) for p in order_P]
    lanes = len(prompts) * beams
    row_L = torch.tensor(order_P, device=device).repeat_interleave(beams)
    prior = _Flat(lanes) if model is None else _Prior(model, weight, lanes)
    # A prompt begins with one beam; the others are ruled out until there are prefixes for them.
    total_PB = torch.full((len(prompts), beams), -torch.inf, dtype=torch.float64, device=device)
    total_PB[:, 0] = 0.0
    steps: list[_Step] = []
    for t in range(max(lengths)):
        active = sum(length > t for length in lengths)
        row_L = row_L[: active * beams]
        known_P1 = ids_PT[:active, t : t + 1]
        own_PB = torch.arange(active * beams, device=device).view(active, beams)  # each lane itself
        parent_PB, token_PB = own_PB, known_P1.expand(-1, beams)
        guesses_LK = _padded(token_PB.reshape(-1, 1))
        if (asked_P1 := known_P1 == UNKNOWN).any():
            tokens_LC = emission.shortlist(t, row_L, prior.log_LV)
            score_LC = emission.score(t, row_L, tokens_LC) + prior.of(tokens_LC)
            ranked_LC = tokens_LC.gather(1, score_LC.argsort(-1, descending=True))
            C = tokens_LC.shape[1]
            best_PB, at_PB = (total_PB[:active, :, None] + score_LC.view(active, beams, C)).flatten(1).topk(beams)
            from_PB = own_PB[:, :1] + at_PB // C
            found_PB = tokens_LC.reshape(active, -1).gather(1, at_PB)
            found_LK = _first(found_PB.flatten(), ranked_LC[from_PB.flatten()])
            total_PB[:active] = torch.where(asked_P1, best_PB, total_PB[:active])
            parent_PB = torch.where(asked_P1, from_PB, own_PB)
            token_PB = torch.where(asked_P1, found_PB, token_PB)
            guesses_LK = torch.where(asked_P1.repeat_interleave(beams, 0), found_LK, guesses_LK)
        steps.append(_Step(parent_PB.flatten(), token_PB.flatten(), guesses_LK))
        if going := beams * sum(length > t + 1 for length in lengths):
            parent_M, token_M = (part[:going] for part in steps[-1][:2])
            emission.advance(t, row_L, parent_M, token_M)
            prior.advance(parent_M, token_M)
    found = _paths(steps, total_PB)
    return [found[order_P.index(p)] for p in range(len(prompts))]


def _paths(steps: Sequence[_Step], total_PB: torch.Tensor) -> list[Path]:
    """The best lane of each prompt, followed back to its beginning."""
    beams, beam_P = total_PB.shape[1], total_PB.argmax(-1)
    tokens: list[list[torch.Tensor]] = [[] for _ in beam_P]
    guesses: list[list[torch.Tensor]] = [[] for _ in beam_P]
    for parent_L, token_L, guesses_LK in reversed(steps):
        active = len(parent_L) // beams
        first_P = beams * torch.arange(active, device=parent_L.device)
        lane_P = first_P + beam_P[:active]
        for p, (token, guesses_K) in enumerate(zip(token_L[lane_P].cpu(), guesses_LK[lane_P].cpu(), strict=True)):
            tokens[p].append(token)
            guesses[p].append(guesses_K)
        beam_P[:active] = parent_L[lane_P] - first_P
    best_P = total_PB.max(-1).values.tolist()
    return [
        Path(torch.stack(t[::-1]), torch.stack(g[::-1]), best)
        for t, g, best in zip(tokens, guesses, best_P, strict=True)
    ]


def groups(count: int, numbers: float) -> list[slice]:
    """``count`` prompts in groups to search side by side, each with ``numbers`` that exist for all its lanes."""
    size = max(1, min(PROMPTS, int(LANE_BUDGET // numbers)))
    return [slice(start, start + size) for start in range(0, count, size)]


def held(numbers: float) -> float:
    """Bytes of a group, of the same."""
    return 16.0 * max(numbers, min(float(LANE_BUDGET), PROMPTS * numbers))


def _first(token_L: torch.Tensor, ranked_LC: torch.Tensor) -> torch.Tensor:
    """The token, then the others in their order: (L, K)."""
    # A stable sort brings the token to the front and leaves the order of the rest.
    order_LC = (ranked_LC != token_L[:, None]).long().argsort(dim=-1, stable=True)
    return _padded(ranked_LC.gather(1, order_LC)[:, :GUESSES])


def _padded(guesses_LK: torch.Tensor) -> torch.Tensor:
    missing = GUESSES - guesses_LK.shape[1]
    return torch.nn.functional.pad(guesses_LK, (0, missing), value=UNKNOWN)


def select(cache: DynamicCache, rows_M: torch.Tensor) -> None:
    """Keep these rows of a cache, in this order, in place."""
    if cache.get_seq_length() > 0:
        cache.batch_select_indices(rows_M)
