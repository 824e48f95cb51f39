"""Beam search over the tokens of one prompt: an emission score per position, and a language prior.

Maximises ``sum_t emission(t, x_1..x_t) + weight * log p_LM(x_t | x_1..x_t-1)`` left to right. Exact where the emission
is causal and the beam holds every prefix.

Legend: B beams, C candidates, T positions, V vocabulary, D width, K guesses.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from sgt_titan.evaluation.world.threat import UNKNOWN

GUESSES = 10


class Emission(Protocol):
    """How likely what was sent is, given tokens; keeps the state of the beams' prefixes."""

    def shortlist(self, t: int, log_prior_BV: torch.Tensor) -> torch.Tensor:
        """Tokens worth scoring at t, (B, C) int64; ``log_prior_BV`` is already weighted, (1, 0) without a prior."""

    def score(self, t: int, tokens_BC: torch.Tensor) -> torch.Tensor:
        """Log likelihood of what was sent at t for each beam's prefix and candidate, (B, C) float64."""

    def advance(self, t: int, parent_B: torch.Tensor, token_B: torch.Tensor) -> None:
        """The beams are now these parents, each with one more token."""


class Path(NamedTuple):
    """tokens_T: the best sequence. guesses_TK: at each position, the candidates that its prefix had, best first, padded
    with UNKNOWN; the sequence's own token comes first. score: of the sequence."""

    tokens_T: torch.Tensor
    guesses_TK: torch.Tensor
    score: float


class _Prior:
    """Log-probabilities of the next token for every beam, from a cached causal LM; uniform (zeros) at weight 0."""

    def __init__(self, model: PreTrainedModel, weight: float):
        self.model, self.weight = model, weight
        self.vocab = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        self.cache = DynamicCache(config=model.config)
        self.log_BV = torch.zeros(1, self.vocab, device=model.device)

    def of(self, tokens_BC: torch.Tensor) -> torch.Tensor:
        return self.log_BV.gather(1, tokens_BC).double()

    def advance(self, parent_B: torch.Tensor, token_B: torch.Tensor) -> None:
        if self.weight == 0:
            self.log_BV = self.log_BV[:1].expand(len(token_B), -1)
            return
        select(self.cache, parent_B)
        out = self.model(input_ids=token_B[:, None], past_key_values=self.cache, use_cache=True)
        self.log_BV = self.weight * torch.log_softmax(out.logits[:, -1, : self.vocab].float(), -1)


class _Flat:
    """No prior: the emission says all."""

    log_BV = torch.zeros(1, 0)

    def of(self, tokens_BC: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tokens_BC.shape, dtype=torch.float64, device=tokens_BC.device)

    def advance(self, parent_B: torch.Tensor, token_B: torch.Tensor) -> None:
        pass


@torch.no_grad()
def search(
    model: PreTrainedModel | None, tokens_T: torch.Tensor, emission: Emission, *, beams: int, weight: float = 1.0
) -> Path:
    """Decode one prompt. ``tokens_T``: the id where it is known, UNKNOWN where it is to be found. ``model`` None: there
    is no prior beside the emission."""
    device = tokens_T.device if model is None else model.device
    prior = _Flat() if model is None else _Prior(model, weight)
    total_B = torch.zeros(1, dtype=torch.float64, device=device)
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # parents, tokens, each beam's alternatives
    for t, known in enumerate(tokens_T.tolist()):
        if known != UNKNOWN:
            parent_B = torch.arange(len(total_B), device=device)
            token_B = torch.full_like(parent_B, known)
            guesses_BK = _padded(token_B[:, None])
        else:
            tokens_BC = emission.shortlist(t, prior.log_BV)
            score_BC = emission.score(t, tokens_BC) + prior.of(tokens_BC)
            ranked_BC = tokens_BC.gather(1, score_BC.argsort(-1, descending=True))
            flat = (total_B[:, None] + score_BC).flatten()
            total_B, at_B = flat.topk(min(beams, len(flat)))
            parent_B, token_B = at_B // tokens_BC.shape[1], tokens_BC.flatten()[at_B]
            guesses_BK = _first(token_B, ranked_BC[parent_B])
        steps.append((parent_B, token_B, guesses_BK))
        emission.advance(t, parent_B, token_B)
        prior.advance(parent_B, token_B)
    beam = int(total_B.argmax())
    best, tokens, guesses = total_B[beam].item(), [], []
    for parent_B, token_B, guesses_BK in reversed(steps):
        tokens.append(token_B[beam])
        guesses.append(guesses_BK[beam])
        beam = int(parent_B[beam])
    return Path(torch.stack(tokens[::-1]).cpu(), torch.stack(guesses[::-1]).cpu(), best)


def _first(token_B: torch.Tensor, ranked_BC: torch.Tensor) -> torch.Tensor:
    """The token, then the others in their order: (B, K)."""
    # A stable sort brings the token to the front and leaves the order of the rest.
    order_BC = (ranked_BC != token_B[:, None]).long().argsort(dim=-1, stable=True)
    return _padded(ranked_BC.gather(1, order_BC)[:, :GUESSES])


def _padded(guesses_BK: torch.Tensor) -> torch.Tensor:
    missing = GUESSES - guesses_BK.shape[1]
    return torch.nn.functional.pad(guesses_BK, (0, missing), value=UNKNOWN)


def select(cache: DynamicCache, rows_B: torch.Tensor) -> None:
    """Keep these rows of a cache, in this order, in place."""
    if cache.get_seq_length() > 0:
        cache.batch_select_indices(rows_B)
