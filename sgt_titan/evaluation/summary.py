"""The before/after table of an export: what the transform costs in utility, what a nearest neighbour still reads.

Four conditions on the same held-out rows, through the client's own code path (``StainedGlassTransform.transform``, then
the trunk on ``inputs_embeds``):

    clean      the trunk on the plain embeddings
    noise      Gaussian noise of the SGT's mean std, the same everywhere and without a mean: what learning has to beat
    sgt        the export
    no prompt  what the trunk knows without the prompt: its obfuscated tokens taken out of the row, hidden from
               attention, or replaced by zeros, whichever serves it best (a row it never saw the like of flatters all
               others: the demo trunk's perplexity is 14 with the tokens taken out, 7 hidden, 4 zeroed)

Utility is measured on the response's tokens, which stay clean and are given (teacher forcing), privacy on the
obfuscated tokens. Legend: B batch, T sequence, D width, V vocabulary, N tokens flat.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from sgt_titan.config.load import load, parse_overrides, read_trunk, resolve
from sgt_titan.config.schema import Config
from sgt_titan.data.cache import View, prepare
from sgt_titan.data.tokenization import check_vocabulary, load_tokenizer
from sgt_titan.errors import UserError
from sgt_titan.metrics.ranks import nn_failure_rate, rank_histogram_entropy, sym_ttr, token_ranks, ttr
from sgt_titan.objectives.mutual_information import MI_OFFSET, common_positions, group_loss, shifts
from sgt_titan.objectives.utility import soft_cross_entropy
from sgt_titan.transform import StainedGlassTransform, fingerprint_tensor, load_export
from sgt_titan.transform.modeling import read_config
from sgt_titan.transform.prompts import RESPONSE, obfuscation_mask
from sgt_titan.transform.trunk_files import TrunkFiles

CAUTION = (
    "Nearest neighbour is the weakest attacker. Anyone who has the transform can make pairs of tokens and obfuscated "
    "embeddings without limit and train a model to invert it, and such an attacker can read most of a prompt that a "
    "nearest neighbour cannot read at all. These numbers are no security statement: see the export's README.md."
)
MAX_ROWS = 16  # in a batch
LOGIT_BUDGET = 1 << 27  # elements of a (B, T, V) tensor: half a gigabyte in float32
CONTINUATION_TOKENS = 64
LINE = 112


class Sample(NamedTuple):
    """One row, (T,) each. ``target``: tokens of the response whose prediction is scored."""

    ids: np.ndarray  # int64
    obfuscate: np.ndarray  # bool
    target: np.ndarray  # bool


class Padded(NamedTuple):
    """Rows padded on the right, (B, T) each."""

    tokens_BT: torch.Tensor
    obfuscate_BT: torch.Tensor
    target_BT: torch.Tensor
    valid_BT: torch.Tensor


class Obfuscated(NamedTuple):
    """Embeddings to send, and the Gaussian they were drawn from; ``log_std_BTD`` is None where there is no noise."""

    x_tilde_BTD: torch.Tensor
    center_BTD: torch.Tensor
    log_std_BTD: torch.Tensor | None


Obfuscator = Callable[[Padded, torch.Tensor], Obfuscated]


class Utility(NamedTuple):
    """Per scored token, (N,) float64 each, in the order of the rows: nats, nats, nats, and 0 or 1."""

    nll_N: torch.Tensor  # of the true token
    cross_entropy_N: torch.Tensor  # with the trunk on the clean prompt
    teacher_entropy_N: torch.Tensor
    agree_N: torch.Tensor


class Leakage(NamedTuple):
    """``rank_N`` int64 per obfuscated token; ``mi`` nats per feature, the mean over ``pairs`` pairs of rows."""

    rank_N: torch.Tensor
    mi: float
    pairs: int


@dataclass(frozen=True)
class Condition:
    """A column of the table. Utility is over ``Summary.response_tokens``, the rest over ``obfuscated_tokens``.

    perplexity: of the response's true tokens. kept: 1 with the clean prompt, 0 with no prompt, on the scale of the
    log-perplexity; below 0 where worse than none, NaN where the prompt tells the trunk nothing. cross_entropy, kl: nats
    per token from the trunk on the clean prompt. agreement: share of tokens with the same most probable token. nn_fr to
    rank_entropy: ``metrics.ranks``, rates 0..1. mi: Algorithm 1, nats per feature, an upper bound; infinite without
    noise. None: nothing is sent.
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
    trunk_path: str | Path,
    config: Config,
    *,
    samples: int = 128,
    seed: int = 0,
    examples: int = 1,
) -> Summary:
    """Measure an export on held-out rows.

    Args:
        export_dir: as ``write_export`` wrote it.
        trunk_path: directory of the trunk it was trained for.
        config: its ``data`` and ``training.seq_len`` say which rows; see ``data_config``.
        samples: held-out rows to use, at most. At least 2: MI needs pairs of rows.
        seed: of the noise. A measurement may repeat its noise; a client never does.
        examples: prompts to show in clear.

    Raises:
        UserError: an export, trunk or data set that is missing or damaged; an export that does not fit the trunk; no
            held-out rows, or none with a response.
    """
    if samples < 2 or examples < 0:
        raise UserError(f"--samples must be at least 2 and --examples at least 0, got {samples} and {examples}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = load_export(export_dir)
    notes = check_fit(transform, trunk_path, str(export_dir))
    tokenizer = load_tokenizer(str(trunk_path))
    check_vocabulary(tokenizer, transform.config.vocab_size)
    dataset = prepare(config, str(trunk_path), progress=False)
    rows = read_samples(dataset.validation, config, samples)
    held_out = transform.config.fingerprints.get("data") == dataset.fingerprint
    if not held_out:
        notes = (*notes, "these rows are not the ones its training held out; it may have been trained on some of them")

    transform, trunk = transform.to(device), load_trunk(trunk_path, device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    parts = list(batched(rows, transform.config.vocab_size))
    batches = [padded(part, pad, device) for part in parts]
    shortened = [padded([shorten(row) for row in part], pad, device) for part in parts]
    mean_std, mean_norm = statistics(transform, trunk, batches)
    # A generator each, so that one condition may change without the other.
    obfuscators = {
        "clean": unchanged,
        "noise": constant_noise(mean_std, generator(seed, device)),
        "sgt": learned(transform, generator(seed, device)),
    }
    measured = {name: measure(trunk, batches, obfuscator) for name, obfuscator in obfuscators.items()}
    removed = without_prompt(trunk, batches, shortened)
    best = min(removed.values(), key=lambda utility: utility.nll_N.mean().item())
    nats = measured["clean"][0].nll_N.mean().item(), best.nll_N.mean().item()
    rank_N, vocab = measured["sgt"][1].rank_N, transform.config.vocab_size
    return Summary(
        export=str(export_dir),
        trunk=str(trunk_path),
        data=config.data.source,
        held_out=held_out,
        samples=len(rows),
        response_tokens=best.nll_N.numel(),
        obfuscated_tokens=rank_N.numel(),
        mi_pairs=measured["sgt"][1].pairs,
        vocab=vocab,
        width=transform.config.hidden_size,
        ln_vocab=math.log(vocab),
        rank_entropy_ceiling=rank_histogram_entropy(rank_N, vocab).ceiling,
        mean_std=mean_std / transform.config.scale,
        mean_norm=mean_norm / transform.config.median_norm,
        conditions={name: condition(utility, nats, leakage, vocab) for name, (utility, leakage) in measured.items()}
        | {"no_prompt": condition(best, nats)},
        without_prompt={name: perplexity(utility) for name, utility in removed.items()},
        examples=tuple(
            example(trunk, transform, tokenizer, row, generator(seed + 1 + i, device), device)
            for i, row in enumerate(rows[:examples])
        ),
        notes=notes,
    )


# -- what is measured on -----------------------------------------------------------------------------------------------


def data_config(export_dir: str | Path, trunk_path: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Which rows to measure on, and how they are tokenized.

    An export lies beside the config.yaml of its run: where that names the same source, its options (and so its held-out
    rows and its cache) are taken. Template and positions are the export's own in any case.

    Args:
        overrides: words ``--data.key value`` and ``--training.seq_len value``.

    Raises:
        UserError: an unknown option, or one of another section; a config.yaml that is damaged.
    """
    values = parse_overrides(list(overrides))
    for key in values:
        if not key.startswith("data.") and key != "training.seq_len":
            raise UserError(f"--{key}: does not belong to a report; --data.* and --training.seq_len do")
    run_file = Path(export_dir).resolve().parent / "config.yaml"
    asked = Config()
    asked.data.source, asked.trunk.path = source, trunk_path
    asked = resolve(asked, world_size=None)
    config = load(str(run_file)) if run_file.is_file() else asked
    if config.data.source != asked.data.source:
        config = asked
    config.trunk.path = asked.trunk.path
    export = read_config(Path(export_dir))
    for name in ("obfuscate", "obfuscate_template", "template"):
        setattr(config.data, name, getattr(export, name))
    limit = read_trunk(config).get("max_position_embeddings")
    if "training.seq_len" not in values and limit:
        config.training.seq_len = min(config.training.seq_len, limit)
    for key, value in values.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    if limit and config.training.seq_len > limit:
        raise UserError(f"--training.seq_len: {config.training.seq_len} is beyond the trunk's {limit} positions")
    return resolve(config, world_size=None)


def check_fit(transform: StainedGlassTransform, trunk_path: str | Path, export: str) -> tuple[str, ...]:
    """Refuse an export of another trunk; returns remarks on what differs but can be measured.

    Raises:
        UserError: the embedding table has another shape or other values than the one trained with, or, for an export
            without a table, the trunk is not the one trained with.
    """
    config, files = transform.config, TrunkFiles(trunk_path)
    table_VD = files.embedding_table()
    if tuple(table_VD.shape) != (config.vocab_size, config.hidden_size):
        raise UserError(
            f"{export}: made for an embedding table of {(config.vocab_size, config.hidden_size)}, {files.path} has "
            f"{tuple(table_VD.shape)}; give the trunk it was trained for"
        )
    same_trunk = config.fingerprints.get("trunk") == files.fingerprint()
    if transform.embed_tokens is None:
        if not same_trunk:
            raise UserError(f"{export}: was not trained for {files.path} (their fingerprints differ); give its trunk")
        return ()
    shipped_VD = transform.embed_tokens.weight
    if fingerprint_tensor(table_VD.to(shipped_VD.dtype)) != fingerprint_tensor(shipped_VD):
        raise UserError(f"{export}: its embedding table is not that of {files.path}; give the trunk it was trained for")
    return () if same_trunk else (f"{files.path} is not the trunk it was trained for, though the table is the same",)


def load_trunk(path: str | Path, device: torch.device) -> PreTrainedModel:
    """The frozen model, float32 on CPU and bfloat16 on GPU. Safetensors only, no code from the checkpoint."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.to(device).eval().requires_grad_(False)


def read_samples(view: View, config: Config, count: int) -> list[Sample]:
    """The first ``count`` samples of a view.

    Raises:
        UserError: fewer than two samples, nothing obfuscated, or no response.
    """
    if len(view) < 2:
        raise UserError(f"{config.data.source}: {len(view)} held-out rows; use more data or --data.validation_samples")
    rows = []
    for i in range(min(count, len(view))):
        ids, roles = view.tokens(i).astype(np.int64), view.roles(i)
        obfuscate = obfuscation_mask(
            roles, obfuscate=config.data.obfuscate, obfuscate_template=config.data.obfuscate_template
        )
        response = roles == RESPONSE
        # A token is scored only if something stands before it both with and without the prompt.
        before = np.cumsum(~obfuscate | response) - (~obfuscate | response)
        rows.append(Sample(ids, obfuscate, response & (before > 0)))
    if not any(row.target.any() for row in rows):
        raise UserError(
            f"{config.data.source}: no row has a response to measure; for plain text set --data.prompt_tokens"
        )
    if not any(row.obfuscate.any() for row in rows):
        raise UserError(f"{config.data.source}: no token of these rows is obfuscated")
    return rows


def shorten(row: Sample) -> Sample:
    """The row with its obfuscated tokens taken out, except those of the response."""
    response = np.arange(len(row.ids)) >= (np.argmax(row.target) if row.target.any() else len(row.ids))
    keep = ~row.obfuscate | response
    keep[0] |= not keep.any()  # a row of nothing is no row; it has no target either
    return Sample(row.ids[keep], row.obfuscate[keep] & False, row.target[keep])


def batched(rows: Sequence[Sample], vocab: int) -> Iterator[Sequence[Sample]]:
    """Rows in groups whose logits fit in memory, at least two a group (MI needs pairs) unless one is left over."""
    longest = max(len(row.ids) for row in rows)
    size = min(MAX_ROWS, max(2, LOGIT_BUDGET // (longest * vocab)))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def padded(rows: Sequence[Sample], pad_id: int, device: torch.device) -> Padded:
    """Rows as tensors."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    tokens_BT = np.full(shape, pad_id, dtype=np.int64)
    obfuscate_BT, target_BT, valid_BT = (np.zeros(shape, dtype=bool) for _ in range(3))
    for b, row in enumerate(rows):
        here = b, slice(0, len(row.ids))
        tokens_BT[here], obfuscate_BT[here], target_BT[here], valid_BT[here] = *row, True
    return Padded(*(torch.from_numpy(array).to(device) for array in (tokens_BT, obfuscate_BT, target_BT, valid_BT)))


# -- the conditions ----------------------------------------------------------------------------------------------------


def generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def unchanged(batch: Padded, x_BTD: torch.Tensor) -> Obfuscated:
    """No obfuscation: the embeddings themselves."""
    return Obfuscated(x_BTD, x_BTD, None)


def constant_noise(std: float, random: torch.Generator) -> Obfuscator:
    """Gaussian noise of one std (embedding units) for every token and feature, and no mean."""

    def obfuscator(batch: Padded, x_BTD: torch.Tensor) -> Obfuscated:
        eps_BTD = torch.randn(x_BTD.shape, generator=random, device=x_BTD.device)
        x_tilde_BTD = torch.where(batch.obfuscate_BT[..., None], x_BTD.float() + std * eps_BTD, x_BTD.float())
        return Obfuscated(x_tilde_BTD, x_BTD, torch.full_like(x_BTD, math.log(std), dtype=torch.float32))

    return obfuscator


def learned(transform: StainedGlassTransform, random: torch.Generator) -> Obfuscator:
    """The export, called as a client calls it."""

    def obfuscator(batch: Padded, x_BTD: torch.Tensor) -> Obfuscated:
        attention_BT = batch.valid_BT.long()
        inputs = batch.tokens_BT if transform.embed_tokens is not None else x_BTD
        x_tilde_BTD = transform.transform(inputs, batch.obfuscate_BT, generator=random, attention_mask=attention_BT)
        out = transform(inputs_embeds=x_BTD, attention_mask=attention_BT)
        return Obfuscated(x_tilde_BTD, x_BTD.float() + out.mean_BTD, out.log_std_BTD)

    return obfuscator


# -- the measurements --------------------------------------------------------------------------------------------------


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
def measure(trunk: PreTrainedModel, batches: Sequence[Padded], obfuscator: Obfuscator) -> tuple[Utility, Leakage]:
    """Utility and leakage of one condition."""
    table_VD = trunk.get_input_embeddings().weight
    utility, ranks, mi, pairs = [], [], 0.0, 0
    for batch in batches:
        x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
        sent = obfuscator(batch, x_BTD)
        utility.append(compare(trunk, batch, response_logits(trunk, batch, sent.x_tilde_BTD)))
        hidden_BT = batch.obfuscate_BT
        ranks.append(token_ranks(sent.x_tilde_BTD[hidden_BT], table_VD, batch.tokens_BT[hidden_BT]).rank_N)
        if sent.log_std_BTD is not None:
            total, count = mutual_information_sum(sent, hidden_BT)
            mi, pairs = mi + total, pairs + count
    mean_mi = mi / pairs if pairs else math.inf if sent.log_std_BTD is None else math.nan
    return joined(utility), Leakage(torch.cat(ranks), mean_mi, pairs)


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


def perplexity(utility: Utility) -> float:
    return math.exp(min(utility.nll_N.mean().item(), 700.0))


def condition(utility: Utility, nats: tuple[float, float], leakage: Leakage | None = None, vocab: int = 0) -> Condition:
    """A column. ``nats``: mean negative log-likelihood of the response with the clean prompt, and without a prompt."""
    nll = utility.nll_N.mean().item()
    with_prompt, without = nats
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
        kept=(without - nll) / (without - with_prompt) if without > with_prompt else math.nan,
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
    stop = int(np.argmax(row.target)) if row.target.any() else len(row.ids)
    batch = padded([Sample(*(array[:stop] for array in row))], 0, device)
    x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
    x_tilde_BTD = learned(transform, random)(batch, x_BTD).x_tilde_BTD
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """``sgt-titan report EXPORT --trunk PATH --data SOURCE [--samples N] [--json FILE] [--data.key value ...]``.

    Raises:
        UserError: as ``summarise``; a JSON file that cannot be written.
    """
    parser = _Parser(prog="sgt-titan report", description="Print what an export costs and hides.", allow_abbrev=False)
    parser.add_argument("export", metavar="EXPORT", help="an exported directory")
    parser.add_argument("--trunk", metavar="PATH", required=True, help="directory of the trunk; demo: the shipped one")
    parser.add_argument("--data", metavar="SOURCE", required=True, help="as data.source of a config")
    parser.add_argument("--samples", type=int, default=128, help="held-out rows (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--examples", type=int, default=1, help="prompts to show in clear (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments, overrides = parser.parse_known_args(argv)
    disable_progress_bar()  # of loading weights: a moment, and in the way of a table
    config = data_config(arguments.export, arguments.trunk, arguments.data, overrides)
    summary = summarise(
        arguments.export,
        config.trunk.path,
        config,
        samples=arguments.samples,
        seed=arguments.seed,
        examples=arguments.examples,
    )
    print(table(summary))
    if arguments.json:
        try:
            arguments.json.write_text(as_json(summary) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: cannot write {arguments.json}: {error.strerror}") from error
    return 0
