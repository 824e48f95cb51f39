"""The before/after table of an export: what the transform costs in utility, what a nearest neighbour still reads.

Four conditions on the same held-out rows, through the client's own code path (``StainedGlassTransform.transform``, then
the trunk on ``inputs_embeds``):

    clean      the trunk on the plain embeddings
    noise      Gaussian noise of the SGT's mean std, the same everywhere and without a mean: what learning has to beat
    sgt        the export
    no prompt  what the trunk knows without the prompt: its obfuscated tokens taken out of the row, hidden from
               attention, replaced by zeros or by the best constant, whichever serves it best (a row it never saw the
               like of flatters all others: the demo trunk's perplexity is 14 with the tokens taken out, 7 hidden, 4
               zeroed, 3 with the constant)

Utility is measured on the response's tokens, which stay clean and are given (teacher forcing), privacy on the
obfuscated tokens. Legend: B batch, T sequence, D width, V vocabulary, N tokens flat.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sgt_titan.arguments import check_seed
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure.setting import load_setting
from sgt_titan.evaluation.options import ZERO_STEPS, check_zero
from sgt_titan.evaluation.scores.privacy import Leakage, leakage, statistics
from sgt_titan.evaluation.scores.utility import Utility, kept, kindest, measured, perplexity, row_nats
from sgt_titan.evaluation.world.mechanisms import constant_noise, learned, nothing
from sgt_titan.evaluation.world.samples import Sample, generator, padded
from sgt_titan.metrics.ranks import nn_failure_rate, rank_histogram_entropy, sym_ttr, token_ranks, ttr
from sgt_titan.transform import StainedGlassTransform

CAUTION = (
    "Nearest neighbour is the weakest attacker. Anyone who has the transform can make pairs of tokens and obfuscated "
    "embeddings without limit and train a model to invert it, and such an attacker can read most of a prompt that a "
    "nearest neighbour cannot read at all. These numbers are no security statement: see the export's README.md."
)
CONTINUATION_TOKENS = 64
LINE = 112


@dataclass(frozen=True)
class Condition:
    """A column of the table. Utility is over ``Summary.response_tokens``, the rest over ``obfuscated_tokens``.

    perplexity: of the response's true tokens. kept: ``utility.kept``. cross_entropy, kl: nats per token from the trunk
    on the clean prompt. agreement: share of tokens with the same most probable token. nn_fr to rank_entropy:
    ``metrics.ranks``, rates 0..1. mi: Algorithm 1, nats per feature, an upper bound; infinite without noise. None:
    nothing is sent.
    """

    perplexity: float
    kept: float
    cross_entropy: float
    kl: float
    agreement: float
    nn_fr: float | None = None
    ttr_10: float | None = None
    ttr_50: float | None = None
    sym_ttr_10: float | None = None
    sym_ttr_100: float | None = None
    rank_entropy: float | None = None
    mi: float | None = None


@dataclass(frozen=True)
class Example:
    """A prompt's obfuscated tokens, what the nearest neighbours of their embeddings read, and greedy answers."""

    prompt: str
    nearest_neighbour: str
    answer_clean: str
    answer_obfuscated: str


@dataclass(frozen=True)
class Summary:
    """Everything the table prints.

    held_out: the rows are those that training held out. rank_entropy_ceiling: what ``obfuscated_tokens`` tokens could
    reach at most. mean_std: of sigma, in units of the table's std. mean_norm: of |mu|, in units of its median row norm.
    conditions: clean, noise, sgt and no_prompt. without_prompt: perplexity of the response without the prompt, by the
    way it is removed; no_prompt is the lowest.
    """

    export: str
    trunk: str
    data: str
    held_out: bool
    samples: int
    response_tokens: int
    obfuscated_tokens: int
    mi_pairs: int
    vocab: int
    width: int
    ln_vocab: float
    rank_entropy_ceiling: float
    mean_std: float
    mean_norm: float
    conditions: dict[str, Condition]
    without_prompt: dict[str, float]
    examples: tuple[Example, ...]
    notes: tuple[str, ...]


def summarise(
    export_dir: str | Path,
    config: Config,
    *,
    samples: int = 128,
    seed: int = 0,
    examples: int = 1,
    zero_steps: int = ZERO_STEPS,
) -> Summary:
    """Measure an export on held-out rows.

    Args:
        export_dir: as ``write_export`` wrote it.
        config: from ``data_config``: the trunk it was trained for, and which rows.
        samples: held-out rows to use, at most. At least 2: MI needs pairs of rows.
        seed: of the noise. A measurement may repeat its noise; a client never does.
        examples: prompts to show in clear.
        zero_steps: of the constant that ``kept`` counts from, at most.

    Raises:
        UserError: an export, trunk or data set that is missing or damaged; an export that does not fit the trunk; no
            held-out rows, or none with a response.
    """
    if samples < 2 or examples < 0:
        raise UserError(f"--samples must be at least 2 and --examples at least 0, got {samples} and {examples}")
    check_seed(seed)
    check_zero(zero_steps)
    setting = load_setting(str(export_dir), config, rows=samples, corpus=0, zero_steps=zero_steps)
    transform, trunk, device, batches = setting.transform, setting.trunk, setting.device, setting.full_batches
    tokenizer, rows = setting.tokenizer, setting.rows
    mean_std, mean_norm = statistics(transform, trunk, batches)
    mechanisms = {"clean": nothing(), "noise": constant_noise(mean_std), "sgt": learned(transform)}
    utility, leaks = {}, {}
    for name, mechanism in mechanisms.items():
        # A generator each, so that one condition may change without the other.
        utility[name] = measured(trunk, batches, mechanism, generator(seed, device))
        leaks[name] = leakage(trunk, batches, mechanism, generator(seed, device))
    utility["no_prompt"] = kindest(setting.removed)
    rank_N, vocab = leaks["sgt"].rank_N, transform.config.vocab_size
    return Summary(
        export=str(export_dir),
        trunk=config.trunk.path,
        data=config.data.called,
        held_out=setting.held_out,
        samples=len(rows),
        response_tokens=utility["no_prompt"].nll_N.numel(),
        obfuscated_tokens=rank_N.numel(),
        mi_pairs=leaks["sgt"].pairs,
        vocab=vocab,
        width=transform.config.hidden_size,
        ln_vocab=math.log(vocab),
        rank_entropy_ceiling=rank_histogram_entropy(rank_N, vocab).ceiling,
        mean_std=mean_std / transform.config.scale,
        mean_norm=mean_norm / transform.config.median_norm,
        conditions={
            name: condition(found, kept(setting.reference, row_nats(found, batches)).value, leaks.get(name), vocab)
            for name, found in utility.items()
        },
        without_prompt=setting.reference.ways,
        examples=tuple(
            example(trunk, transform, tokenizer, row, generator(seed + 1 + i, device), device)
            for i, row in enumerate(rows[:examples])
        ),
        notes=(*setting.notes, setting.zero.note()),
    )


def condition(utility: Utility, kept: float, leakage: Leakage | None = None, vocab: int = 0) -> Condition:
    """A column."""
    shares: dict[str, Any] = {}
    if leakage is not None:
        rank_N = leakage.rank_N
        shares = {
            "nn_fr": nn_failure_rate(rank_N),
            "ttr_10": ttr(rank_N, 10),
            "ttr_50": ttr(rank_N, 50),
            "sym_ttr_10": sym_ttr(rank_N, 10, vocab),
            "sym_ttr_100": sym_ttr(rank_N, 100, vocab),
            "rank_entropy": rank_histogram_entropy(rank_N, vocab).normalised,
            "mi": leakage.mi,
        }
    return Condition(
        perplexity=perplexity(utility),
        kept=kept,
        cross_entropy=utility.cross_entropy_N.mean().item(),
        kl=(utility.cross_entropy_N - utility.teacher_entropy_N).mean().item(),
        agreement=utility.agree_N.mean().item(),
        **shares,
    )


@torch.no_grad()
def example(
    trunk: PreTrainedModel,
    transform: StainedGlassTransform,
    tokenizer: Any,
    row: Sample,
    random: torch.Generator,
    device: torch.device,
) -> Example:
    """One row up to its response: what is sent, what is read of it, and what is answered."""
    batch = padded([row.prompt()], 0, device)
    x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
    x_tilde_BTD = learned(transform).obfuscate(batch, x_BTD, random).x_tilde_BTD
    hidden_BT = batch.obfuscate_BT
    tokens_N = batch.tokens_BT[hidden_BT]
    nearest_N = token_ranks(x_tilde_BTD[hidden_BT], trunk.get_input_embeddings().weight, tokens_N).nearest_N

    def answer(embeds_BTD: torch.Tensor) -> str:
        out = trunk.generate(
            inputs_embeds=embeds_BTD.to(trunk.dtype),
            attention_mask=batch.valid_BT.long(),
            max_new_tokens=CONTINUATION_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        return tokenizer.decode(out[0], skip_special_tokens=True)

    return Example(tokenizer.decode(tokens_N), tokenizer.decode(nearest_N), answer(x_BTD), answer(x_tilde_BTD))


# -- what is printed ---------------------------------------------------------------------------------------------------

COLUMNS = {"clean": "no obfuscation", "noise": "constant noise", "sgt": "this SGT", "no_prompt": "no prompt"}


def table(summary: Summary) -> str:
    """The summary as plain text, at most ``LINE`` characters wide."""

    def percent(value: float) -> str:
        return "n/a" if math.isnan(value) else f"{100 * value:.1f}%"

    def number(value: float) -> str:
        return "unbounded" if math.isinf(value) else f"{value:.4g}"

    utility = f"Utility on the response (N = {summary.response_tokens:,} tokens)"
    privacy = f"Nearest neighbour in L2 (N = {summary.obfuscated_tokens:,} obfuscated tokens)"
    information = f"Mutual information, Algorithm 1 (N = {summary.mi_pairs:,} pairs of rows)"
    rows: tuple[tuple[str, str, Callable[[float], str]] | str, ...] = (
        utility,
        ("perplexity", "perplexity", number),
        ("prompt's benefit kept", "kept", percent),
        ("cross-entropy with clean, nats/token", "cross_entropy", number),
        ("KL to clean, nats/token", "kl", number),
        ("top-1 agreement with clean", "agreement", percent),
        privacy,
        ("fails (NN-FR = TTR-1)", "nn_fr", percent),
        ("true token not in nearest 10 (TTR-10)", "ttr_10", percent),
        ("true token not in nearest 50 (TTR-50)", "ttr_50", percent),
        ("nor in farthest 10 (SymTTR-10)", "sym_ttr_10", percent),
        ("nor in farthest 100 (SymTTR-100)", "sym_ttr_100", percent),
        (f"rank entropy (at most {percent(summary.rank_entropy_ceiling)} at this N)", "rank_entropy", percent),
        information,
        (f"nats/feature, upper bound (ln V = {summary.ln_vocab:.2f})", "mi", number),
    )
    lines = [
        f"{summary.export}, on {summary.trunk}",
        f"{summary.samples:,} {'held-out ' if summary.held_out else ''}rows of {summary.data}; V = {summary.vocab:,}, "
        f"D = {summary.width:,}",
        f"mean std {summary.mean_std:.2f} x the table's per-feature std, mean |mu| {summary.mean_norm:.2f} x its "
        "median norm",
        "",
        f"{'':<44}" + "".join(f"{title:>16}" for title in COLUMNS.values()),
    ]
    for row in rows:
        if isinstance(row, str):
            lines.append(row)
            continue
        label, field, show = row
        values = (getattr(summary.conditions[name], field) for name in COLUMNS)
        lines.append(f"  {label:<42}" + "".join(f"{'-' if v is None else show(v):>16}" for v in values))
    removed = ", ".join(f"{number(value)} {name}" for name, value in summary.without_prompt.items())
    remarks = [f"Perplexity with the prompt's tokens removed: {removed}. The column takes the lowest, as 0% kept."]
    for remark in (*remarks, *(f"Note: {note}." for note in summary.notes)):
        lines += ["", *textwrap.wrap(remark, LINE)]
    lines.append("")
    for shown in summary.examples:
        texts = {
            "prompt": shown.prompt,
            "nearest neighbour reads": shown.nearest_neighbour,
            "answer to the prompt": shown.answer_clean,
            "answer to the obfuscated prompt": shown.answer_obfuscated,
        }
        for title, text in texts.items():
            lines.append(f"{title}:")
            lines += textwrap.wrap(
                " ".join(_printable(text).split()), LINE - 4, initial_indent="    ", subsequent_indent="    "
            )
        lines.append("")
    lines += textwrap.wrap(f"Caution: {CAUTION}", LINE)
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Without control characters: a nearest neighbour may read any token, and a terminal obeys some."""
    return "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)


def as_json(summary: Summary) -> str:
    """The summary as JSON; numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(asdict(summary)) | {"caution": CAUTION}, indent=1, ensure_ascii=False)
