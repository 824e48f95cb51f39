"""Learned inverter: a model trained to read tokens off obfuscations that the attacker makes himself.

Anybody with the client has the SGT, can obfuscate any public text as often as he likes, and so has training pairs
without end (Song and Raghunathan, arXiv 2004.00053). The strongest attack that asks for nothing but time.

The reader is a bidirectional transformer over the prompt whose output is compared with the embedding table. It starts
as the linear map of the known-plaintext attack, so that it begins where that one ends.

Legend: B rows, T positions, N hidden tokens flat, V vocabulary, D width, H width of the reader.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from sgt_titan.evaluation.attacks.known_plaintext import Affine, fit
from sgt_titan.evaluation.attacks.own_text import OwnText, of_a_length
from sgt_titan.evaluation.attacks.sequence_reader import round_products
from sgt_titan.evaluation.world.mechanisms import KEPT_BYTES
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.evaluation.world.threat import Corpus, Cost, Curve, Guess, Observation, Seed, Size, Table, Transform

logger = logging.getLogger(__name__)

GUESSES = 10
POINTS = 8  # of the curve
FIT_ROWS = 128  # that the linear start is fitted on
HELD_ROWS = 64  # of the attacker's corpus, to see whether more training would help
RANDOM_SHARE = 0.1  # rows of uniform tokens in a batch: rare tokens are seen, too
STILL_RISING, STILL_FALLING = 0.01, 0.03  # recovery and loss over the second half of the training: said in the report
CHUNK = 1024  # tokens whose logits exist at a time when guessing


class Reader(nn.Module):
    """x~ (B, T, D) and which positions are hidden (B, T) -> an estimate of x (B, T, D) and, with it, token logits.

    logits_v = -tau / 2 ||(x_hat - e_v) / s||^2 + b_v, with s the table's per-feature std. tau and b are learned; x_hat
    is a linear map of x~ plus a correction by the transformer.
    """

    rows_VD: torch.Tensor
    half_square_V: torch.Tensor
    mean_D: torch.Tensor
    std_D: torch.Tensor

    def __init__(self, table_VD: torch.Tensor, start: Affine, *, layers: int, width: int, longest: int):
        super().__init__()
        D = table_VD.shape[1]
        scale_D = table_VD.std(0).clamp_min(1e-6 * table_VD.std())
        self.register_buffer("rows_VD", table_VD / scale_D, persistent=False)
        self.register_buffer("half_square_V", 0.5 * (table_VD / scale_D).square().sum(-1), persistent=False)
        self.start = nn.Linear(D, D)
        self.start.weight.data = (start.weight_DD.T / scale_D[:, None].double()).float()
        self.start.bias.data = ((start.to_D - start.from_D @ start.weight_DD) / scale_D).float()
        self.register_buffer("mean_D", start.from_D.float(), persistent=False)
        self.register_buffer("std_D", torch.ones(D), persistent=False)
        self.enter = nn.Linear(D, width)
        self.place = nn.Embedding(longest, width)
        self.kind = nn.Embedding(2, width)
        heads = max(1, width // 64)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        round_products(self.body)
        last = nn.Linear(width, D)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.leave = nn.Sequential(nn.LayerNorm(width), last)
        self.log_tau = nn.Parameter(torch.tensor(0.0))
        self.bias_V = nn.Parameter(torch.zeros(table_VD.shape[0]))

    def forward(self, x_BTD: torch.Tensor, hidden_BT: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        """Estimates of x in units of the table's std at the hidden positions, (N, D)."""
        place_T = torch.arange(x_BTD.shape[1], device=x_BTD.device).clamp_max(self.place.num_embeddings - 1)
        # A far tail of the input must not saturate the first layer; the linear start sees it unclipped.
        entered_BTD = ((x_BTD - self.mean_D) / self.std_D).clamp(-20, 20)
        h_BTH = self.enter(entered_BTD) + self.place(place_T) + self.kind(hidden_BT.long())
        h_BTH = self.body(h_BTH, src_key_padding_mask=~valid_BT)
        return (self.start(x_BTD) + self.leave(h_BTH))[hidden_BT]

    def logits(self, estimate_ND: torch.Tensor) -> torch.Tensor:
        """(N, V)."""
        return self.log_tau.exp() * (estimate_ND @ self.rows_VD.T - self.half_square_V) + self.bias_V


def scrambled(row: Sample, vocab: int, random: np.random.Generator) -> Sample:
    """The row with uniform tokens at its hidden positions."""
    return row._replace(ids=np.where(row.obfuscate, random.integers(0, vocab, len(row.ids)), row.ids))


def inverter(
    observation: Observation,
    transform: Transform,
    corpus: Corpus,
    table: Table,
    seed: Seed,
    *,
    layers: int = 3,
    width: int = 256,
    steps: int = 400,
    batch_rows: int = 16,
    lr: float = 1e-3,
) -> Guess:
    """Train a reader and read; a curve of recovery over its training steps, with its loss on text held out from it."""
    device = table.rows_VD.device
    own = OwnText(corpus.rows, transform.mechanism, table.rows_VD, seed.value)
    held = min(HELD_ROWS, max(1, len(corpus.rows) // 10))
    train_rows, held_rows = corpus.rows[:-held], corpus.rows[-held:]
    longest = max(max(len(row.ids) for row in corpus.rows), max(map(len, observation.hidden)))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed.value)
        reader = _begin(own, train_rows[:FIT_ROWS], layers, width, longest).to(device)
    marks = sorted({0, *(round(steps * i / POINTS) for i in range(1, POINTS + 1))})
    parameters = [p for p in reader.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    random = np.random.default_rng(seed.value)
    batches = of_a_length(train_rows, min(batch_rows, len(train_rows)), random)
    top, losses, shares, tokens = [], [], [], 0
    for step in range(steps + 1):
        if step in marks:
            reader.eval()
            held_loss, share = _held_out(reader, own, held_rows, noise=-1 - seed.value)
            top.append(_guess(reader, observation))
            losses.append(held_loss)
            shares.append(share)
            logger.info(
                "inverter: step %d of %d, held-out loss %.3f, top-1 %.1f%%", step, steps, held_loss, 100 * share
            )
            reader.train()
        if step == steps:
            break
        rows = [
            scrambled(row, len(table.rows_VD), random) if random.random() < RANDOM_SHARE else row
            for row in next(batches)
        ]
        batch, x_BTD = own.obfuscated(rows, own.noise(step + 1))
        estimate_ND = reader(x_BTD, batch.obfuscate_BT, batch.valid_BT)
        loss = nn.functional.cross_entropy(reader.logits(estimate_ND), batch.tokens_BT[batch.obfuscate_BT])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        tokens += batch.tokens_BT.numel()
    curve = Curve(
        "training steps",
        tuple(map(float, marks)),
        tuple(top_NK[:, 0] for top_NK in top),
        tuple(losses),
        "the attacker's own held-out loss, nats per token",
    )
    notes = [f"trained for {steps} steps of {batch_rows} rows; on its own held-out text it reads {shares[-1]:.1%}"]
    # The rate falls to a twentieth, which flattens the end of any curve: so the loss is compared with half-way.
    rise, fall = shares[-1] - shares[len(shares) // 2], 1 - losses[-1] / max(losses[len(losses) // 2], 1e-9)
    if rise > STILL_RISING or (fall > STILL_FALLING and shares[-1] < 0.99):
        notes.append(
            f"has not converged: in the second half its held-out recovery rose by {100 * rise:.1f} points and its loss "
            f"fell by {100 * fall:.0f}%; a longer training reads more"
        )
    spent = tokens * (6.0 * sum(p.numel() for p in parameters) + 4.0 * table.rows_VD.numel())
    return Guess(top[-1], curve, spent, tuple(notes))


def _begin(own: OwnText, rows: Sequence[Sample], layers: int, width: int, longest: int) -> Reader:
    """A reader that starts as a ridge regression on some of the attacker's own rows."""
    sent_MD, clean_MD, _ = own.pairs(rows)
    start = fit(sent_MD, clean_MD)
    reader = Reader(own.table_VD.cpu(), Affine(*(t.cpu() for t in start)), layers=layers, width=width, longest=longest)
    reader.std_D.copy_(sent_MD.std(0).clamp_min(1e-6 * own.table_VD.std()))
    # Temperature of the start: the residual's precision, so that its logits are about calibrated.
    residual = ((start(sent_MD) - clean_MD) / own.table_VD.std(0).clamp_min(1e-6 * own.table_VD.std())).square().mean()
    reader.log_tau.data.fill_(-math.log(max(residual.item(), 0.05)))
    return reader


def _rate(step: int, steps: int) -> float:
    """Warm-up over a twentieth, then a cosine to a twentieth of the rate."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def _held_out(reader: Reader, own: OwnText, rows: Sequence[Sample], noise: int) -> tuple[float, float]:
    """Loss in nats per token and top-1 on rows that the reader was not trained on."""
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(rows), 16):
        batch, x_BTD = own.obfuscated(rows[start : start + 16], noise=(abs(noise) << 20) + start)
        target_N = batch.tokens_BT[batch.obfuscate_BT]
        for estimate_CD, target_C in zip(
            reader(x_BTD, batch.obfuscate_BT, batch.valid_BT).split(CHUNK), target_N.split(CHUNK), strict=True
        ):
            logits_CV = reader.logits(estimate_CD)
            loss += nn.functional.cross_entropy(logits_CV, target_C, reduction="sum").item()
            right += int((logits_CV.argmax(-1) == target_C).sum())
            count += len(target_C)
    return loss / count, right / count


@torch.no_grad()
def _guess(reader: Reader, observation: Observation) -> torch.Tensor:
    """The ten most probable tokens at every hidden position, (N, 10) on the CPU."""
    found = []
    for x_TD, hidden_T in zip(observation.x_tilde, observation.hidden, strict=True):
        hidden_1T = hidden_T.to(x_TD.device)[None]
        estimate_ND = reader(x_TD[None].float(), hidden_1T, torch.ones_like(hidden_1T))
        found += [reader.logits(part_CD).topk(GUESSES).indices.cpu() for part_CD in estimate_ND.split(CHUNK)]
    return torch.cat(found)


def cost(
    size: Size, *, layers: int = 3, width: int = 256, steps: int = 400, batch_rows: int = 16, lr: float = 1e-3
) -> Cost:
    parameters = 12.0 * layers * width**2 + size.width**2 + 2.0 * size.width * width
    tokens = batch_rows * size.longest
    table = size.vocab * size.width
    step = tokens * (6.0 * parameters + 4.0 * table + 2.0 * (size.transform - size.estimator + size.width))
    read = 9.0 * size.tokens * 2.0 * (parameters + table)
    memory = 12.0 * tokens * size.vocab + 16.0 * parameters + 8.0 * table + 64.0 * tokens * layers * width
    memory += KEPT_BYTES * (size.transform > 0)
    return Cost(steps * step + read, memory)
