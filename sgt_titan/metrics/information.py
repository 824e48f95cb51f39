"""Information-theoretic readings: PAC advantage, and the mutual information that averages before it takes logs.

Legend: M mixture components (rows), N positions flat, D width.
"""

from __future__ import annotations

import math

import torch


def pac_advantage(mi: float, prior: float) -> float:
    """The most an adversary can succeed with, 0..1: the p >= q that solves KL(p || q) = MI.

    ``p ln(p/q) + (1-p) ln((1-p)/(1-q)) = mi`` in nats, q = ``prior`` the success rate without any observation (PAC
    privacy, arXiv 2210.03458, Theorem 1; Eq. 4 of arXiv 2506.09452). 1 where mi reaches -ln q. The paper takes the MI
    of one *feature* and q = 1/V: so read, it bounds the recovery of a single feature and not of a token.

    Raises ValueError unless 0 < prior <= 1 and mi is a number; a negative mi, as a Monte-Carlo estimate may be, is 0.
    """
    if not 0 < prior <= 1 or math.isnan(mi):
        raise ValueError(f"expected 0 < prior <= 1 and a mutual information, got {prior} and {mi}")
    if mi >= -math.log(prior):
        return 1.0
    low, high = prior, 1.0
    for _ in range(200):
        p = (low + high) / 2
        if _divergence(p, prior) < mi:
            low = p
        else:
            high = p
    return high if mi > 0 else prior


def _divergence(p: float, q: float) -> float:
    """KL between Bernoulli distributions, nats."""
    rest = (1 - p) * (math.log1p(-p) - math.log1p(-q)) if p < 1 else 0.0
    return p * math.log(p / q) + rest


@torch.no_grad()
def log_mean_exp_information(
    x_tilde_MND: torch.Tensor, center_MND: torch.Tensor, log_std_MND: torch.Tensor, mask_MN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ln p(x~ | x) - ln 1/M' sum_m p(x~ | y_m), per row and position: (M, N) float64 nats per token, and M' (N,).

    Args:
        x_tilde_MND: one obfuscation of each of M rows at N aligned positions.
        center_MND: the mean of the Gaussian it was drawn from, x + mu(x).
        log_std_MND: its log std.
        mask_MN: true where a row is obfuscated at that position; other entries are not read and give 0.

    The mixture runs over the M' rows obfuscated at the position, x itself among them, so that the value is at most
    ln M'. Where Algorithm 1 averages the logs over y, which far components rule, this averages the densities: with x
    among M' independent rows it is the InfoNCE form with the true density ratio, in expectation a *lower* bound of the
    information between x~ and the Gaussian it was drawn from (Poole et al., arXiv 1905.06922, Eq. 12), saturated at
    ln M'. Near ln M', all of it is given away as far as M' rows can tell; near 0, with M' large, an obfuscation hardly
    tells which of the rows it came from.
    """
    M, N = mask_MN.shape
    count_N = mask_MN.sum(0)
    own_MN = torch.zeros(M, N, dtype=torch.float64, device=x_tilde_MND.device)
    for n in range(N):
        rows = mask_MN[:, n].nonzero()[:, 0]
        if len(rows) == 0:
            continue
        x_RD, c_RD, s_RD = (t[rows, n].double() for t in (x_tilde_MND, center_MND, log_std_MND))
        # log N(x~_i; c_j, s_j^2) without the constant: expanded would cancel, so one component at a time.
        log_RR = torch.stack(
            [
                -0.5 * ((x_RD - c_RD[j]) * torch.exp(-s_RD[j])).square().sum(-1) - s_RD[j].sum()
                for j in range(len(rows))
            ],
            1,
        )
        mixture_R = torch.logsumexp(log_RR, 1) - math.log(len(rows))
        own_MN[rows, n] = log_RR.diagonal() - mixture_R
    return own_MN, count_N
