"""What obfuscation costs the answer: the trunk's predictions of the response, against those on the clean prompt.

Measured on the response's tokens, which stay clean and are given (teacher forcing). Legend: B batch, T sequence,
D width, V vocabulary, N scored tokens flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from sgt_titan.evaluation.mechanisms import Mechanism
from sgt_titan.evaluation.samples import Padded
from sgt_titan.objectives.utility import soft_cross_entropy


class Utility(NamedTuple):
    """Per scored token, (N,) float64 each, in the order of the rows: nats, nats, nats, and 0 or 1."""

    nll_N: torch.Tensor  # of the true token
    cross_entropy_N: torch.Tensor  # with the trunk on the clean prompt
    teacher_entropy_N: torch.Tensor
    agree_N: torch.Tensor


@torch.no_grad()
def measured(
    trunk: PreTrainedModel, batches: Sequence[Padded], mechanism: Mechanism, random: torch.Generator
) -> Utility:
    """Utility of the rows as the mechanism sends them."""
    parts = []
    for batch in batches:
        sent = mechanism.obfuscate(batch, trunk.get_input_embeddings()(batch.tokens_BT), random)
        parts.append(compare(trunk, batch, response_logits(trunk, batch, sent.x_tilde_BTD)))
    return joined(parts)


@torch.no_grad()
def without_prompt(
    trunk: PreTrainedModel, batches: Sequence[Padded], shortened: Sequence[Padded]
) -> dict[str, Utility]:
    """Utility without the obfuscated tokens of the prompt, by the way they are removed.

    ``shortened``: the same rows after ``shorten``.
    """
    embed = trunk.get_input_embeddings()
    parts: dict[str, list[Utility]] = {"taken out": [], "hidden": [], "zeroed": []}
    for batch, short in zip(batches, shortened, strict=True):
        x_BTD = embed(batch.tokens_BT)
        # The response stays, also where it is obfuscated itself.
        answer_BT = batch.target_BT.cumsum(-1) > 0
        prompt_BT = batch.obfuscate_BT & ~answer_BT
        hidden = batch._replace(valid_BT=batch.valid_BT & ~prompt_BT)
        logits = {
            "taken out": response_logits(trunk, short, embed(short.tokens_BT)),
            "hidden": response_logits(trunk, hidden, x_BTD),
            "zeroed": response_logits(trunk, batch, x_BTD.masked_fill(prompt_BT[..., None], 0.0)),
        }
        for name, logits_NV in logits.items():
            parts[name].append(compare(trunk, batch, logits_NV))
    found = {name: joined(columns) for name, columns in parts.items()}
    # Some attention kernels give NaN to a token that may look at nothing.
    return {name: utility for name, utility in found.items() if utility.nll_N.isfinite().all()}


def response_logits(trunk: PreTrainedModel, batch: Padded, x_tilde_BTD: torch.Tensor) -> torch.Tensor:
    """Logits (N, V), float32, that predict the batch's targets."""
    logits_BTV = trunk(
        inputs_embeds=x_tilde_BTD.to(trunk.dtype), attention_mask=batch.valid_BT.long(), use_cache=False
    ).logits
    return logits_BTV[:, :-1][batch.target_BT[:, 1:]].float()


def compare(trunk: PreTrainedModel, batch: Padded, student_NV: torch.Tensor) -> Utility:
    """The student's logits against the true tokens and against the trunk on the clean rows."""
    teacher_NV = response_logits(trunk, batch, trunk.get_input_embeddings()(batch.tokens_BT))
    soft = soft_cross_entropy(student_NV, teacher_NV)
    nll_N = torch.nn.functional.cross_entropy(student_NV, batch.tokens_BT[batch.target_BT], reduction="none")
    return Utility(nll_N.double(), *(values_N.double() for values_N in soft))


def joined(parts: Iterator[Utility] | list[Utility]) -> Utility:
    return Utility(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def perplexity(utility: Utility) -> float:
    return math.exp(min(utility.nll_N.mean().item(), 700.0))
