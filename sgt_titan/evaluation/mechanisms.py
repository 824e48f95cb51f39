"""Ways to hide a prompt, behind one door: the SGT and what it has to beat. All get the same battery and report.

    none        the embeddings as they are
    noise       Gaussian noise of one std for every token and feature (local differential privacy's mechanism)
    redaction   the tokens of marked private spans replaced by a placeholder; everything else in clear
    sgt         the export, called as a client calls it

Legend: B batch, T sequence, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sgt_titan.evaluation.samples import Padded
from sgt_titan.transform import StainedGlassTransform


class Obfuscated(NamedTuple):
    """Embeddings to send, and the Gaussian they were drawn from; ``log_std_BTD`` is None where there is no noise."""

    x_tilde_BTD: torch.Tensor
    center_BTD: torch.Tensor
    log_std_BTD: torch.Tensor | None


@dataclass(frozen=True)
class Mechanism:
    """``obfuscate(batch, x_BTD, random)``: embeddings of a batch, obfuscated where ``batch.obfuscate_BT``.

    transform: the SGT, where it is one. std: of a constant noise, embedding units; 0 where there is none. facts: what
    else a report states about it, by name.
    """

    name: str
    title: str
    obfuscate: Callable[[Padded, torch.Tensor, torch.Generator], Obfuscated] = field(repr=False)
    transform: StainedGlassTransform | None = field(default=None, repr=False)
    std: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)


def nothing() -> Mechanism:
    """No obfuscation: the embeddings themselves."""
    return Mechanism("none", "no obfuscation", lambda batch, x_BTD, random: Obfuscated(x_BTD, x_BTD, None))


def constant_noise(std: float, name: str = "noise", title: str = "constant noise") -> Mechanism:
    """Gaussian noise of one std (embedding units) for every token and feature, and no mean."""

    def obfuscate(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> Obfuscated:
        eps_BTD = torch.randn(x_BTD.shape, generator=random, device=x_BTD.device)
        x_tilde_BTD = torch.where(batch.obfuscate_BT[..., None], x_BTD.float() + std * eps_BTD, x_BTD.float())
        return Obfuscated(x_tilde_BTD, x_BTD, torch.full_like(x_BTD, math.log(std), dtype=torch.float32))

    return Mechanism(name, title, obfuscate, std=std)


def learned(transform: StainedGlassTransform) -> Mechanism:
    """The export, called as a client calls it."""

    def obfuscate(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> Obfuscated:
        attention_BT = batch.valid_BT.long()
        inputs = batch.tokens_BT if transform.embed_tokens is not None else x_BTD
        x_tilde_BTD = transform.transform(inputs, batch.obfuscate_BT, generator=random, attention_mask=attention_BT)
        out = transform(inputs_embeds=x_BTD, attention_mask=attention_BT)
        return Obfuscated(x_tilde_BTD, x_BTD.float() + out.mean_BTD, out.log_std_BTD)

    return Mechanism("sgt", "this SGT", obfuscate, transform=transform)
