"""The rate: what one observation can tell at most, in nats, whoever looks at it (variational information bottleneck,
arXiv 1612.00410).

A prompt X is sent as ``z_t = x_t + mu_t + sigma_t eps_t``. For any distribution r that does not see X,

    I(X; z) <= E sum_t KL( N(x_t + mu_t, diag sigma_t^2) || r(z_t) ) = R,

and R bounds whatever is computed from z afterwards. A bad r makes the bound loose, never wrong. Three of them:

    broad    N(0, tau^2 I)
    tokens   pi_0 N(0, tau^2 I) + (1 - pi_0) sum_v p_v N(a e_v + b, diag s^2), p the tokens' public frequencies
    context  the same with p_v from a causal network over z_<t: r(z_t | z_<t), as the chain rule allows

A mixture's KL has no closed form. By Jensen, -ln sum_k w_k exp(-KL_k) over any of its components bounds it from above,
so two of them do: the broad one and the true token's.

Legend: B rows, T tokens, D width, V vocabulary, N tokens flat, R rank of the context's bottleneck. Values are float32
(float64 for float64 inputs), nats a token.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from sgt_titan.objectives.geometry import widen

PRIORS = ("broad", "tokens", "context")


def gaussian_kl(
    center_BTD: torch.Tensor,
    log_std_BTD: torch.Tensor,
    prior_mean_BTD: torch.Tensor | float,
    prior_log_std_D: torch.Tensor | float,
) -> torch.Tensor:
    """KL( N(center, diag e^(2 log_std)) || N(prior_mean, diag e^(2 prior_log_std)) ), (B, T), exactly.

    ``prior_mean`` and ``prior_log_std`` may be anything that broadcasts to (B, T, D).
    """
    log_ratio_BTD = widen(log_std_BTD) - prior_log_std_D
    scale = prior_log_std_D.exp() if isinstance(prior_log_std_D, torch.Tensor) else math.exp(prior_log_std_D)
    shift_BTD = (widen(center_BTD) - prior_mean_BTD) / scale
    # expm1: near a prior that is met exactly, 1 would swallow the digits of what is left.
    return (0.5 * (shift_BTD.square() + torch.expm1(2 * log_ratio_BTD)) - log_ratio_BTD).sum(-1)


def broad_rate(center_BTD: torch.Tensor, log_std_BTD: torch.Tensor, tau: float) -> torch.Tensor:
    """KL to N(0, tau^2 I), (B, T). tau: embedding units."""
    return gaussian_kl(center_BTD, log_std_BTD, 0.0, math.log(tau))


def mixture_rate(
    broad_BT: torch.Tensor, token_BT: torch.Tensor, logit: torch.Tensor, log_p_BT: torch.Tensor
) -> torch.Tensor:
    """Upper bound of the KL to a mixture, (B, T), from two of its components.

    ``-ln( pi_0 e^-KL_0 + (1 - pi_0) p_x e^-KL_x )``: broad_BT is KL_0, token_BT is KL_x to the component of the token
    that stands there, log_p_BT that token's log-probability, pi_0 the sigmoid of ``logit``. Never below the true KL;
    equal to it where q is one of the two and the other components do not reach there.
    """
    return -torch.logaddexp(logsigmoid(logit) - broad_BT, logsigmoid(-logit) + log_p_BT - token_BT)


def learned_rate(
    broad_BT: torch.Tensor,
    x_BTD: torch.Tensor,
    center_BTD: torch.Tensor,
    log_std_BTD: torch.Tensor,
    log_p_BT: torch.Tensor,
    *,
    gain_D: torch.Tensor,
    shift_D: torch.Tensor,
    prior_log_std_D: torch.Tensor,
    logit: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """:func:`mixture_rate` whose token stands at ``gain x + scale shift`` with std ``scale exp(prior_log_std)``.

    (B, T). scale: the table's std, so that what is learned is of order 1.
    """
    token_BT = gaussian_kl(center_BTD, log_std_BTD, gain_D * x_BTD + scale * shift_D, prior_log_std_D + math.log(scale))
    return mixture_rate(broad_BT, token_BT, logit, log_p_BT)


def token_log_probability(
    features_NR: torch.Tensor, up_VR: torch.Tensor, log_frequency_V: torch.Tensor, targets_N: torch.Tensor
) -> torch.Tensor:
    """ln p of each target (N,) under ``softmax(up f + log_frequency)``: the context prior's p_v. Zero features give the
    frequencies.
    """
    logits_NV = features_NR @ up_VR.T + log_frequency_V
    return torch.log_softmax(logits_NV, dim=-1).gather(-1, targets_N[:, None])[:, 0]


def log_frequencies(counts_V: torch.Tensor) -> torch.Tensor:
    """ln p_v from how often each token stands at obfuscated positions, float32 (V,); one is added to every count."""
    smooth_V = counts_V.double() + 1
    return (smooth_V / smooth_V.sum()).log().float()


def exchange(weight: float, utility_tokens: int, obfuscated_tokens: int) -> float:
    """What a nat that is revealed costs in nats of the response's utility.

    The loss is ``utility / utility_tokens + weight * R / obfuscated_tokens``; times ``utility_tokens`` it is in nats of
    whole responses, where R has this factor. A nat of R is kept where it saves more utility than that.
    """
    return weight * utility_tokens / max(obfuscated_tokens, 1)
