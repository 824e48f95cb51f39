"""Write and read the directory that a client is handed: config.json, safetensors, tokenizer, model card.

This is where training and client meet: the training side calls :func:`write_export` with the tensors it gathered,
everything else reads the result. A directory appears whole or not at all.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgt_titan import __version__, disk
from sgt_titan.errors import UserError
from sgt_titan.transform.configuration import SGTConfig
from sgt_titan.transform.fingerprint import (
    fingerprint_config,
    fingerprint_tensor,
    fingerprint_tokenizer,
    fingerprint_weights,
)
from sgt_titan.transform.modeling import ExportedTransform, check_finite, check_shapes, expected_shapes
from sgt_titan.transform.tokenizer import check_ids_fingerprint, fingerprint_ids, load_tokenizer
from sgt_titan.trunk.tokenizer_files import (
    VOCABULARIES,
    accompanying_files,
    copy_accompanying,
    is_accompanying,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_SIZE = "5GB"
_WEIGHTS_PATTERN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def load_export(path: str | os.PathLike, **kwargs: Any) -> ExportedTransform:
    """The transform in an export directory, in evaluation mode; its configuration is ``.config``.

    ``kwargs`` go to ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``). Raises UserError, one
    line, for a directory that is not an export or whose files are damaged.
    """
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such directory; give the directory of an export")
    return ExportedTransform.from_pretrained(path, **kwargs)


def write_export(
    out_dir: str | os.PathLike,
    config: SGTConfig,
    state_dict: Mapping[str, torch.Tensor],
    *,
    tokenizer_dir: str | os.PathLike,
    summary: Mapping[str, Any],
    dtype: str | torch.dtype = "float32",
    overwrite: bool = False,
) -> Path:
    """Write an export to ``out_dir`` and return its path. ``config`` and ``state_dict`` are not changed.

    ``state_dict``: full tensors under the names and in the shapes of ``ExportedTransform`` (see modeling.py),
    any float dtype, with ``embed_tokens.weight`` exactly if ``config.embeddings``. ``tokenizer_dir``: the trunk's
    directory, for tokenizer, chat template and licence files. ``dtype``: of the stored weights, float32 or bfloat16.
    ``summary``: for the card and ``config.training``; all keys optional: ``name``, ``trunk``, ``license``, ``steps``,
    ``tokens``, ``objective`` (weights by term), ``losses`` (final values by term), ``kl`` (nats per token),
    ``agreement`` and ``nn_fr`` (fractions of 1), ``nn_fr_positions``; others are listed as they are.

    Raises UserError, before anything is written, for tensors that do not fit the configuration or are not finite, an
    ``out_dir`` in use (``overwrite`` replaces an earlier export and nothing else), a missing tokenizer or one that
    gives other ids than the one trained with, or a disk without room.
    """
    out_dir, tokenizer_dir = Path(os.path.abspath(out_dir)), Path(tokenizer_dir)
    dtype = _dtype(dtype)
    check_shapes({name: tuple(t.shape) for name, t in state_dict.items()}, expected_shapes(config), "export")
    for name, tensor in state_dict.items():
        check_finite(name, tensor, "export")
    extra_files = _files_to_copy(tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    check_ids_fingerprint(tokenizer, config, tokenizer_dir)
    check_target(out_dir, overwrite=overwrite)
    disk.require_room(out_dir, _bytes(state_dict, dtype, extra_files))

    config = copy.deepcopy(config)
    config.training = config.training or dict(summary)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state_dict.items()}
    digests = {name: fingerprint_tensor(tensor) for name, tensor in weights.items()}
    if config.embeddings:
        config.fingerprints = {**config.fingerprints, "embeddings": digests.pop("embed_tokens.weight")}
    config.fingerprints = {
        **config.fingerprints,
        "weights": fingerprint_weights(digests),
        "tokenizer": fingerprint_tokenizer(tokenizer_dir),
        "ids": fingerprint_ids(tokenizer),
        "config": fingerprint_config(config),
    }

    with disk.whole(out_dir, overwrite=overwrite) as work_dir:
        with torch.device("meta"):
            skeleton = ExportedTransform(config)
            nn.Module.to(skeleton, dtype)
        # save_original_format would rename tensors to an older layout; our names are the contract.
        skeleton.save_pretrained(work_dir, state_dict=weights, max_shard_size=SHARD_SIZE, save_original_format=False)
        copy_accompanying(tokenizer_dir, work_dir)
        (work_dir / "README.md").write_text(model_card(config, summary, _licence(tokenizer_dir)), encoding="utf-8")
    return out_dir


def check_target(out_dir: Path, *, overwrite: bool = False) -> None:
    """Raise UserError unless ``write_export`` may write here."""
    disk.check_target(out_dir, "OUT", overwrite=overwrite, earlier=_is_export, part=_is_export_file)


def _is_export(directory: Path) -> bool:
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"] == SGTConfig.model_type
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_export_file(name: str) -> bool:
    return name in ("config.json", "README.md") or _WEIGHTS_PATTERN.fullmatch(name) is not None or is_accompanying(name)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"export.dtype: {dtype!r}, must be one of {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def _files_to_copy(tokenizer_dir: Path) -> list[Path]:
    if not any((tokenizer_dir / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{tokenizer_dir}: no tokenizer there ({', '.join(VOCABULARIES)}); give the trunk's directory")
    return accompanying_files(tokenizer_dir)


def _bytes(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype, files: list[Path]) -> int:
    weights = sum(tensor.numel() for tensor in state_dict.values()) * dtype.itemsize
    return weights + sum(path.stat().st_size for path in files if path.is_file()) + (1 << 20)


def _licence(tokenizer_dir: Path) -> str | None:
    """The ``license`` (or, for licences of their own, ``license_name``) that the trunk's model card states."""
    try:
        text = (tokenizer_dir / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    stated = dict(re.findall(r"^(license(?:_name)?):[ \t]*(\S+)[ \t]*$", header[1], re.MULTILINE)) if header else {}
    value = stated.get("license_name") or stated.get("license")
    return value.strip("\"'") if value else None


def model_card(config: SGTConfig, summary: Mapping[str, Any], licence: str | None = None) -> str:
    """README.md of an export, from its configuration and the ``summary`` described at :func:`write_export`."""
    trunk = _show(summary.get("trunk") or config.trunk_config["model_type"])
    licence = summary.get("license") or licence
    paragraphs = {
        "name": _show(summary.get("name") or "sgt"),
        "trunk": trunk,
        "what": _wrap(
            "Turns token embeddings into obfuscated ones on the client: `x~ = x + mu(x) + sigma(x) * eps` (arXiv "
            f"2506.09452){_denoiser_line(config)}. The server runs the unchanged {trunk} on `x~` and is not sent the "
            f"token ids of the obfuscated positions. {_estimator_line(config)} Written by sgt_titan {__version__}."
        ),
        "inputs": "input_ids" if config.embeddings else "inputs_embeds",
        "positions": _wrap(
            "`mask` is true at the positions to obfuscate; trained on: "
            f"{'prompt' if config.obfuscate == 'prompt' else 'all'} tokens, "
            f"{'including' if config.obfuscate_template else 'without'} template and special tokens (template: "
            f"{config.template}). Positions outside the mask leave the client unchanged. Never pass a fixed seed "
            "outside tests."
        ),
        "rows": "\n".join(f"| {label} | {value} |" for label, value in _summary_rows(config, summary)),
        "prints": "\n".join(
            f"| {_show(key)} | `{_show(value)}` |" for key, value in sorted(config.fingerprints.items())
        )
        or "| none recorded | |",
        "licence": _wrap(_licence_note(trunk, licence and _show(licence), config.embeddings)),
    }
    return _CARD.format_map(paragraphs)


_CARD = """---
library_name: transformers
tags: [stained-glass-transform]
---

# {name}: a Stained Glass Transform for {trunk}

{what}

## Use

```python
from sgt_titan.transform import load_export
transform = load_export("path/to/this/directory")
embeddings = transform.transform({inputs}, mask)
```

{positions}

## What it protects, and what it does not

- Meant to make it harder to read a prompt off the embeddings that are sent. It is a learned, statistical protection:
  no cryptography, and no differential-privacy guarantee.
- **Nearest-neighbour numbers are not a security statement.** An attacker who has this transform (it is not a secret)
  can train a model to invert it, and such attacks can recover far more than nearest neighbours do. Measure with them.
- Generated tokens are always in the clear: the server produces them. So are the length of the prompt, the template
  tokens that are not obfuscated, and anything the answer repeats.
- Sending the same prompt many times with fresh noise lets the server average the noise away; the client holds its noise
  unless told otherwise (`sgt_titan.client`), `transform` here draws it anew.
- It only fits the trunk and tokenizer below.

## Training

| | |
|---|---|
{rows}

## Trunk

| fingerprint | sha256 |
|---|---|
{prints}

## Licence

{licence}
"""


def _wrap(text: str) -> str:
    return textwrap.fill(text, width=116, break_long_words=False, break_on_hyphens=False)


def _estimator_line(config: SGTConfig) -> str:
    layers, family = config.trunk_config["num_hidden_layers"], config.trunk_config["model_type"]
    bodies = "one body for mean and std" if config.body == "shared" else "one body each for mean and std"
    table = "shipped" if config.embeddings else "not shipped, bring the trunk's own"
    return (
        f"The estimator: {layers} decoder layers ({family}, width {config.hidden_size}), {bodies}; the embedding table "
        f"is {table}."
    )


def _denoiser_line(config: SGTConfig) -> str:
    return f", cleaned up by a denoiser of {config.denoiser_layers} layers" if config.denoiser_layers else ""


def _licence_note(trunk: str, licence: str | None, embeddings: bool) -> str:
    part = "contains the embedding table of" if embeddings else "was trained against"
    state = f"whose licence is stated as `{licence}`" if licence else "whose licence could not be determined here"
    return (
        f"This directory {part} {trunk}, {state}, and may be a derivative of it. The trunk's licence applies to it and "
        "to its redistribution; licence files found beside the trunk are copied here."
    )


def _summary_rows(config: SGTConfig, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the training table: the known ones always, "not measured" where absent, then whatever else is given."""
    positions = summary.get("nn_fr_positions")
    labels = {
        "steps": "Steps",
        "tokens": "Tokens, padding included",
        "objective": "Objective weights",
        "losses": "Final losses",
        "rate": "Rate: what one observation tells at most (training data)",
        "kl": "KL to the clean trunk, nats per token",
        "agreement": "Top-1 agreement with the clean trunk",
        "nn_fr": "Nearest-neighbour failure rate (probe)" + (f", {positions} positions" if positions else ""),
    }
    rows = [(label, _show(summary.get(key), percent=key in ("agreement", "nn_fr"))) for key, label in labels.items()]
    bounds = f"{config.std_min:g} to {config.std_max:g}, from {config.std_init:g} (scale {config.scale:.4g})"
    rows.append(("Range of sigma / scale", bounds))
    known = {*labels, "name", "trunk", "license", "nn_fr_positions"}
    return rows + [(str(key), _show(value)) for key, value in summary.items() if key not in known]


def _show(value: Any, *, percent: bool = False) -> str:
    if value is None or (isinstance(value, Mapping) and not value):
        return "not measured"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        # One line, and no cell border: a value must not be able to break the table.
        return " ".join(str(value).split()).replace("|", "\\|")
    if percent:
        return f"{100 * value:.1f}%"
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.4g}"
