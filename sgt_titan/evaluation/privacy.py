"""What one obfuscation says about the prompt's tokens without any attacker at work: ranks and mutual information.

Legend: B batch, T sequence, D width, N hidden tokens flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from sgt_titan.evaluation.mechanisms import Mechanism, Obfuscated
from sgt_titan.evaluation.samples import Padded
from sgt_titan.metrics.ranks import token_ranks
from sgt_titan.objectives.mutual_information import MI_OFFSET, common_positions, group_loss, shifts
from sgt_titan.transform import StainedGlassTransform


class Leakage(NamedTuple):
    """``rank_N`` int64 per obfuscated token; ``mi`` nats per feature, the mean over ``pairs`` pairs of rows."""

    rank_N: torch.Tensor
    mi: float
    pairs: int


@torch.no_grad()
def statistics(
    transform: StainedGlassTransform, trunk: PreTrainedModel, batches: Sequence[Padded]
) -> tuple[float, float]:
    """Mean sigma and mean |mu| over the obfuscated tokens, in embedding units."""
    std, norm, tokens = 0.0, 0.0, 0
    for batch in batches:
        x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
        out = transform(inputs_embeds=x_BTD, attention_mask=batch.valid_BT.long())
        std += out.log_std_BTD[batch.obfuscate_BT].double().exp().mean(-1).sum().item()
        norm += out.mean_BTD[batch.obfuscate_BT].double().norm(dim=-1).sum().item()
        tokens += int(batch.obfuscate_BT.sum())
    return std / tokens, norm / tokens


@torch.no_grad()
def leakage(
    trunk: PreTrainedModel, batches: Sequence[Padded], mechanism: Mechanism, random: torch.Generator
) -> Leakage:
    """Ranks and mutual information of a mechanism."""
    table_VD = trunk.get_input_embeddings().weight
    ranks, mi, pairs, noisy = [], 0.0, 0, True
    for batch in batches:
        sent = mechanism.obfuscate(batch, trunk.get_input_embeddings()(batch.tokens_BT), random)
        hidden_BT = batch.obfuscate_BT
        ranks.append(token_ranks(sent.x_tilde_BTD[hidden_BT], table_VD, batch.tokens_BT[hidden_BT]).rank_N)
        noisy = sent.log_std_BTD is not None
        if noisy:
            total, count = mutual_information_sum(sent, hidden_BT)
            mi, pairs = mi + total, pairs + count
    return Leakage(torch.cat(ranks), mi / pairs if pairs else math.nan if noisy else math.inf, pairs)


def mutual_information_sum(sent: Obfuscated, mask_BT: torch.Tensor) -> tuple[float, int]:
    """Algorithm 1, nats per feature, summed over the pairs of rows with a common position; their number."""
    rows, total, pairs = mask_BT.shape[0], 0.0, 0
    for shift in shifts("all", rows) if rows > 1 else ():
        positions = common_positions(mask_BT, mask_BT, first=0, shifts=[shift])
        loss_B = group_loss(
            sent.x_tilde_BTD.float(),
            sent.log_std_BTD,
            mask_BT,
            sent.center_BTD.float(),
            sent.log_std_BTD,
            mask_BT,
            first=0,
            shifts=[shift],
            positions=positions,
        )
        count = int((positions > 0).sum())
        total += loss_B.double().sum().item() - MI_OFFSET * count
        pairs += count
    return total, pairs
