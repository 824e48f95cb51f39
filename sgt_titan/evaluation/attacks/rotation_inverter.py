"""An inverter trained without the secret: it sees nothing but what a rotation cannot change, so it needs no rotation.

A bidirectional transformer over the prompt. A token enters as its norm, at many scales; two tokens attend to each
other by their product and their cosine. Trained on public text, obfuscated by the SGT where one precedes the rotation.

Legend: B rows, T tokens, N hidden tokens flat, V vocabulary, H width, F frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from sgt_titan.evaluation.world.samples import Sample, generator, padded
from sgt_titan.evaluation.world.threat import Corpus, Cost, Curve, Guess, Observation, Seed, Size, Table, WithoutSecret

GUESSES = 10
POINTS = 4
HELD_ROWS = 16  # of the corpus, not trained on
FREQUENCIES = 24  # of the norm, from one turn over the table's range to a million


class InvariantReader(nn.Module):
    """Logits (B, T, V) from x' (B, T, D), the same for U x' with any orthogonal U.

    logits_v = f_v - tau (||x'|| - ||e_v||)^2 / s^2 with f from the transformer: it starts as norm matching.
    """

    norm_V: torch.Tensor
    rate_F: torch.Tensor

    def __init__(self, table_VD: torch.Tensor, *, layers: int, width: int, heads: int = 4):
        super().__init__()
        norm_V = table_VD.norm(dim=-1)
        self.register_buffer("norm_V", norm_V, persistent=False)
        self.scale = norm_V.std().item()
        self.register_buffer("rate_F", 2 * math.pi * torch.logspace(0, 6, FREQUENCIES), persistent=False)
        self.enter = nn.Linear(2 * FREQUENCIES + 1, width)
        self.pair = nn.Sequential(nn.Linear(3, 32), nn.GELU(), nn.Linear(32, layers * heads))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.leave = nn.Linear(width, len(norm_V))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.log_tau = nn.Parameter(torch.tensor(12.0))
        self.heads = heads

    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        norm_BT1 = x_BTD.norm(dim=-1, keepdim=True)
        unit_BT1 = (norm_BT1 - self.norm_V.mean()) / self.scale
        phase_BTF = unit_BT1 * self.rate_F
        h_BTH = self.enter(torch.cat([unit_BT1, phase_BTF.sin(), phase_BTF.cos()], -1))
        gram_BTT = x_BTD @ x_BTD.mT
        cosine_BTT = gram_BTT / (norm_BT1 * norm_BT1.mT).clamp_min(1e-12)
        same_TT = torch.eye(x_BTD.shape[1], device=x_BTD.device).expand_as(gram_BTT)
        near_BTTX = self.pair(torch.stack([cosine_BTT, gram_BTT / self.norm_V.mean() ** 2, same_TT], -1))
        hidden_BT = torch.zeros_like(valid_BT, dtype=x_BTD.dtype).masked_fill(~valid_BT, -1e9)
        bias_LBHTT = near_BTTX.permute(3, 0, 1, 2).unflatten(0, (len(self.layers), self.heads)).transpose(1, 2)
        for layer, bias_BHTT in zip(self.layers, bias_LBHTT, strict=True):
            mask = (bias_BHTT + hidden_BT[:, None, None, :]).flatten(0, 1)
            h_BTH = layer(h_BTH, src_mask=mask)
        far_BTV = (norm_BT1 - self.norm_V).div(self.scale).square()
        return self.leave(h_BTH) - self.log_tau.exp() * far_BTV


def invariant_inverter(
    observation: Observation,
    without: WithoutSecret,
    corpus: Corpus,
    table: Table,
    seed: Seed,
    *,
    steps: int = 300,
    layers: int = 2,
    width: int = 128,
    batch_rows: int = 8,
    lr: float = 2e-3,
) -> Guess:
    """Train and read; a curve over the training steps. Read is what the step says that was best on rows of the corpus
    kept aside: where the norms alone tell the tokens apart, that is the step before the first."""
    rows_VD, rows, aside = table.rows_VD, corpus.rows[HELD_ROWS:], corpus.rows[:HELD_ROWS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed.value)
        reader = InvariantReader(rows_VD, layers=layers, width=width).to(rows_VD.device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    random, top, shares = np.random.default_rng(seed.value), [], []
    marks = sorted({0, *(round(steps * i / POINTS) for i in range(1, POINTS + 1))})
    for step in range(steps + 1):
        if step in marks:
            top.append(_guess(reader, observation))
            shares.append(_held_out(reader, aside, without, rows_VD, seed.value))
        if step == steps:
            break
        picks = random.integers(0, len(rows), min(batch_rows, len(rows)))
        batch = padded([rows[i] for i in picks], 0, rows_VD.device)
        noise = generator((seed.value << 32) + step, rows_VD.device)
        with torch.no_grad():
            sent_BTD = without.mechanism.obfuscate(batch, rows_VD[batch.tokens_BT], noise).x_tilde_BTD.float()
        logits_NV = reader(sent_BTD, batch.valid_BT)[batch.obfuscate_BT]
        loss = nn.functional.cross_entropy(logits_NV, batch.tokens_BT[batch.obfuscate_BT])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    curve = Curve("training steps", tuple(map(float, marks)), tuple(top_NK[:, 0] for top_NK in top))
    count = sum(p.numel() for p in reader.parameters())
    tokens = steps * batch_rows * max(len(h) for h in observation.hidden)
    best = max(range(len(marks)), key=shares.__getitem__)
    note = f"on its own held-out text it reads {shares[best]:.1%} at its best step, {marks[best]}"
    return Guess(top[best], curve, 6.0 * tokens * count, (note,))


@torch.no_grad()
def _held_out(
    reader: InvariantReader, rows: Sequence[Sample], without: WithoutSecret, rows_VD: torch.Tensor, seed: int
) -> float:
    """Top-1 on public rows that the reader was not trained on."""
    batch = padded(rows, 0, rows_VD.device)
    sent = without.mechanism.obfuscate(batch, rows_VD[batch.tokens_BT], generator(seed, rows_VD.device))
    read_N = reader(sent.x_tilde_BTD.float(), batch.valid_BT)[batch.obfuscate_BT].argmax(-1)
    return (read_N == batch.tokens_BT[batch.obfuscate_BT]).double().mean().item()


@torch.no_grad()
def _guess(reader: InvariantReader, observation: Observation) -> torch.Tensor:
    found = []
    for x_TD, hidden_T in zip(observation.x_tilde, observation.hidden, strict=True):
        valid_1T = torch.ones(1, len(x_TD), dtype=torch.bool, device=x_TD.device)
        logits_TV = reader(x_TD[None].float(), valid_1T)[0]
        found.append(logits_TV[hidden_T.to(x_TD.device)].topk(GUESSES).indices.cpu())
    return torch.cat(found)


def cost(
    size: Size, *, steps: int = 300, layers: int = 2, width: int = 128, batch_rows: int = 8, lr: float = 2e-3
) -> Cost:
    parameters = 12.0 * layers * width**2 + width * size.vocab
    tokens = batch_rows * size.longest
    return Cost(6.0 * steps * tokens * parameters, 16.0 * tokens * (size.vocab + size.longest * 32) + 16.0 * parameters)
