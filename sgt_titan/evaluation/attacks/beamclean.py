"""BeamClean: the noise is not known, and is estimated together with the text (Kale et al., arXiv 2505.13758).

Alternates between decoding every prompt by beam search under a language prior, with the current guess of how x~ comes
from x, and fitting that guess to what was decoded. Two surrogates:

    gaussian   x~ = x + b + N(0, diag s^2)        as published; cannot follow a mean that depends on the token
    affine     x~ = x A + b + N(0, diag s^2)      follows the linear part of mu(x)

Nothing is taken from the mechanism: not the scale of its noise, not one known pair. What was estimated is in the notes.

Legend: N hidden tokens flat, T positions of a row, C candidates, V vocabulary, D width, P prompts, L lanes
(their beams).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from sgt_titan.evaluation.attacks.beam import groups, held, search
from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.world.threat import Cost, Guess, Observation, Prior, Size, Table

RIDGE = 0.3  # of the affine map towards the identity, in units of the mean variance of a feature


@dataclass(frozen=True)
class Surrogate:
    """x~ ~ N(x A + b, diag s^2), float64; A is None for the identity."""

    map_DD: torch.Tensor | None
    bias_D: torch.Tensor
    std_D: torch.Tensor

    def centers(self, rows_VD: torch.Tensor) -> torch.Tensor:
        rows_VD = rows_VD.double()
        return (rows_VD if self.map_DD is None else rows_VD @ self.map_DD) + self.bias_D


def beamclean(
    observation: Observation,
    table: Table,
    prior: Prior,
    *,
    affine: bool = False,
    rounds: int = 3,
    beams: int = 4,
    candidates: int = 32,
    prior_weight: float = 1.0,
) -> Guess:
    """Decode, fit, decode again; the guesses are those of the last decoding."""
    x_ND, rows_VD = observation.x_tilde_ND.double(), table.rows_VD.double()
    surrogate = start(x_ND, rows_VD)
    top_NK, flops = torch.empty(0), 0.0
    for _ in range(rounds):
        top_NK = decode(observation, surrogate, table, prior, beams, candidates, prior_weight)
        clean_ND = rows_VD[top_NK[:, 0].to(rows_VD.device)]
        surrogate = refit(x_ND, clean_ND, affine=affine)
        flops += 2.0 * len(x_ND) * rows_VD.numel()
    scale = table.rows_VD.double().std().item()
    size = surrogate.std_D.square().mean().sqrt().item() / scale
    shift = surrogate.bias_D.norm().item() / rows_VD.norm(dim=-1).median().item()
    note = f"estimated a noise of {size:.3g} table stds and a shift of {shift:.3g} median row norms"
    return Guess(top_NK, flops=flops, notes=(note,))


def start(x_ND: torch.Tensor, rows_VD: torch.Tensor) -> Surrogate:
    """b from the means, s from the variance that the table does not explain.

    The unweighted table stands for the tokens of the prompts, which it is not; the first decoding repairs that.
    """
    bias_D = x_ND.mean(0) - rows_VD.mean(0)
    excess_D = x_ND.var(0) - rows_VD.var(0)
    floor = 1e-4 * rows_VD.var(0).mean()
    # A noise smaller than the table's own spread cannot be told from it by variances: then a third of the spread.
    std_D = torch.maximum(excess_D, 0.1 * rows_VD.var(0)).clamp_min(floor).sqrt()
    return Surrogate(None, bias_D, std_D)


def refit(x_ND: torch.Tensor, clean_ND: torch.Tensor, *, affine: bool) -> Surrogate:
    """The surrogate that fits what was decoded: residual mean and std, and for affine a ridge regression towards the
    identity, without which few tokens would be explained by any map."""
    x0_D, c0_D = x_ND.mean(0), clean_ND.mean(0)
    floor = 1e-6 * clean_ND.var(0).mean().clamp_min(torch.finfo(torch.float64).tiny)
    if not affine:
        residual_ND = x_ND - clean_ND
        return Surrogate(None, residual_ND.mean(0), residual_ND.var(0).clamp_min(floor).sqrt())
    clean0_ND, moved0_ND = clean_ND - c0_D, (x_ND - x0_D) - (clean_ND - c0_D)
    gram_DD = clean0_ND.T @ clean0_ND
    ridge = RIDGE * gram_DD.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye_DD = torch.eye(gram_DD.shape[0], dtype=gram_DD.dtype, device=gram_DD.device)
    map_DD = eye_DD + torch.linalg.solve(gram_DD + ridge * eye_DD, clean0_ND.T @ moved0_ND)
    bias_D = x0_D - c0_D @ map_DD
    residual_ND = x_ND - clean_ND @ map_DD - bias_D
    return Surrogate(map_DD, bias_D, residual_ND.var(0).clamp_min(floor).sqrt())


class Fixed:
    """Candidates and their scores per position of some prompts, the same whatever stands before."""

    def __init__(self, tokens_PTC: Sequence[torch.Tensor], score_PTC: Sequence[torch.Tensor]):
        self.tokens_PTC, self.score_PTC = (pad_sequence(list(p), batch_first=True) for p in (tokens_PTC, score_PTC))

    def shortlist(self, t: int, row_L: torch.Tensor, log_prior_LV: torch.Tensor) -> torch.Tensor:
        return self.tokens_PTC[row_L, t]

    def score(self, t: int, row_L: torch.Tensor, tokens_LC: torch.Tensor) -> torch.Tensor:
        return self.score_PTC[row_L, t]

    def advance(self, t: int, row_L: torch.Tensor, parent_M: torch.Tensor, token_M: torch.Tensor) -> None: ...


def decode(
    observation: Observation,
    surrogate: Surrogate,
    table: Table,
    prior: Prior,
    beams: int,
    candidates: int,
    prior_weight: float,
) -> torch.Tensor:
    """Guesses (N, K) of every prompt under a surrogate; the vocabulary is scanned in blocks."""
    centers_VD = surrogate.centers(table.rows_VD) / surrogate.std_D
    found = []
    for part in groups(len(observation.hidden), 3.0 * beams * len(table.rows_VD)):
        tokens, scores = [], []
        for x_TD in observation.x_tilde[part]:
            scaled_TD = x_TD.double() / surrogate.std_D
            tokens.append(top_rows(scaled_TD, centers_VD, candidates))
            scores.append(-0.5 * (scaled_TD[:, None] - centers_VD[tokens[-1]]).square().sum(-1))
        emission = Fixed(tokens, scores)
        paths = search(prior.model, observation.tokens[part], emission, beams=beams, weight=prior_weight)
        found += [path.guesses_TK[h] for path, h in zip(paths, observation.hidden[part], strict=True)]
    return torch.cat(found)


def cost(
    size: Size,
    *,
    affine: bool = False,
    rounds: int = 3,
    beams: int = 4,
    candidates: int = 32,
    prior_weight: float = 1.0,
) -> Cost:
    steps = len(groups(size.rows, 3.0 * beams * size.vocab)) * size.longest
    scan = 4.0 * size.tokens * size.vocab * size.width
    maps = (2.0 * (size.tokens + size.vocab) * size.width**2 + size.width**3) * affine
    memory = (
        24.0 * size.vocab * size.width + 24.0 * size.tokens * size.width + 8.0 * size.longest * candidates * size.width
    )
    memory += 24.0 * 1024 * min(size.vocab, 8192) + held(3.0 * beams * size.vocab)
    numbers = size.tokens * (3.0 * size.vocab + 8.0 * candidates * size.width)
    return Cost(rounds * (scan + maps), memory, rounds * steps, rounds * numbers)
