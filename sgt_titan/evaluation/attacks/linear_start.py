"""The best reader of one token at a time that is linear in what was sent: where every trained reader begins.

    log p(v | x~) = tau (e_v / s) . W (x~ - from) + tau bias_v + log p_v + const

is Bayes' rule for independent tokens with public frequencies p_v, when x~ given the token is Gaussian with a mean that
is affine in the embedding and one covariance for all ("forward" of known_plaintext.py; linear discriminant analysis).
The nearest row to a regression's estimate ("backward") and the nearest row to x~ have the same form. tau is fitted.

Legend: M own hidden tokens, D width, V vocabulary, s the table's per-feature std.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sgt_titan.evaluation.attacks.known_plaintext import SHRINK, Affine, fit
from sgt_titan.evaluation.attacks.own_text import Pairs

HELD_OUT, MAX_HELD = 0.25, 2048
LOG_TAUS = tuple(0.5 * i for i in range(-20, 5))
RESOLUTION = 1e-4  # of the variance that the tokens make: noise below a hundredth of their spread is as good as none
CHUNK = 256


class Start(NamedTuple):
    """name: of the reading. weight_DD: W, rows in units of the scaled table. from_D, bias_V, log_tau: as above."""

    name: str
    weight_DD: torch.Tensor
    from_D: torch.Tensor
    bias_V: torch.Tensor
    log_tau: float


def scaled(table_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The table in units of its per-feature std, and that std (D,), floored where a feature never varies."""
    scale_D = table_VD.std(0).clamp_min(1e-6 * table_VD.std())
    return table_VD / scale_D, scale_D


def linear_start(pairs: Pairs, table_VD: torch.Tensor, log_frequency_V: torch.Tensor) -> Start:
    """The reading and temperature under which tokens kept aside are likeliest; then all pairs are used."""
    held = max(1, min(MAX_HELD, int(HELD_OUT * len(pairs.tokens_M))))
    aside, rest = Pairs(*(column[:held] for column in pairs)), Pairs(*(column[held:] for column in pairs))
    losses = {}
    for reading in READINGS:
        for log_tau, loss in zip(
            LOG_TAUS, _losses(reading(rest, table_VD), aside, table_VD, log_frequency_V), strict=True
        ):
            losses[reading, log_tau] = loss
    reading, log_tau = min(losses, key=losses.__getitem__)
    return reading(pairs, table_VD)._replace(log_tau=log_tau)


def forward(pairs: Pairs, table_VD: torch.Tensor) -> Start:
    """x~ ~ N(affine(e_v), S)."""
    rows_VD, scale_D = (part.double() for part in scaled(table_VD))
    affine = fit(pairs.clean_MD, pairs.sent_MD)
    spread_VD = (rows_VD * scale_D - affine.from_D) @ affine.weight_DD
    residual_MD = pairs.sent_MD.double() - affine(pairs.clean_MD)
    cov_DD = residual_MD.T @ residual_MD / len(residual_MD)
    floor = SHRINK * cov_DD.diagonal().mean() + RESOLUTION * spread_VD.square().mean() + 1e-30
    inverse_DD = torch.linalg.inv(cov_DD + floor * torch.eye(len(cov_DD), dtype=cov_DD.dtype, device=cov_DD.device))
    weight_DD = scale_D[:, None] * (affine.weight_DD @ inverse_DD)
    bias_V = -0.5 * ((spread_VD @ inverse_DD) * spread_VD).sum(-1)
    # The intercept: e_v . W x~ is of rows that are not centred, n_v of centred ones; the difference is the same for
    # all v and cancels in the softmax.
    return Start("forward regression", weight_DD, affine.to_D, bias_V, 0.0)


def backward(pairs: Pairs, table_VD: torch.Tensor) -> Start:
    """The nearest row to a regression's estimate of the embedding, in units of the table's std."""
    return _nearest("backward regression", fit(pairs.sent_MD, pairs.clean_MD), table_VD)


def as_sent(pairs: Pairs, table_VD: torch.Tensor) -> Start:
    """The nearest row to what was sent."""
    width = table_VD.shape[1]
    zero_D = torch.zeros(width, dtype=torch.float64, device=table_VD.device)
    return _nearest("nearest row", Affine(torch.eye(width).to(zero_D), zero_D, zero_D), table_VD)


READINGS = (forward, backward, as_sent)


def _nearest(name: str, estimate: Affine, table_VD: torch.Tensor) -> Start:
    rows_VD, scale_D = (part.double() for part in scaled(table_VD))
    bias_V = rows_VD @ (estimate.to_D / scale_D) - 0.5 * rows_VD.square().sum(-1)
    return Start(name, (estimate.weight_DD / scale_D).T, estimate.from_D, bias_V, 0.0)


def _losses(start: Start, aside: Pairs, table_VD: torch.Tensor, log_frequency_V: torch.Tensor) -> list[float]:
    """Nats a token at each temperature of ``LOG_TAUS``."""
    rows_VD, total = scaled(table_VD)[0].double(), torch.zeros(len(LOG_TAUS), dtype=torch.float64)
    for sent_CD, tokens_C in zip(aside.sent_MD.split(CHUNK), aside.tokens_M.split(CHUNK), strict=True):
        score_CV = (sent_CD.double() - start.from_D) @ start.weight_DD.T @ rows_VD.T + start.bias_V
        for i, log_tau in enumerate(LOG_TAUS):
            logits_CV = math.exp(log_tau) * score_CV + log_frequency_V.double()
            total[i] += torch.nn.functional.cross_entropy(logits_CV, tokens_C, reduction="sum").cpu()
    return (total / len(aside.tokens_M)).tolist()
