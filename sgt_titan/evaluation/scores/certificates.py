"""From a rate to what no attacker can exceed: bounds on the share of hidden tokens that anybody reads.

R bounds I(X; z) of a prompt's hidden tokens X and one observation z, in nats (objectives/rate.py), whoever computes
what from z, and K fresh observations tell K R at most. With T hidden tokens, a the expected share of them that an
attacker names, and p(. | x_<t) the source's distribution of a token given those before it:

    prior       kl(a || m) <= R / T,  m = E max_v p(v | x_<t)
    Fano        (H(X) - R) / T <= h(1 - a) + (1 - a) ln(V - 1)
    distortion  1 - a >= max_s (G_s - R/T) / s,  G_s = E min_q E_{x~p} [ -ln( e^-s + (1 - e^-s) q(x) ) ]

All three follow from I(X; z) = sum_t I(X_t; z | X_<t) and convexity. The last is the conditional rate-distortion
function of single-token errors (Shannon's parametric form; Gray, IEEE Trans. IT 19, 1973); the smallest counts.

R is honest whatever the data. m, H and G_s are of the source, which nobody knows: they are taken from a language model,
and the bounds hold as far as text is as that model says. Where text is predictable they are weak, or none at all.

Legend: B prompts, N hidden tokens flat, V vocabulary, S values of s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from sgt_titan.evaluation.world.samples import Padded, embedding_table
from sgt_titan.metrics.information import pac_advantage
from sgt_titan.metrics.interval import Estimate, ratio
from sgt_titan.transform import ExportedTransform

CHUNK = 256  # tokens whose distributions exist at a time
SLOPES = tuple(0.25 * 1.35**i for i in range(16))  # values of s, 0.25 to 22


class Source(NamedTuple):
    """What a language model says of the hidden tokens, means over them: m, nats a token, and G_s for ``SLOPES``.

    log_vocab: of the vocabulary. tokens: how many it is the mean of.
    """

    best_guess: float
    nats: float
    slopes: tuple[float, ...]
    vocab: int
    tokens: int


@dataclass(frozen=True)
class Certificate:
    """``bounds``: name -> the largest share anybody can read, of the upper end of nats a token's interval; None where
    it bounds nothing. smallest: the best of them, None where there is none."""

    nats_per_prompt: Estimate
    nats_per_token: Estimate
    bounds: dict[str, float | None]
    source: Source
    repeats: int = 1

    @property
    def smallest(self) -> float | None:
        return min((bound for bound in self.bounds.values() if bound is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "nats_per_prompt": self.nats_per_prompt.as_dict(),
            "nats_per_token": self.nats_per_token.as_dict(),
            "bounds": dict(sorted(self.bounds.items(), key=lambda item: 2.0 if item[1] is None else item[1])),
            "smallest": self.smallest,
            "repeats": self.repeats,
            "source": {
                "best_guess": self.source.best_guess,
                "nats": self.source.nats,
                "tokens": self.source.tokens,
                "vocab": self.source.vocab,
            },
        }


def certificate(
    rate_B: Sequence[float], tokens_B: Sequence[int], source: Source, *, repeats: int = 1, seed: int = 0
) -> Certificate:
    """Bounds of one mechanism.

    Args:
        rate_B: nats of each prompt, any upper bound of its information; tokens_B: hidden tokens of each.
        repeats: fresh observations of each prompt that the attacker has.

    R is an expectation over prompts: the bounds take the upper end of its 95% interval (prompts resampled).

    Raises ValueError where a rate is negative or not a number, or no token is hidden.
    """
    nats_B, count_B = repeats * np.asarray(rate_B, np.float64), np.asarray(tokens_B, np.float64)
    if not len(nats_B) or not (nats_B >= -1e-6).all() or not count_B.sum() > 0:
        raise ValueError("expected non-negative rates of prompts with hidden tokens")
    per_token = ratio(nats_B, count_B, seed=seed)
    nats = per_token.high if math.isfinite(per_token.high) else per_token.value
    bounds = {
        "prior": prior_bound(nats, source.best_guess),
        "fano": fano_bound(nats, source.nats, source.vocab),
        "distortion": distortion_bound(nats, source.slopes),
    }
    return Certificate(
        nats_per_prompt=ratio(nats_B, np.ones(len(nats_B)), seed=seed),
        nats_per_token=per_token,
        bounds={name: bound if bound < 1 else None for name, bound in bounds.items()},
        source=source,
        repeats=repeats,
    )


# -- the bounds --------------------------------------------------------------------------------------------------------


def prior_bound(nats: float, best_guess: float) -> float:
    """The largest a >= m with kl(a || m) <= R/T; 1: none."""
    return pac_advantage(nats, best_guess) if best_guess > 0 and math.isfinite(nats) else 1.0


def fano_bound(nats: float, entropy: float, vocab: int) -> float:
    """The largest a that Fano's inequality allows, R/T and H(X)/T in nats; 1: none."""
    left = entropy - nats
    if not left > 0:
        return 1.0
    low, high = 0.0, 1 - 1 / vocab  # of 1 - a: there h(e) + e ln(V - 1) rises from 0 to ln V
    if left >= math.log(vocab):
        return 1 / vocab
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _fano(middle, vocab) < left else (low, middle)
    return 1 - low


def _fano(error: float, vocab: int) -> float:
    entropy = -sum(p * math.log(p) for p in (error, 1 - error) if p > 0)
    return entropy + error * math.log(vocab - 1)


def distortion_bound(nats: float, slopes: Sequence[float]) -> float:
    """1 - max_s (G_s - R/T) / s; 1: none."""
    if not math.isfinite(nats):
        return 1.0
    return 1 - max(0.0, *((value - nats) / s for s, value in zip(SLOPES, slopes, strict=True)))


@torch.no_grad()
def rate_distortion_slopes(p_NV: torch.Tensor, slopes: Sequence[float] = SLOPES) -> torch.Tensor:
    """G_s of each row of probabilities, (N, S) float64, exactly.

    With alpha = e^-s the best q is ``max(0, c p - alpha) / (1 - alpha)``: reverse water-filling, over the k most
    probable tokens, k the largest with ``c p_k > alpha`` for ``c = (1 - alpha + k alpha) / sum of these p``.
    """
    sorted_NV = p_NV.double().sort(-1, descending=True).values
    total_NV = sorted_NV.cumsum(-1)
    # Beyond the mass there is, p is 0 and is never filled; entropy needs no care there either.
    plogp_NV = torch.where(sorted_NV > 0, sorted_NV * sorted_NV.clamp_min(1e-300).log(), 0.0).cumsum(-1)
    count_V = torch.arange(1, p_NV.shape[1] + 1, dtype=torch.float64, device=p_NV.device)
    found = []
    for s in slopes:
        alpha = math.exp(-s)
        c_NV = (1 - alpha + count_V * alpha) / total_NV.clamp_min(1e-300)
        last_N1 = (c_NV * sorted_NV > alpha).sum(-1, keepdim=True).clamp_min(1) - 1
        c_N, total_N, plogp_N = (t_NV.gather(1, last_N1)[:, 0] for t_NV in (c_NV, total_NV, plogp_NV))
        found.append(-(plogp_N + total_N * c_N.log()) + (total_NV[:, -1] - total_N).clamp_min(0) * s)
    return torch.stack(found, -1)


def source_of(log_p_NV: torch.Tensor, tokens_N: torch.Tensor) -> tuple[np.ndarray, int]:
    """Sums over some hidden tokens of max p, of nats, and of G_s (2 + S,), and how many there are.

    log_p_NV: of each token given those before it, normalised. Sums of several calls make ``source_from``.
    """
    p_NV = log_p_NV.double().exp()
    sums = [
        p_NV.max(-1).values.sum().item(),
        -log_p_NV.gather(1, tokens_N[:, None]).double().sum().item(),
        *rate_distortion_slopes(p_NV).sum(0).tolist(),
    ]
    return np.array(sums), len(tokens_N)


def source_from(sums: np.ndarray, tokens: int, vocab: int) -> Source:
    """The means of ``source_of``'s sums."""
    best, nats, *slopes = (sums / tokens).tolist()
    return Source(best, nats, tuple(slopes), vocab, tokens)


@torch.no_grad()
def measure_source(trunk: PreTrainedModel, batches: Sequence[Padded]) -> Source:
    """The trunk's own view of the hidden tokens, given the clean text before each. One with nothing before it counts as
    known: that errs towards no bound."""
    sums, tokens, vocab = np.zeros(2 + len(SLOPES)), 0, embedding_table(trunk).shape[0]
    for batch in batches:
        logits_BTV = trunk(input_ids=batch.tokens_BT, attention_mask=batch.valid_BT.long(), use_cache=False).logits
        hidden_BT = batch.obfuscate_BT & batch.valid_BT
        sums[0] += int(hidden_BT[:, 0].sum())
        logits_NV, tokens_N = logits_BTV[:, :-1][hidden_BT[:, 1:]], batch.tokens_BT[:, 1:][hidden_BT[:, 1:]]
        for logits_CV, tokens_C in zip(logits_NV.split(CHUNK), tokens_N.split(CHUNK), strict=True):
            sums += source_of(torch.log_softmax(logits_CV[:, :vocab].double(), -1), tokens_C)[0]
        tokens += int(hidden_BT.sum())
    return source_from(sums, tokens, vocab)


@torch.no_grad()
def measure_rates(
    transform: ExportedTransform, batches: Sequence[Padded], random: torch.Generator
) -> tuple[list[float], list[int]]:
    """Nats of each prompt by the export's own rate, and its hidden tokens."""
    rates, tokens = [], []
    for batch in batches:
        attention_BT = batch.valid_BT.long()
        rate_BT = transform.rate(batch.tokens_BT, batch.obfuscate_BT, attention_mask=attention_BT, generator=random)
        rates += rate_BT.double().sum(-1).tolist()
        tokens += batch.obfuscate_BT.sum(-1).tolist()
    return rates, tokens


def least_nats(kept: float, worth_B: Sequence[float]) -> Estimate:
    """k Delta, nats a prompt: what a mechanism that keeps a share k of the answers' worth has revealed at least.

    ``I(X; z) >= I(answer; z) >= k Delta`` along X - answer - z, Delta = n (L_none - L_clean) of each prompt: nothing
    can be left of that line. L_none stands for the entropy of the answer without the prompt, and is too high as far as
    the best that is known of it is: then so is the line.
    """
    return ratio(kept * np.asarray(worth_B, np.float64), np.ones(len(worth_B)))


# -- one value, without averaging over prompts -------------------------------------------------------------------------


def messages_bound(best_guess: float, messages: int) -> float:
    """P(guess of a value) if all that is observed depends on it through one of N messages only: ``N p*``; 1: none.

    best_guess: p*, the best guess from everything else. N = 1, a surrogate drawn without looking: p* itself.
    """
    return min(1.0, messages * best_guess)


def radius_bound(best_guess: float, radius: float, std: float) -> float:
    """P(guess of a value) behind a Gaussian whose mean moves by at most ``radius`` over all values: ``Phi(Phi^-1(p*) +
    radius / std)``, by Neyman and Pearson against the mean of them all; 1: none.

    radius: of a ball that holds every value's mean.
    """
    if std <= 0:
        return 1.0
    standard = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    return standard.cdf(standard.icdf(torch.tensor(best_guess, dtype=torch.float64)) + radius / std).item()
