"""MAP with the SGT known: the most probable prompt under the SGT's own Gaussian and a language prior.

Maximises ``sum_t log N(x~_t; x_t + mu(x)_t, sigma(x)_t^2) + weight * log p_LM(x)``. A causal SGT's mu and sigma at t
depend on the tokens up to t alone, so the search runs left to right, one cached step per candidate: candidates attend
to their beam's prefix and to themselves, all in one call.

Scoring every token of the vocabulary is exact (``candidates`` 0). A shortlist comes from a linear map back to the
table, fitted on the attacker's own obfuscations, alone and combined with the prior.

Legend: B beams, C candidates, T positions, V vocabulary, D width, S cached positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sgt_titan.evaluation.attacks.beam import search, select
from sgt_titan.evaluation.attacks.known_plaintext import fit
from sgt_titan.evaluation.world.granted import observe
from sgt_titan.evaluation.world.mechanisms import Mechanism
from sgt_titan.evaluation.world.samples import Padded, generator
from sgt_titan.evaluation.world.threat import (
    Corpus,
    Cost,
    Guess,
    Noisy,
    Observation,
    Prior,
    Seed,
    Size,
    Table,
    Transform,
)
from sgt_titan.transform import ExportedTransform

CHUNK = 512  # candidates in one call
FLOOR = 1e-4  # std of a mechanism without noise, units of the table's std: anything but an exact match is out


def map_search(
    observation: Observation,
    transform: Transform,
    table: Table,
    prior: Prior,
    corpus: Corpus,
    seed: Seed,
    *,
    beams: int = 4,
    candidates: int = 64,
    prior_weight: float = 1.0,
    rows: int = 64,
) -> Guess:
    """The best sequence of each prompt, and each position's other candidates after it.

    Args:
        candidates: tokens scored per beam and position; 0: all.
        rows: public rows that the shortlist is fitted on.
    """
    device = table.rows_VD.device
    whole = not candidates or candidates >= len(table.rows_VD)
    nearness = None if whole else fitted(transform.mechanism, table, prior, corpus, seed, rows, type(observation))
    guesses, spent = [], 0
    for x_TD, hidden_T, tokens_T in zip(observation.x_tilde, observation.hidden, observation.tokens, strict=True):
        shortlist = (lambda t: None) if nearness is None else _cached(nearness(x_TD))
        emission = make_emission(transform.mechanism, table, x_TD.to(device), shortlist, candidates)
        path = search(prior.model, tokens_T, emission, beams=beams, weight=prior_weight)
        guesses.append(path.guesses_TK[hidden_T])
        spent += emission.scored
    size = transform.mechanism.transform
    parameters = (
        0 if size is None else sum(p.numel() for p in size.bodies.parameters()) + 2 * size.config.hidden_size**2
    )
    notes = () if whole else (f"scored {candidates} of {len(table.rows_VD)} tokens per beam and position",)
    return Guess(torch.cat(guesses), flops=2.0 * spent * max(parameters, table.rows_VD.shape[1]), notes=notes)


def map_search_at_z(
    observation: Noisy,
    transform: Transform,
    table: Table,
    prior: Prior,
    corpus: Corpus,
    seed: Seed,
    **effort: Any,
) -> Guess:
    """The same at z, which is exactly the Gaussian that the search takes it for."""
    return map_search(observation, transform, table, prior, corpus, seed, **effort)


def fitted(
    mechanism: Mechanism,
    table: Table,
    prior: Prior,
    corpus: Corpus,
    seed: Seed,
    rows: int,
    kind: type[Observation] = Observation,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """(T, D) obfuscations -> (T, V) log likelihood under the linear map back to the table and its residual."""
    own = observe(
        corpus.rows[:rows], mechanism, prior.model, generator(seed.value + 2, table.rows_VD.device), kind=kind
    )
    tokens_M = torch.cat([torch.from_numpy(row.ids[row.obfuscate]) for row in corpus.rows[:rows]])
    clean_MD = table.rows_VD[tokens_M.to(table.rows_VD.device)]
    inverse = fit(own.x_tilde_ND, clean_MD)
    # Of the fit itself, so a little too small; it orders candidates, and orders them alike at any scale.
    std_D = (inverse(own.x_tilde_ND) - clean_MD.double()).std(0).clamp_min(1e-6 * table.rows_VD.double().std())

    def nearness(x_TD: torch.Tensor) -> torch.Tensor:
        read_TD, rows_VD = inverse(x_TD) / std_D, table.rows_VD.double() / std_D
        return read_TD @ rows_VD.T - 0.5 * rows_VD.square().sum(-1)

    return nearness


def _cached(near_TV: torch.Tensor) -> Callable[[int], torch.Tensor]:
    return lambda t: near_TV[t]


def make_emission(
    mechanism: Mechanism,
    table: Table,
    x_TD: torch.Tensor,
    nearness: Callable[[int], torch.Tensor | None],
    candidates: int,
) -> ContextFree | Causal:
    """The emission of a mechanism for one prompt."""
    kind = ContextFree if mechanism.transform is None else Causal
    return kind(mechanism, table, x_TD, nearness, candidates)


class ContextFree:
    """A mechanism whose Gaussian depends on the token alone: constant noise, redaction, nothing."""

    def __init__(self, mechanism, table, x_TD, nearness, candidates):
        self.mechanism, self.rows_VD, self.x_TD = mechanism, table.rows_VD, x_TD.double()
        self.nearness, self.candidates, self.scored = nearness, candidates, 0
        self.floor = math.log(FLOOR * table.rows_VD.double().std().item())

    def shortlist(self, t: int, log_prior_BV: torch.Tensor) -> torch.Tensor:
        near_V = self.nearness(t)
        if near_V is None:
            return torch.arange(log_prior_BV.shape[1], device=log_prior_BV.device).expand(len(log_prior_BV), -1)
        # Half by what was sent alone: a confident prior must not hide an unlikely word.
        half = max(1, self.candidates // 2)
        alone = near_V.topk(half).indices.expand(len(log_prior_BV), -1)
        both = (near_V + log_prior_BV.double()).scatter(1, alone, -torch.inf).topk(half).indices
        return torch.cat([alone, both], 1)

    def score(self, t: int, tokens_BC: torch.Tensor) -> torch.Tensor:
        parts = []
        for tokens_Bc in tokens_BC.split(CHUNK, dim=1):
            center, log_std = self.gaussian(t, tokens_Bc)
            parts.append(log_normal(self.x_TD[t], center.double(), log_std.double()))
            self.scored += tokens_Bc.numel()
        return torch.cat(parts, 1)

    def gaussian(self, t: int, tokens_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Center and log std of what would be sent, (B, C, D) each."""
        x_BCD, yes_BC = self.rows_VD[tokens_BC], torch.ones_like(tokens_BC, dtype=torch.bool)
        batch = Padded(tokens_BC, yes_BC, ~yes_BC, yes_BC, ~yes_BC)
        # The attacker asks for the Gaussian; the sample that comes with it is not used.
        sent = self.mechanism.obfuscate(batch, x_BCD, generator(0, x_BCD.device))
        log_std = torch.zeros_like(x_BCD) - torch.inf if sent.log_std_BTD is None else sent.log_std_BTD
        return sent.center_BTD, log_std.clamp_min(self.floor)

    def advance(self, t: int, parent_B: torch.Tensor, token_B: torch.Tensor) -> None: ...


class Causal(ContextFree):
    """An SGT: one cached step per candidate."""

    def __init__(self, mechanism, table, x_TD, nearness, candidates):
        super().__init__(mechanism, table, x_TD, nearness, candidates)
        self.transform: ExportedTransform = mechanism.transform
        self.caches = self.transform.new_caches()

    def gaussian(self, t: int, tokens_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        B, C = tokens_BC.shape
        before = self.caches[0].get_seq_length()
        # Each candidate sees the prefix and itself, at the same position.
        sees_CS = torch.cat([torch.ones(C, before, dtype=torch.bool), torch.eye(C, dtype=torch.bool)], 1)
        x_BCD = self.rows_VD[tokens_BC].to(self.transform.dtype)
        mask = torch.zeros(sees_CS.shape, dtype=x_BCD.dtype).masked_fill(~sees_CS, torch.finfo(x_BCD.dtype).min)
        out = self.transform(
            inputs_embeds=x_BCD,
            attention_mask=mask.to(x_BCD.device).expand(B, 1, -1, -1),
            position_ids=torch.full((B, C), t, device=x_BCD.device),
            past_key_values=self.caches,
        )
        for cache in self.caches:
            cache.crop(-C)
        return self.rows_VD[tokens_BC] + out.mean_BTD, out.log_std_BTD

    def advance(self, t: int, parent_B: torch.Tensor, token_B: torch.Tensor) -> None:
        for cache in self.caches:
            select(cache, parent_B)
        x_B1D = self.rows_VD[token_B][:, None].to(self.transform.dtype)
        position_B1 = torch.full((len(token_B), 1), t, device=x_B1D.device)
        self.transform(inputs_embeds=x_B1D, position_ids=position_B1, past_key_values=self.caches)


def log_normal(x_D: torch.Tensor, center_BCD: torch.Tensor, log_std_BCD: torch.Tensor) -> torch.Tensor:
    """log N(x; center, std^2) without the constant, (B, C)."""
    return -0.5 * ((x_D - center_BCD) * torch.exp(-log_std_BCD)).square().sum(-1) - log_std_BCD.sum(-1)


def cost(size: Size, *, beams: int = 4, candidates: int = 64, prior_weight: float = 1.0, rows: int = 64) -> Cost:
    scored = size.tokens * beams * (candidates or size.vocab)
    step = 2.0 * (size.transform + 12 * size.width)
    prior = 2.0 * size.tokens * beams * (size.trunk + size.vocab * size.width) * (prior_weight > 0)
    flops = (
        scored * step + prior + (2.0 * rows * size.longest * size.width**2 + 60.0 * size.width**3) * (candidates > 0)
    )
    near = 8.0 * size.longest * size.vocab * (candidates > 0)
    return Cost(
        flops, near + 64.0 * beams * min(candidates or size.vocab, CHUNK) * size.width + 16.0 * size.vocab * size.width
    )
