"""The rows an evaluation measures on: held-out samples, with their marked private spans, as padded batches.

Legend: B batch, T sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sgt_titan.config.check import validate
from sgt_titan.config.load import override, recorded
from sgt_titan.config.overrides import parse_overrides
from sgt_titan.config.resolve import resolve
from sgt_titan.config.schema import Config
from sgt_titan.config.trunk import read_trunk
from sgt_titan.data.cache import View
from sgt_titan.data.marks import texts
from sgt_titan.errors import UserError
from sgt_titan.transform import ExportedTransform, fingerprint_tensor
from sgt_titan.transform.modeling import read_config
from sgt_titan.transform.prompts import RESPONSE, obfuscation_mask
from sgt_titan.transform.trunk_files import EMBEDDING, TrunkFiles
from sgt_titan.trunk.check import check_tie

MAX_ROWS = 16  # in a batch
LOGIT_BUDGET = 1 << 27  # elements of a (B, T, V) tensor: half a gigabyte in float32


class Span(NamedTuple):
    """A marked private value of a row: tokens ``start..stop-1``, its text, and its kind where the data tell."""

    start: int
    stop: int
    text: str
    kind: str = ""


class Sample(NamedTuple):
    """One row, (T,) each. ``target``: tokens of the response whose prediction is scored. ``answer``: the response that
    followed, of a row that was cut before it."""

    ids: np.ndarray  # int64
    obfuscate: np.ndarray  # bool
    target: np.ndarray  # bool
    spans: tuple[Span, ...] = ()
    answer: np.ndarray = np.empty(0, dtype=np.int64)  # (A,)

    @property
    def marked(self) -> np.ndarray:
        """bool (T,): tokens of a marked private value."""
        marked_T = np.zeros(len(self.ids), dtype=bool)
        for span in self.spans:
            marked_T[span.start : span.stop] = True
        return marked_T

    def cut(self, stop: int) -> Sample:
        """The first ``stop`` tokens; a span that is cut through is gone."""
        spans = tuple(span for span in self.spans if span.stop <= stop)
        return Sample(self.ids[:stop], self.obfuscate[:stop], self.target[:stop], spans)

    def prompt(self) -> Sample:
        """The row up to its response: what a server sees before it answers; the response beside it."""
        begin = int(np.argmax(self.target)) if self.target.any() else len(self.ids)
        return self.cut(begin)._replace(answer=self.ids[self.target])

    def answered(self) -> Sample:
        """A prompt with its answer behind it, in clear."""
        clear = np.zeros(len(self.answer), dtype=bool)
        return Sample(
            np.concatenate([self.ids, self.answer]),
            np.concatenate([self.obfuscate, clear]),
            np.concatenate([self.target, ~clear]),
            self.spans,
        )


class Padded(NamedTuple):
    """Rows padded on the right, (B, T) each."""

    tokens_BT: torch.Tensor
    obfuscate_BT: torch.Tensor
    target_BT: torch.Tensor
    valid_BT: torch.Tensor
    marked_BT: torch.Tensor  # private values


def data_config(export_dir: str | Path, trunk_path: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Which rows to measure on, and how they are tokenized.

    An export lies beside the config.yaml of its run: where that names the same source, its options (and so its held-out
    rows and its cache) are taken. Template and positions are the export's own in any case.

    Args:
        overrides: words ``--data.key value`` and ``--training.seq_len value``.

    Raises:
        UserError: an option that is unknown, of another section or out of its range; a config.yaml that is damaged.
    """
    values = parse_overrides(list(overrides))
    for key in values:
        if not key.startswith("data.") and key != "training.seq_len":
            raise UserError(f"--{key}: does not belong to a report; --data.* and --training.seq_len do")
    asked = Config()
    asked.data.source, asked.trunk.path = source, trunk_path
    asked = resolve(asked, world_size=None)
    config = recorded(Path(export_dir).resolve().parent) or asked
    if config.data.source != asked.data.source:
        config = asked
    config.trunk.path = asked.trunk.path
    export = read_config(Path(export_dir))
    for name in ("obfuscate", "obfuscate_template", "template", "template_kwargs", "template_date"):
        setattr(config.data, name, getattr(export, name))
    limit = read_trunk(config).get("max_position_embeddings")
    if "training.seq_len" not in values and limit:
        config.training.seq_len = min(config.training.seq_len, limit)
    config = resolve(override(config, overrides), world_size=None)
    if limit and config.training.seq_len > limit:
        raise UserError(f"--training.seq_len: {config.training.seq_len} is beyond the trunk's {limit} positions")
    validate(config, None, None)
    return config


def check_fit(transform: ExportedTransform, trunk_path: str | Path, export: str) -> tuple[str, ...]:
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


def embedding_table(trunk: PreTrainedModel) -> torch.Tensor:
    """The trunk's own rows (V, D), in its type, without gradient."""
    weight: Any = trunk.get_input_embeddings().weight
    return weight.detach()


def load_trunk(path: str | Path, device: torch.device, *, embeds: bool = True) -> PreTrainedModel:
    """The frozen model, float32 on CPU and bfloat16 on GPU: the weights that training reads, and no others.

    embeds: it embeds tokens; a server in a secret basis does not, and its table is zero.

    Safetensors only, no code from the checkpoint. Quantised weights are dequantised as training does it.

    Raises:
        UserError: two answers to which files are the model, a quantisation that is not read here, a tensor that is
            missing, not expected, of another shape or holds what no weight can.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    files = TrunkFiles(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    check_tie(files.path, bool(config.tie_word_embeddings), files.entries)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    if files.scheme is None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=False, use_safetensors=True, **options
        )
        model, info = loaded  # output_loading_info
    else:
        del config.quantization_config
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
        weights = {name: files.read(name).to(dtype) for name in files.entries}
        model, info = kind.from_pretrained(None, state_dict=weights, **options)
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise UserError(f"{path}: transformers reports {problem}: {sorted(map(str, info[problem]))[:3]}")
    for name, tensor in model.named_parameters():
        if embeds or name != EMBEDDING:
            files.check_values(name, tensor.detach())
    return model.to(device).eval().requires_grad_(False)


def read_samples(view: View, config: Config, count: int, *, tokenizer: Any = None) -> list[Sample]:
    """The first ``count`` samples of a view, of every source its share.

    Args:
        tokenizer: the one they were made with, to read the private values that the data mark; None: no spans.

    Raises:
        UserError: fewer than two samples, nothing obfuscated, or no response.
    """
    if len(view) < 2:
        raise UserError(f"{config.data.called}: {len(view)} held-out rows; use more data or --data.validation_samples")
    rows = []
    for i in view.spread(count):
        ids, roles = view.tokens(i).astype(np.int64), view.roles(i)
        obfuscate = obfuscation_mask(
            roles, obfuscate=config.data.obfuscate, obfuscate_template=config.data.obfuscate_template
        )
        response = roles == RESPONSE
        # A token is scored only if something stands before it both with and without the prompt.
        before = np.cumsum(~obfuscate | response) - (~obfuscate | response)
        spans: tuple[Span, ...] = ()
        if tokenizer is not None and len(marks_M5 := view.marks(i)):
            said = texts(tokenizer, ids, roles, marks_M5[:, :4])
            spans = tuple(
                Span(int(start), int(stop), text, view.kinds[kind])
                for (start, stop, *_, kind), text in zip(marks_M5, said, strict=True)
            )
        rows.append(Sample(ids, obfuscate, response & (before > 0), spans))
    if not any(row.target.any() for row in rows):
        raise UserError(
            f"{config.data.called}: no row has a response to measure; for plain text set --data.prompt_tokens"
        )
    if not any(row.obfuscate.any() for row in rows):
        raise UserError(f"{config.data.called}: no token of these rows is obfuscated")
    return rows


def shorten(row: Sample) -> Sample:
    """The row with its obfuscated tokens taken out, except those of the response."""
    response = np.arange(len(row.ids)) >= (np.argmax(row.target) if row.target.any() else len(row.ids))
    keep = ~row.obfuscate | response
    keep[0] |= not keep.any()  # a row of nothing is no row; it has no target either
    return Sample(row.ids[keep], row.obfuscate[keep] & False, row.target[keep])


def batched(rows: Sequence[Sample], vocab: int, most: int = MAX_ROWS) -> Iterator[Sequence[Sample]]:
    """Rows in groups whose logits fit in memory, at least two a group (MI needs pairs) unless one is left over."""
    longest = max(len(row.ids) for row in rows)
    size = min(most, max(2, LOGIT_BUDGET // (longest * vocab)))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def padded(rows: Sequence[Sample], pad_id: int, device: torch.device) -> Padded:
    """Rows as tensors."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    tokens_BT = np.full(shape, pad_id, dtype=np.int64)
    flags = obfuscate_BT, target_BT, valid_BT, marked_BT = [np.zeros(shape, dtype=bool) for _ in range(4)]
    for b, row in enumerate(rows):
        here = b, slice(0, len(row.ids))
        tokens_BT[here], valid_BT[here] = row.ids, True
        obfuscate_BT[here], target_BT[here], marked_BT[here] = row.obfuscate, row.target, row.marked
    return Padded(*(torch.from_numpy(array).to(device) for array in (tokens_BT, *flags)))


def generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)
