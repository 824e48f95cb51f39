"""What no rotation hides: norms, pairwise products, and what the served model computes from one token alone.

Legend: N hidden tokens flat, D width, V vocabulary, K guesses, C candidates, A anchors, H heads.
"""

from __future__ import annotations

from typing import get_args

import torch

from sgt_titan.conjformer.convert import Conversion, Norms
from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.attacks.rotation_procrustes import orthogonal
from sgt_titan.evaluation.world.threat import Cost, Guess, Observation, Public, Served, Size, Table
from sgt_titan.transform.trunk_files import TrunkFiles

GUESSES = 10
CHUNK = 1024


def norm_matching(observation: Observation, table: Table) -> Guess:
    """arg min | ||x'|| - ||e|| |: one number a token, which any rotation leaves as it is."""
    norm_N1 = observation.x_tilde_ND.double().norm(dim=-1, keepdim=True)
    top_NK = top_rows(norm_N1, table.rows_VD.double().norm(dim=-1, keepdim=True), GUESSES)
    return Guess(top_NK.cpu(), flops=2.0 * (observation.x_tilde_ND.numel() + table.rows_VD.numel()))


def gram_matching(
    observation: Observation, table: Table, *, candidates: int = 32, anchors: int = 128, rounds: int = 4
) -> Guess:
    """Candidates by norm, then the assignment whose products x_i x_j agree best with e_v e_w; all prompts together,
    since they share the basis. At last the rotation that the assignment implies, by Procrustes, and nearest rows.

    The quadratic assignment is solved by turns: each token takes the candidate that agrees best with the anchors, the
    tokens whose own agreement is the best become the anchors of the next round.
    """
    x_ND, rows_VD = observation.x_tilde_ND.double(), table.rows_VD.double()
    norm_N1 = x_ND.norm(dim=-1, keepdim=True)
    order_NC = top_rows(norm_N1, rows_VD.norm(dim=-1, keepdim=True), candidates)
    gap_N = (rows_VD.norm(dim=-1)[order_NC[:, :2]] - norm_N1).abs()
    sure_N = gap_N[:, 1] - gap_N[:, 0]  # how much worse the second norm fits
    guess_N = order_NC[:, 0].clone()
    for _ in range(rounds):
        chosen_A = sure_N.topk(min(anchors, len(sure_N))).indices
        gram_NA, told_AD = x_ND @ x_ND[chosen_A].T, rows_VD[guess_N[chosen_A]]
        for start in range(0, len(x_ND), CHUNK):
            here = slice(start, start + CHUNK)
            said_CCA = rows_VD[order_NC[here]] @ told_AD.T
            # Medians: a few wrong anchors must not decide.
            error_CC = (said_CCA - gram_NA[here, None]).abs().median(-1).values
            best = error_CC.min(-1)
            guess_N[here] = order_NC[here].gather(1, best.indices[:, None])[:, 0]
            sure_N[here] = -best.values / gram_NA[here].abs().mean(-1).clamp_min(1e-30)
    few = sure_N.topk(min(len(sure_N), max(4 * rows_VD.shape[1], anchors))).indices
    for _ in range(rounds):
        U_DD = orthogonal(x_ND[few].T @ rows_VD[guess_N[few]])
        top_NK = top_rows(x_ND @ U_DD, rows_VD, GUESSES)
        guess_N = top_NK[:, 0]
    residual = (x_ND @ U_DD - rows_VD[guess_N]).norm() / x_ND.norm()
    note = f"its own rotation leaves {residual:.1%} of what was sent unexplained"
    flops = 2.0 * rounds * len(x_ND) * x_ND.shape[1] * (anchors + candidates * anchors)
    return Guess(top_NK.cpu(), flops=flops, notes=(note,))


def fingerprints(observation: Observation, served: Served, public: Public, table: Table) -> Guess:
    """Attention logits of a token with itself in the first layer, one a head: the served model computes from x' what
    the public one computes from e, since no secret changes a score. Nearest row in these H numbers, standardised; also
    in order of size, since heads may have been exchanged. What was served, and whether they were, the clearer decision
    says: how much nearer the first row is than the second."""
    seen_NH = self_scores(served.files, observation.x_tilde_ND)
    found = []
    for norms in get_args(Norms):
        known_VH = self_scores(public.files, table.rows_VD, norms)
        for ours_NH, theirs_VH in ((seen_NH, known_VH), (seen_NH.sort(-1).values, known_VH.sort(-1).values)):
            scale_H = theirs_VH.std(0).clamp_min(1e-12)
            top_NK = top_rows(ours_NH / scale_H, theirs_VH / scale_H, GUESSES)
            far_N2 = ((ours_NH[:, None] - theirs_VH[top_NK[:, :2]]) / scale_H).norm(dim=-1)
            found.append(((far_N2[:, 0] / far_N2[:, 1].clamp_min(1e-30)).mean().item(), top_NK))
    _, top_NK = min(found, key=lambda pair: pair[0])
    size = seen_NH.shape[0] + table.rows_VD.shape[0]
    return Guess(top_NK.cpu(), flops=6.0 * size * table.rows_VD.shape[1] ** 2)


def self_scores(files: TrunkFiles, x_ND: torch.Tensor, norms: Norms = "fold") -> torch.Tensor:
    """q_h(x) k_h(x) / sqrt(d) of the first layer at distance 0, where RoPE does nothing: (N, H) float64.

    Raises ValueError for a family whose positions are added to the embeddings.
    """
    plain = Conversion(files.path, None, norms=norms)
    family, s = plain.family, plain.sizes
    if not family.rope:
        raise ValueError("fingerprints need a family with RoPE")
    norm = f"{family.prefix}{family.layer.format(0)}{family.linears['self_attn.q_proj'].norm}.weight"
    scalar = files.read(norm).double().mean().item() if norms == "mean" else 1.0
    eps = float(plain.config.get("rms_norm_eps", 1e-6))
    x_ND = x_ND.double().cpu()
    n_ND = scalar * x_ND / (x_ND.square().mean(-1, keepdim=True) + eps).sqrt()
    heads = {}
    for name, count in (("q", s.heads), ("k", s.kv_heads)):
        module = f"self_attn.{name}_proj"
        y_NHd = (n_ND @ plain.linear(0, module).T).unflatten(-1, (count, s.head))
        if f"{family.prefix}{family.layer.format(0)}{module}.bias" in files:
            y_NHd = y_NHd + plain.linear(0, module, bias=True).unflatten(-1, (count, s.head))
        if family.qk_norm:
            gain = files.read(f"{family.prefix}{family.layer.format(0)}self_attn.{name}_norm.weight").double()
            y_NHd = gain * y_NHd / (y_NHd.square().mean(-1, keepdim=True) + eps).sqrt()
        heads[name] = y_NHd
    keys_NHd = heads["k"].repeat_interleave(s.heads // s.kv_heads, 1)
    return (heads["q"] * keys_NHd).sum(-1) / s.head**0.5


def cost(size: Size, *, candidates: int = 32, anchors: int = 128, rounds: int = 4) -> Cost:
    flops = 2.0 * rounds * size.tokens * size.width * anchors * candidates
    return Cost(
        flops, 8.0 * min(size.tokens, CHUNK) * candidates * anchors + 8.0 * size.tokens * (anchors + size.vocab)
    )
