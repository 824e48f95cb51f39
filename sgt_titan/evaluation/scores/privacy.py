"""What one obfuscation says about the prompt's tokens without any attacker at work: ranks and mutual information.

Legend: B batch, T sequence, D width, N hidden tokens flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated
from sgt_titan.evaluation.world.samples import Padded
from sgt_titan.metrics.information import log_mean_exp_information, pac_advantage
from sgt_titan.metrics.interval import RESAMPLES, Estimate, ratio
from sgt_titan.metrics.ranks import most_probable_rank, rank_histogram_entropy, token_ranks
from sgt_titan.objectives.mutual_information import MI_OFFSET, common_positions, group_loss, shifts
from sgt_titan.transform import ExportedTransform


@torch.no_grad()
def statistics(transform: ExportedTransform, trunk: PreTrainedModel, batches: Sequence[Padded]) -> tuple[float, float]:
    """Mean sigma and mean |mu| over the obfuscated tokens, in embedding units."""
    std, norm, tokens = 0.0, 0.0, 0
    for batch in batches:
        x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
        out = transform(inputs_embeds=x_BTD, attention_mask=batch.valid_BT.long())
        std += out.log_std_BTD[batch.obfuscate_BT].double().exp().mean(-1).sum().item()
        norm += out.mean_BTD[batch.obfuscate_BT].double().norm(dim=-1).sum().item()
        tokens += int(batch.obfuscate_BT.sum())
    return std / tokens, norm / tokens


def pair_information(sent: Obfuscated, mask_BT: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of every ordered pair of rows (x, y), (B, B) nats per feature, and which of them are pairs.

    A row with itself is none, nor are two rows without a common position: 0 there.
    """
    rows = mask_BT.shape[0]
    mi_BB, is_pair_BB = np.zeros((rows, rows)), np.zeros((rows, rows), dtype=bool)
    x = np.arange(rows)
    for shift in shifts("all", rows) if rows > 1 else ():
        positions_SB = common_positions(mask_BT, mask_BT, first=0, shifts=[shift])
        loss_B = group_loss(
            sent.x_tilde_BTD.float(),
            sent.log_std_BTD,
            mask_BT,
            sent.center_BTD.float(),
            sent.log_std_BTD,
            mask_BT,
            first=0,
            shifts=[shift],
            positions=positions_SB,
        )
        y, is_pair_B = (x + shift) % rows, (positions_SB[0] > 0).cpu().numpy()
        mi_BB[x, y] = np.where(is_pair_B, loss_B.double().cpu().numpy() - MI_OFFSET, 0.0)
        is_pair_BB[x, y] = is_pair_B
    return mi_BB, is_pair_BB


# -- with intervals, for the report ------------------------------------------------------------------------------------

BINS = 48
CHUNK_POSITIONS = 64


class Sent(NamedTuple):
    """What a mechanism makes of some batches. Per row: ranks of its hidden tokens (nearest_rows, the nearest row's id);
    ``parts`` keeps the embeddings for what needs pairs of rows."""

    rank_rows: list[torch.Tensor]
    ties: int
    parts: list[tuple[Obfuscated, torch.Tensor]]


@torch.no_grad()
def send(trunk: PreTrainedModel, batches: Sequence[Padded], mechanism: Mechanism, random: torch.Generator) -> Sent:
    """Obfuscate every row once and rank its hidden tokens."""
    embed = trunk.get_input_embeddings()
    ranks, ties, parts = [], 0, []
    for batch in batches:
        sent, hidden_BT = mechanism.obfuscate(batch, embed(batch.tokens_BT), random), batch.obfuscate_BT
        found = token_ranks(sent.x_tilde_BTD[hidden_BT], embed.weight, batch.tokens_BT[hidden_BT])
        ranks += found.rank_N.cpu().split(hidden_BT.sum(-1).tolist())
        ties += int((found.ties_N > 0).sum())
        parts.append((sent, hidden_BT))
    return Sent(ranks, ties, parts)


def measure_privacy(
    trunk: PreTrainedModel,
    batches: Sequence[Padded],
    calibration: Sequence[Padded],
    mechanism: Mechanism,
    random: torch.Generator,
    *,
    lm_top1: Estimate | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """``privacy`` and ``histogram`` of a report, as JSON values.

    Args:
        batches: the rows to measure. calibration: other rows, from which MRP takes its rank.
        lm_top1: how often a language model names the hidden token without seeing it: PAC-Adv's other prior.

    Intervals resample rows.
    """
    vocab = trunk.get_input_embeddings().weight.shape[0]
    sent = send(trunk, batches, mechanism, random)
    rank_N = torch.cat(sent.rank_rows)
    r_star = most_probable_rank(torch.cat(send(trunk, calibration, mechanism, random).rank_rows))
    entropy = rank_histogram_entropy(rank_N, vocab)
    mi = _mutual_information(sent.parts, seed)
    found: dict[str, Any] = {
        "nn_fr": _rate(sent, lambda rank: rank > 1, seed),
        "mrp_fr": _rate(sent, lambda rank: rank != r_star, seed),
        **{f"ttr_{k}": _rate(sent, lambda rank, k=k: rank > k, seed) for k in (10, 50, 100)},
        **{f"sym_ttr_{k}": _rate(sent, lambda rank, k=k: (rank > k) & (rank <= vocab - k), seed) for k in (10, 100)},
        "mrp_rank": r_star,
        "tied_tokens": sent.ties,
        "rank_entropy": _entropy(sent.rank_rows, vocab, seed).as_dict(),
        "rank_entropy_ceiling": entropy.ceiling,
        "mi": mi.as_dict(),
        "pac_adv_uniform": pac_advantage(mi.value, 1 / vocab) if not math.isnan(mi.value) else None,
    }
    if (information := _log_mean_exp(sent.parts, seed)) is not None:
        found["mi_log_mean_exp"], found["mi_log_mean_exp_ceiling"] = information
    if lm_top1 is not None:
        found["lm_top1"] = lm_top1.as_dict()
        if lm_top1.value > 0 and not math.isnan(mi.value):
            found["pac_adv_lm"] = pac_advantage(mi.value, lm_top1.value)
    return {"privacy": found, "histogram": _histogram(rank_N, vocab)}


@torch.no_grad()
def language_model_top1(trunk: PreTrainedModel, batches: Sequence[Padded]) -> Estimate:
    """How often the trunk's most probable next token is the hidden one, from the clean text before it: what a guesser
    who never looks at an embedding gets right. Hidden tokens with nothing before them count as missed."""
    hits, tokens = [], []
    for batch in batches:
        logits_BTV = trunk(input_ids=batch.tokens_BT, attention_mask=batch.valid_BT.long(), use_cache=False).logits
        right_BT = torch.zeros_like(batch.obfuscate_BT)
        right_BT[:, 1:] = logits_BTV[:, :-1].argmax(-1) == batch.tokens_BT[:, 1:]
        hits += (right_BT & batch.obfuscate_BT).sum(-1).tolist()
        tokens += batch.obfuscate_BT.sum(-1).tolist()
    return ratio(hits, tokens, share=True)


def _rate(sent: Sent, is_hit: Callable[[torch.Tensor], torch.Tensor], seed: int) -> dict[str, Any]:
    counts = [int(is_hit(rank).sum()) for rank in sent.rank_rows]
    return ratio(counts, [len(rank) for rank in sent.rank_rows], share=True, seed=seed).as_dict()


def _entropy(rank_rows: list[torch.Tensor], vocab: int, seed: int, resamples: int = 200) -> Estimate:
    """Resampled rows repeat tokens, which lowers a histogram's entropy: the interval is shifted back to the value."""
    value = rank_histogram_entropy(torch.cat(rank_rows), vocab).normalised
    picks = np.random.default_rng(seed).integers(0, len(rank_rows), (resamples, len(rank_rows)))
    draws = np.array(
        [rank_histogram_entropy(torch.cat([rank_rows[i] for i in row]), vocab).normalised for row in picks]
    )
    low, high = np.quantile(draws - draws.mean(), (0.025, 0.975)) + value
    return Estimate(value, float(min(low, value)), float(max(high, value)), sum(map(len, rank_rows)))


def _mutual_information(parts: list[tuple[Obfuscated, torch.Tensor]], seed: int) -> Estimate:
    """Algorithm 1 over all ordered pairs of rows of a batch, nats per feature; infinite without noise.

    Pairs that share a row are not independent, so rows are what is resampled: a pair counts as often as both of its
    rows were drawn. Two rows make one pair twice, and no interval.
    """
    if any(sent.log_std_BTD is None for sent, _ in parts):
        return Estimate(math.inf, math.nan, math.nan, 0)
    found = [pair_information(sent, hidden_BT) for sent, hidden_BT in parts]
    mi, pairs = (sum(float(part[i].sum()) for part in found) for i in (0, 1))
    if not pairs:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value, sizes = mi / pairs, [len(hidden_BT) for _, hidden_BT in parts]
    if sum(sizes) < 3:
        return Estimate(value, math.nan, math.nan, int(pairs))
    times_KR = np.random.default_rng(seed).multinomial(sum(sizes), [1 / sum(sizes)] * sum(sizes), RESAMPLES)
    mi_K, pairs_K, at = np.zeros(RESAMPLES), np.zeros(RESAMPLES), 0
    for (mi_BB, is_pair_BB), size in zip(found, sizes, strict=True):
        times_KB = times_KR[:, at : at + size].astype(np.float64)
        mi_K += ((times_KB @ mi_BB) * times_KB).sum(1)
        pairs_K += ((times_KB @ is_pair_BB) * times_KB).sum(1)
        at += size
    low, high = np.quantile(mi_K[pairs_K > 0] / pairs_K[pairs_K > 0], (0.025, 0.975))
    return Estimate(value, float(min(low, value)), float(max(high, value)), int(pairs))


def _log_mean_exp(parts: list[tuple[Obfuscated, torch.Tensor]], seed: int) -> tuple[dict[str, Any], float] | None:
    """``log_mean_exp_information`` within each batch, nats per token, and the ceiling that its batches allow."""
    value, ceiling, tokens = [], 0.0, []
    for sent, hidden_BT in parts:
        if sent.log_std_BTD is None:
            return None
        value_B = torch.zeros(len(hidden_BT), dtype=torch.float64, device=hidden_BT.device)
        for start in range(0, hidden_BT.shape[1], CHUNK_POSITIONS):
            here = slice(start, start + CHUNK_POSITIONS)
            own_MN, count_N = log_mean_exp_information(
                sent.x_tilde_BTD[:, here], sent.center_BTD[:, here], sent.log_std_BTD[:, here], hidden_BT[:, here]
            )
            value_B += own_MN.sum(1)
            ceiling += (count_N.clamp_min(1).double().log() * count_N).sum().item()
        value += value_B.tolist()
        tokens += hidden_BT.sum(1).tolist()
    return ratio(value, tokens, seed=seed).as_dict(), ceiling / max(sum(tokens), 1)


def _histogram(rank_N: torch.Tensor, vocab: int) -> dict[str, list[int]]:
    """Ranks in bins of equal width on a logarithmic axis, 1 to V."""
    edges = np.unique(np.round(np.geomspace(1, vocab + 1, BINS + 1)).astype(np.int64))
    return {"edges": edges.tolist(), "counts": np.histogram(rank_N.numpy(), bins=edges)[0].tolist()}
