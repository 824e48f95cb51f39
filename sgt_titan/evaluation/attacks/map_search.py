"""MAP with the SGT known: the most probable prompt under the SGT's own Gaussian and a language prior.

Maximises ``sum_t log N(x~_t; x_t + mu(x)_t, sigma(x)_t^2) + weight * log p_LM(x)``. A causal SGT's mu and sigma at t
depend on the tokens up to t alone, so the search runs left to right, one cached step per candidate: candidates attend
to their beam's prefix and to themselves, all in one call.

Scoring every token of the vocabulary is exact (``candidates`` 0). A shortlist comes from a linear map back to the
table, fitted on the attacker's own obfuscations, alone and combined with the prior.

Legend: P prompts, L lanes (their beams), C candidates, T positions, V vocabulary, D width, S cached positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sgt_titan.evaluation.attacks.beam import groups, held, search, select
from sgt_titan.evaluation.attacks.known_plaintext import fit
from sgt_titan.evaluation.attacks.nearest import top_rows
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

CHUNK = 64  # candidates in one call: each sees itself and none of the others, which are computed and masked
CERTAIN = 1e6  # nats by which a token that was sent in clear is likelier than any other
VISITS = 20.0  # of every feature of a candidate: its Gaussian, and what was sent under it
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
    nearness: Callable[[torch.Tensor], torch.Tensor] | None = partial(in_clear, table)
    if not transform.mechanism.drops:
        kind = type(observation)
        nearness = None if whole else fitted(transform.mechanism, table, prior, corpus, seed, rows, kind)
    guesses, spent = [], 0
    V, D = table.rows_VD.shape
    for part in groups(len(observation.hidden), _numbers(beams, V if whole else candidates, V, D)):
        x_PTD = [x_TD.to(device) for x_TD in observation.x_tilde[part]]
        near_PTV = None if nearness is None else [nearness(x_TD) for x_TD in x_PTD]
        emission = make_emission(transform.mechanism, table, x_PTD, near_PTV, candidates)
        paths = search(prior.model, observation.tokens[part], emission, beams=beams, weight=prior_weight)
        guesses += [path.guesses_TK[h] for path, h in zip(paths, observation.hidden[part], strict=True)]
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


def in_clear(table: Table, x_TD: torch.Tensor) -> torch.Tensor:
    """(T, D) tokens sent in clear or left out -> (T, V) log likelihood: one row of the table, or nothing is known."""
    nearest_T = top_rows(x_TD, table.rows_VD, 1)[:, 0]
    near_TV = torch.zeros(len(x_TD), len(table.rows_VD), dtype=torch.float64, device=x_TD.device)
    known_T = (table.rows_VD[nearest_T] == x_TD).all(-1)
    near_TV[known_T, nearest_T[known_T]] = CERTAIN
    return near_TV


def _numbers(beams: int, candidates: int, vocab: int, width: int) -> float:
    """Of one prompt: the candidates' Gaussians, the prior, and how near each token is to each position."""
    return beams * (16.0 * min(candidates, CHUNK) * width + 3.0 * vocab)


def make_emission(
    mechanism: Mechanism,
    table: Table,
    x_PTD: Sequence[torch.Tensor],
    near_PTV: Sequence[torch.Tensor] | None,
    candidates: int,
) -> ContextFree:
    """The emission of a mechanism for some prompts."""
    kind = Dropping if mechanism.drops else ContextFree if mechanism.transform is None else Causal
    return kind(mechanism, table, x_PTD, near_PTV, candidates)


class ContextFree:
    """A mechanism whose Gaussian depends on the token alone: constant noise, redaction, nothing.

    x_PTD: what was sent, (T, D) each. near_PTV: how near each token is to each position, (T, V) each, for the
    shortlist; None: all tokens are scored.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        table: Table,
        x_PTD: Sequence[torch.Tensor],
        near_PTV: Sequence[torch.Tensor] | None,
        candidates: int,
    ):
        self.mechanism, self.rows_VD = mechanism, table.rows_VD
        self.x_PTD = nn.utils.rnn.pad_sequence(list(x_PTD), batch_first=True).double()
        self.near_PTV: torch.Tensor | None = None
        if near_PTV is not None:
            self.near_PTV = nn.utils.rnn.pad_sequence(list(near_PTV), batch_first=True)
        self.candidates, self.scored = candidates, 0
        self.floor = math.log(FLOOR * table.rows_VD.double().std().item())

    def shortlist(self, t: int, row_L: torch.Tensor, log_prior_LV: torch.Tensor) -> torch.Tensor:
        if self.near_PTV is None:
            return torch.arange(log_prior_LV.shape[1], device=log_prior_LV.device).expand(len(log_prior_LV), -1)
        # Half by what was sent alone: a confident prior must not hide an unlikely word.
        near_LV, half = self.near_PTV[row_L, t], max(1, self.candidates // 2)
        alone_LC = near_LV.topk(half).indices
        both_LC = (near_LV + log_prior_LV.double()).scatter(1, alone_LC, -torch.inf).topk(half).indices
        return torch.cat([alone_LC, both_LC], 1)

    def score(self, t: int, row_L: torch.Tensor, tokens_LC: torch.Tensor) -> torch.Tensor:
        parts = []
        for tokens_Lc in tokens_LC.split(CHUNK, dim=1):
            center_LCD, log_std_LCD = self.gaussian(t, tokens_Lc)
            parts.append(log_normal(self.x_PTD[row_L, t, None], center_LCD.double(), log_std_LCD.double()))
            self.scored += tokens_Lc.numel()
        return torch.cat(parts, 1)

    def gaussian(self, t: int, tokens_LC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Center and log std of what would be sent, (L, C, D) each."""
        x_LCD, yes_LC = self.rows_VD[tokens_LC], torch.ones_like(tokens_LC, dtype=torch.bool)
        batch = Padded(tokens_LC, yes_LC, ~yes_LC, yes_LC, ~yes_LC)
        # The attacker asks for the Gaussian; the sample that comes with it is not used.
        sent = self.mechanism.obfuscate(batch, x_LCD, generator(0, x_LCD.device))
        log_std = torch.zeros_like(x_LCD) - torch.inf if sent.log_std_BTD is None else sent.log_std_BTD
        return sent.center_BTD, log_std.clamp_min(self.floor)

    def advance(self, t: int, row_L: torch.Tensor, parent_M: torch.Tensor, token_M: torch.Tensor) -> None: ...


class Dropping(ContextFree):
    """Token dropping: a token that was sent is known, and of another the prior alone says what it may be."""

    near_PTV: torch.Tensor

    def shortlist(self, t: int, row_L: torch.Tensor, log_prior_LV: torch.Tensor) -> torch.Tensor:
        near_LV = self.near_PTV[row_L, t]
        count = min(self.candidates or near_LV.shape[1], near_LV.shape[1])
        return (near_LV + log_prior_LV.double()).topk(count).indices

    def score(self, t: int, row_L: torch.Tensor, tokens_LC: torch.Tensor) -> torch.Tensor:
        self.scored += tokens_LC.numel()
        return self.near_PTV[row_L, t].gather(1, tokens_LC)


class Causal(ContextFree):
    """An SGT: one cached step per candidate."""

    def __init__(self, mechanism, table, x_PTD, near_PTV, candidates):
        super().__init__(mechanism, table, x_PTD, near_PTV, candidates)
        self.transform: ExportedTransform = mechanism.transform
        self.caches = self.transform.new_caches()

    def gaussian(self, t: int, tokens_LC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        L, C = tokens_LC.shape
        before = self.caches[0].get_seq_length()
        # Each candidate sees the prefix and itself, at the same position.
        sees_CS = torch.cat([torch.ones(C, before, dtype=torch.bool), torch.eye(C, dtype=torch.bool)], 1)
        x_LCD = self.rows_VD[tokens_LC].to(self.transform.dtype)
        mask = torch.zeros(sees_CS.shape, dtype=x_LCD.dtype).masked_fill(~sees_CS, torch.finfo(x_LCD.dtype).min)
        out = self.transform(
            inputs_embeds=x_LCD,
            attention_mask=mask.to(x_LCD.device).expand(L, 1, -1, -1),
            position_ids=torch.full((L, C), t, device=x_LCD.device),
            past_key_values=self.caches,
        )
        for cache in self.caches:
            cache.crop(-C)
        return self.rows_VD[tokens_LC] + out.mean_BTD, out.log_std_BTD

    def advance(self, t: int, row_L: torch.Tensor, parent_M: torch.Tensor, token_M: torch.Tensor) -> None:
        for cache in self.caches:
            select(cache, parent_M)
        x_M1D = self.rows_VD[token_M][:, None].to(self.transform.dtype)
        position_M1 = torch.full((len(token_M), 1), t, device=x_M1D.device)
        self.transform(inputs_embeds=x_M1D, position_ids=position_M1, past_key_values=self.caches)


def log_normal(x_D: torch.Tensor, center_LCD: torch.Tensor, log_std_LCD: torch.Tensor) -> torch.Tensor:
    """log N(x; center, std^2) without the constant, (L, C)."""
    return -0.5 * ((x_D - center_LCD) * torch.exp(-log_std_LCD)).square().sum(-1) - log_std_LCD.sum(-1)


def cost(size: Size, *, beams: int = 4, candidates: int = 64, prior_weight: float = 1.0, rows: int = 64) -> Cost:
    each = candidates or size.vocab
    lanes = _numbers(beams, each, size.vocab, size.width)
    scored = 1.0 * size.tokens * beams * each
    flops = scored * 2.0 * size.estimator
    flops += (2.0 * rows * size.longest * size.width**2 + 60.0 * size.width**3) * (candidates > 0)
    near = 8.0 * size.longest * size.vocab * (candidates > 0)
    memory = near + 64.0 * beams * min(each, CHUNK) * size.width + 16.0 * size.vocab * size.width + held(lanes)
    return Cost(flops, memory, len(groups(size.rows, lanes)) * size.longest, VISITS * scored * size.width)
