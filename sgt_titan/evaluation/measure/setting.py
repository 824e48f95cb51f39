"""An export, its trunk and rows, loaded and checked once: what every measurement of an evaluation works on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sgt_titan.config.schema import Config
from sgt_titan.data.cache import prepare
from sgt_titan.data.tokenization import check_vocabulary, load_tokenizer
from sgt_titan.errors import UserError
from sgt_titan.evaluation.options import ZERO_STEPS
from sgt_titan.evaluation.scores.utility import Reference, Utility, reference_utility, without_prompt
from sgt_titan.evaluation.scores.zero import ROWS, Zero, fitted, location, read
from sgt_titan.evaluation.world.samples import (
    Padded,
    Sample,
    batched,
    check_fit,
    load_trunk,
    padded,
    read_samples,
    shorten,
)
from sgt_titan.terminal import say
from sgt_titan.transform import ExportedTransform, load_export
from sgt_titan.transform.trunk_files import TrunkFiles


@dataclass(frozen=True)
class Setting:
    """rows: with their responses. training: rows that training used, or could have. corpus: those of them that are
    public, cut as the prompts are. held_out: training did not see ``rows``. trunk_fingerprint: of the trunk measured
    on, which may be another than the one trained on. zero_steps: of the constant that ``kept`` counts from."""

    export: str
    config: Config
    transform: ExportedTransform
    trunk: PreTrainedModel = field(repr=False)
    tokenizer: Any = field(repr=False)
    rows: Sequence[Sample] = field(repr=False)
    training: Sequence[Sample] = field(repr=False)
    corpus: Sequence[Sample] = field(repr=False)
    held_out: bool
    data_fingerprint: str
    trunk_fingerprint: str
    notes: tuple[str, ...]
    zero_steps: int = ZERO_STEPS

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @cached_property
    def prompts(self) -> list[Sample]:
        """The rows cut before their responses, those with something to hide."""
        cut = [row.prompt() for row in self.rows]
        return [row for row in cut if row.obfuscate.any()]

    @cached_property
    def zero(self) -> Zero:
        """The best prompt that says nothing; fitted at first use, unless it is in the cache."""
        return fitted(
            self.config,
            self.trunk,
            self.training,
            trunk_fingerprint=self.trunk_fingerprint,
            data_fingerprint=self.data_fingerprint,
            steps=self.zero_steps,
            say=say,
        )

    @property
    def zero_is_there(self) -> bool:
        known = read(location(self.config, self.trunk_fingerprint, self.data_fingerprint))
        return known is not None and known.done(self.zero_steps)

    @cached_property
    def removed(self) -> dict[str, Utility]:
        """What the rows' responses cost without the prompt, by the way it is taken away."""
        return without_prompt(self.trunk, self.full_batches, self.shortened, self.zero.mechanism())

    @cached_property
    def reference(self) -> Reference:
        """The 1 and the 0 of ``kept``."""
        return reference_utility(self.trunk, self.full_batches, self.removed)

    def batches(self, rows: Sequence[Sample]) -> list[Padded]:
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        return [padded(part, pad, self.device) for part in batched(rows, self.transform.config.vocab_size)]

    @cached_property
    def full_batches(self) -> list[Padded]:
        return self.batches(self.rows)

    @cached_property
    def shortened(self) -> list[Padded]:
        """The rows without their hidden prompt tokens, in the batches of ``full_batches``."""
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        return [
            padded([shorten(row) for row in part], pad, self.device)
            for part in batched(self.rows, self.transform.config.vocab_size)
        ]


def load_setting(export: str, config: Config, *, rows: int, corpus: int, zero_steps: int = ZERO_STEPS) -> Setting:
    """Load and check everything that is measured on.

    Args:
        config: from ``samples.data_config``.
        rows, corpus: how many held-out and how many public rows, at most.
        zero_steps: of the fit of ``kept``'s zero, at most.

    Raises:
        UserError: as ``samples.check_fit`` and ``samples.read_samples``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trunk_path = config.trunk.path
    transform = load_export(export)
    notes = check_fit(transform, trunk_path, export)
    tokenizer = load_tokenizer(trunk_path)
    check_vocabulary(tokenizer, transform.config.vocab_size)
    dataset = prepare(config, trunk_path, progress=True)
    held_out = transform.config.fingerprints.get("data") == dataset.fingerprint
    if not held_out:
        notes = (*notes, "these rows are not the ones its training held out; it may have been trained on some of them")
    chosen = read_samples(dataset.validation, config, rows, tokenizer=tokenizer)
    if not any(row.prompt().obfuscate.any() for row in chosen):
        raise UserError(f"{config.data.called}: no prompt of these rows has a token to hide")
    training = read_samples(dataset.train, config, max(corpus, ROWS), tokenizer=tokenizer)
    return Setting(
        export=export,
        config=config,
        transform=transform.to(device).eval(),  # type: ignore[arg-type]
        trunk=load_trunk(trunk_path, device),
        tokenizer=tokenizer,
        rows=chosen,
        training=training,
        corpus=[row.prompt() for row in training[:corpus]],
        held_out=held_out,
        data_fingerprint=dataset.fingerprint,
        trunk_fingerprint=TrunkFiles(trunk_path).fingerprint(),
        notes=notes,
        zero_steps=zero_steps,
    )


def fingerprint_export(export: str) -> str:
    """sha256 over names and contents of an export's weights and configuration."""
    digest = hashlib.sha256()
    for file in sorted(Path(export).iterdir()):
        if file.name == "config.json" or file.name.endswith((".safetensors", ".safetensors.index.json")):
            digest.update(f"\0{file.name}\0".encode())
            with file.open("rb") as stream:
                while piece := stream.read(1 << 24):
                    digest.update(piece)
    return digest.hexdigest()
