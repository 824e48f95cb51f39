"""What obfuscation costs the answer: the trunk's predictions of the response, against those on the clean prompt.

Measured on the response's tokens, which stay clean and are given (teacher forcing). Legend: B batch, T sequence,
D width, V vocabulary, N scored tokens flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sgt_titan.evaluation.world.mechanisms import Mechanism, Respelt, nothing
from sgt_titan.evaluation.world.samples import MAX_ROWS, Padded, Sample, padded
from sgt_titan.metrics.interval import RESAMPLES, Estimate, ratio
from sgt_titan.objectives.utility import soft_cross_entropy

CONSTANT = "replaced by the best constant"


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
    """Utility of the rows as the mechanism sends them, to the rotated trunk where they are rotated."""
    server, parts = mechanism.rotation.answer if mechanism.rotation else trunk, []
    for batch in batches:
        if mechanism.respelt is not None:
            parts.append(compare(trunk, batch, respelt_logits(trunk, batch, mechanism.respelt, random)))
            continue
        sent = mechanism.obfuscate(batch, trunk.get_input_embeddings()(batch.tokens_BT), random)
        logits_NV = response_logits(server, batch, sent.x_tilde_BTD)
        if mechanism.rewrite is not None and mechanism.restore is not None:  # values are put back
            said_N = mechanism.rewrite(batch).tokens_BT[batch.target_BT]
            logits_NV = exchanged(logits_NV, batch.tokens_BT[batch.target_BT], said_N)
        parts.append(compare(trunk, batch, logits_NV))
    return joined(parts)


@torch.no_grad()
def without_prompt(
    trunk: PreTrainedModel, batches: Sequence[Padded], shortened: Sequence[Padded], constant: Mechanism
) -> dict[str, Utility]:
    """Utility without the obfuscated tokens of the prompt, by the way they are removed.

    Args:
        shortened: the same rows after ``shorten``.
        constant: the best prompt that says nothing (``zero.Zero.mechanism``).
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
    found[CONSTANT] = measured(trunk, batches, constant, torch.Generator())
    # Some attention kernels give NaN to a token that may look at nothing.
    return {name: utility for name, utility in found.items() if utility.nll_N.isfinite().all()}


def kindest(removed: Mapping[str, Utility]) -> Utility:
    """The absence of the prompt that costs the trunk least: any other would call a habit of the trunk a gain."""
    return min(removed.values(), key=lambda utility: utility.nll_N.mean().item())


def response_logits(trunk: PreTrainedModel, batch: Padded, x_tilde_BTD: torch.Tensor) -> torch.Tensor:
    """Logits (N, V), float32, that predict the batch's targets."""
    logits_BTV = trunk(
        inputs_embeds=x_tilde_BTD.to(trunk.dtype), attention_mask=batch.valid_BT.long(), use_cache=False
    ).logits
    return logits_BTV[:, :-1][batch.target_BT[:, 1:]].float()


def exchanged(logits_NV: torch.Tensor, true_N: torch.Tensor, seen_N: torch.Tensor) -> torch.Tensor:
    """Logits with those of the true and the seen token exchanged, row by row: the answer after its values are back."""
    out_NV, at_N = logits_NV.clone(), torch.arange(len(logits_NV), device=logits_NV.device)
    out_NV[at_N, true_N], out_NV[at_N, seen_N] = logits_NV[at_N, seen_N], logits_NV[at_N, true_N]
    return out_NV


def respelt_logits(trunk: PreTrainedModel, batch: Padded, respelt: Respelt, random: torch.Generator) -> torch.Tensor:
    """Logits (N, V) of the batch's targets where its rows are sent with other text, at another length.

    A value's first token gets the probability that the whole of what stands for it comes; its other tokens come with it
    when it is put back, and are counted as those of the clean prompt.
    """
    embed = trunk.get_input_embeddings()
    found: list[torch.Tensor] = []
    clean_NV = response_logits(trunk, batch, embed(batch.tokens_BT))
    for b in range(len(batch.tokens_BT)):
        length = int(batch.valid_BT[b].sum())
        tokens_T, hidden_T, target_T = (
            part[b, :length].cpu().numpy() for part in (batch.tokens_BT, batch.obfuscate_BT, batch.target_BT)
        )
        row = Sample(tokens_T, hidden_T, target_T)
        written = respelt.written(row)
        new = padded([written.row], 0, trunk.device)
        sent = respelt.before.obfuscate(new, embed(new.tokens_BT), random)
        logits_TV = trunk(inputs_embeds=sent.x_tilde_BTD.to(trunk.dtype), use_cache=False).logits[0].float()
        logp_TV, ids_T, true = logits_TV.log_softmax(-1), new.tokens_BT[0], row.ids[row.target]
        for first, last, token in zip(written.first_N, written.last_N, true, strict=True):
            if first < 0:
                found.append(clean_NV[len(found)])
                continue
            logp_1V = exchanged(logp_TV[first - 1][None], torch.tensor([token]), ids_T[first][None])
            rest = sum(logp_TV[t - 1, ids_T[t]] for t in range(first + 1, last))
            found.append(scaled(logp_1V[0], int(token), rest) if last > first + 1 else logp_1V[0])
    return torch.stack(found) if found else clean_NV


def scaled(logp_V: torch.Tensor, token: int, by: torch.Tensor) -> torch.Tensor:
    """Log probabilities with that of one token times ``exp(by)``; the others share what it loses."""
    before, after = (torch.clamp(logp, max=-1e-6) for logp in (logp_V[token], logp_V[token] + by))
    out_V = logp_V + torch.log(-torch.expm1(after)) - torch.log(-torch.expm1(before))
    out_V[token] = after
    return out_V


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


# -- with intervals, for the report ------------------------------------------------------------------------------------

GREEDY_TOKENS = 32


class Reference(NamedTuple):
    """What every mechanism is compared with, per row: scored tokens, nats with the clean prompt, nats without it.

    ways: perplexity by the way the prompt was removed; ``without_B`` is of the lowest, which flatters nobody.
    """

    tokens_B: np.ndarray
    clean_B: np.ndarray
    without_B: np.ndarray
    ways: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """``no_prompt`` of a report. stake: nats a prompt that it is worth to its answer, Delta of the limits."""
        return {
            "perplexity": _exp(ratio(self.without_B, self.tokens_B)).as_dict(),
            "ways": self.ways,
            "stake": ratio(self.without_B - self.clean_B, np.ones_like(self.tokens_B)).as_dict(),
            "rows": {name: getattr(self, f"{name}_B").tolist() for name in ("tokens", "clean", "without")},
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Reference:
        """What ``as_dict`` wrote."""
        tokens_B, clean_B, without_B = (np.array(found["rows"][name]) for name in ("tokens", "clean", "without"))
        return cls(tokens_B, clean_B, without_B, found["ways"])


def reference_utility(trunk: PreTrainedModel, batches: Sequence[Padded], removed: Mapping[str, Utility]) -> Reference:
    """Measure the clean prompt once for all mechanisms. ``removed``: from ``without_prompt``, on the same batches."""
    best = kindest(removed)
    rows = _rows(batches)
    clean = measured(trunk, batches, nothing(), torch.Generator())
    return Reference(
        tokens_B=_sums(torch.ones_like(rows), rows, batches),
        clean_B=_sums(clean.nll_N, rows, batches),
        without_B=_sums(best.nll_N, rows, batches),
        ways={name: perplexity(utility) for name, utility in removed.items()},
    )


def measure_utility(
    trunk: PreTrainedModel,
    batches: Sequence[Padded],
    rows: Sequence[Sample],
    mechanism: Mechanism,
    random: torch.Generator,
    *,
    reference: Reference,
    clean_answers: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """``utility`` of a report as JSON values; intervals resample rows.

    perplexity: of the response's true tokens. kept: as ``kept`` below. kl, cross_entropy: nats per token from the trunk
    on the clean prompt. agreement: same most probable token, response given. greedy_agreement: the first 32 tokens of
    the greedy answers to the obfuscated and the clean prompt (``clean_answers``, to what ``compared`` finds), by
    position; an early difference changes all that follow.
    """
    values = measured(trunk, batches, mechanism, random)
    found = described(values, batches, reference)
    if clean_answers:
        given = greedy_answers(trunk, compared(rows, len(clean_answers)), mechanism, random)
        pairs = list(zip(clean_answers, given, strict=True))
        same = [sum(a == b for a, b in zip(clean, other, strict=False)) for clean, other in pairs]
        longest = [max(len(clean), len(other), 1) for clean, other in pairs]
        found["greedy_agreement"] = ratio(np.array(same), np.array(longest), share=True).as_dict()
    return found


def compared(rows: Sequence[Sample], count: int) -> list[Sample]:
    """The prompts whose greedy answers are compared: the first that hide anything."""
    return [prompt for prompt in (row.prompt() for row in rows) if prompt.obfuscate.any()][:count]


def described(values: Utility, batches: Sequence[Padded], reference: Reference) -> dict[str, Any]:
    """perplexity, kept, cross_entropy, kl and agreement as ``measure_utility`` has them."""
    row_N, tokens_B = _rows(batches), reference.tokens_B

    def mean(value_N: torch.Tensor, *, share: bool = False) -> Estimate:
        return ratio(_sums(value_N, row_N, batches), tokens_B, share=share)

    nll_B = row_nats(values, batches)
    return {
        "perplexity": _exp(ratio(nll_B, tokens_B)).as_dict(),
        "kept": kept(reference, nll_B).as_dict(),
        "cross_entropy": mean(values.cross_entropy_N).as_dict(),
        "kl": mean(values.cross_entropy_N - values.teacher_entropy_N).as_dict(),
        "agreement": mean(values.agree_N, share=True).as_dict(),
    }


def kept(reference: Reference, nll_B: np.ndarray) -> Estimate:
    """How much of what the prompt is worth to its answer is left, resampled by rows. The one definition there is:

        (nats without prompt - nats) / (nats without prompt - nats with the clean prompt)

    1 with the clean prompt, 0 with none, below 0 where worse than none, NaN where the prompt tells the trunk nothing.
    "Without" is the kindest to the trunk of four ways: taken out, hidden from attention, zeroed, and replaced by the
    best constant (``zero.py``).
    """
    gain_B, worth_B = reference.without_B - nll_B, reference.without_B - reference.clean_B
    tokens = round(float(reference.tokens_B.sum()))
    if worth_B.sum() <= 0:
        return Estimate(math.nan, math.nan, math.nan, tokens)
    picks = np.random.default_rng(0).integers(0, len(gain_B), (RESAMPLES, len(gain_B)))
    worth = worth_B[picks].sum(1)
    draws = gain_B[picks].sum(1)[worth > 0] / worth[worth > 0]
    low, high = np.quantile(draws, (0.025, 0.975))
    value = float(gain_B.sum() / worth_B.sum())
    return Estimate(value, float(min(low, value)), float(max(high, value)), tokens)


def greedy(
    trunk: PreTrainedModel, prompt: Sample, mechanism: Mechanism, random: torch.Generator, tokens: int = GREEDY_TOKENS
) -> list[int]:
    """The greedy answer to one prompt as the mechanism sends it, up to and without the end token."""
    return greedy_answers(trunk, [prompt], mechanism, random, tokens)[0]


@torch.no_grad()
def greedy_answers(
    trunk: PreTrainedModel,
    prompts: Sequence[Sample],
    mechanism: Mechanism,
    random: torch.Generator,
    tokens: int = GREEDY_TOKENS,
) -> list[list[int]]:
    """The greedy answers to some prompts, several generated side by side: a step of one is too small."""
    ends = trunk.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    generate: Any = trunk.generate
    found: list[list[int]] = []
    for start in range(0, len(prompts), MAX_ROWS):
        sent = []
        for prompt in prompts[start : start + MAX_ROWS]:
            row, door = (prompt, mechanism) if (r := mechanism.respelt) is None else (r.written(prompt).row, r.before)
            batch = padded([row], 0, trunk.device)
            x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
            sent.append(door.obfuscate(batch, x_BTD, random).x_tilde_BTD[0].to(trunk.dtype))
        yes = [torch.ones(len(x_TD), dtype=torch.int64, device=x_TD.device) for x_TD in sent]
        outs = generate(
            inputs_embeds=pad_sequence(sent, batch_first=True, padding_side="left"),
            attention_mask=pad_sequence(yes, batch_first=True, padding_side="left"),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=next(iter(ends)) if None not in ends else 0,
        ).tolist()
        found += [out[: next((i for i, token in enumerate(out) if token in ends), len(out))] for out in outs]
    if mechanism.restore is None:
        return found
    return [mechanism.restore(prompt, out) for prompt, out in zip(prompts, found, strict=True)]


def answers(
    trunk: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sample],
    mechanisms: Sequence[Mechanism],
    random: torch.Generator,
) -> list[list[str]]:
    """Greedy answers as text, for every mechanism and prompt."""
    return [
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in greedy_answers(trunk, prompts, m, random, 64)]
        for m in mechanisms
    ]


def row_nats(utility: Utility, batches: Sequence[Padded]) -> np.ndarray:
    """Nats of each row's scored tokens, what ``kept`` takes."""
    return _sums(utility.nll_N, _rows(batches), batches)


def _rows(batches: Sequence[Padded]) -> torch.Tensor:
    """Row of every scored token, int64 (N,), in the order of ``Utility``."""
    found, first = [], 0
    for batch in batches:
        found.append(first + batch.target_BT[:, 1:].nonzero()[:, 0])
        first += len(batch.target_BT)
    return torch.cat(found)


def _sums(value_N: torch.Tensor, row_N: torch.Tensor, batches: Sequence[Padded]) -> np.ndarray:
    """Sum of a value over each row's scored tokens."""
    total_B = torch.zeros(sum(len(batch.target_BT) for batch in batches), dtype=torch.float64, device=value_N.device)
    return total_B.index_add_(0, row_N, value_N.double()).cpu().numpy()


def _exp(nats: Estimate) -> Estimate:
    value, low, high = (math.exp(min(v, 700.0)) for v in (nats.value, nats.low, nats.high))
    return Estimate(value, low, high, nats.n)
