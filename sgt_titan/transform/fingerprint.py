"""sha256 of what an export consists of, written at export and compared on loading.

They find a wrong file, a damaged one and one edited by hand. They are no signature: whoever can change an export can
change its fingerprints too, so take exports from where you trust, or sign the directory.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sgt_titan.errors import UserError
from sgt_titan.transform.chat_template import DATE
from sgt_titan.trunk.tokenizer_files import tokenizer_files

if TYPE_CHECKING:
    from sgt_titan.transform.configuration import SGTConfig

# The fields of config.json that decide what a client computes.
_FIELDS = (
    "trunk_config",
    "body",
    "std_min",
    "std_max",
    "std_init",
    "mean_bound",
    "scale",
    "median_norm",
    "hidden_size",
    "vocab_size",
    "embeddings",
    "obfuscate",
    "obfuscate_template",
    "template",
)
# Counted only where they are not what every export was before they existed.
_LATER_FIELDS = {"template_kwargs": {}, "template_date": DATE}


def fingerprint_tensor(tensor: torch.Tensor) -> str:
    """sha256 (hex) over dtype, shape and little-endian bytes of a tensor of any dtype and device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array = flat.view(torch.uint8).numpy()
    if sys.byteorder == "big":
        array = array.reshape(-1, tensor.element_size())[:, ::-1].copy()
    name = str(tensor.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{name} {list(tensor.shape)}\n".encode())
    digest.update(array.reshape(-1).data if array.size else b"")
    return digest.hexdigest()


def fingerprint_tokenizer(directory: str | Path) -> str:
    """sha256 (hex) over names and bytes of the tokenizer and chat template files in ``directory``."""
    digest = hashlib.sha256()
    for file in tokenizer_files(directory):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(directory).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def fingerprint_weights(digests: Mapping[str, str]) -> str:
    """sha256 (hex) over name and :func:`fingerprint_tensor` of every tensor but the embedding table."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def fingerprint_config(config: SGTConfig) -> str:
    """sha256 (hex) over the fields of config.json that decide what a client computes."""
    fields = {name: getattr(config, name) for name in _FIELDS}
    fields |= {name: value for name, old in _LATER_FIELDS.items() if (value := getattr(config, name)) != old}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def check_config_fingerprint(config: SGTConfig, directory: Path) -> None:
    """Raise UserError if config.json was changed after the export was written; earlier exports carry no fingerprint."""
    wanted = config.fingerprints.get("config")
    if wanted is not None and wanted != fingerprint_config(config):
        raise UserError(
            f"{directory}: config.json was changed after the export was written (fingerprints.config); export again"
        )


def check_weights_fingerprint(digests: Mapping[str, str], config: SGTConfig, directory: Path) -> None:
    """Raise UserError if the tensors are not those that were exported; earlier exports carry no fingerprint."""
    wanted = config.fingerprints.get("weights")
    if wanted is not None and wanted != fingerprint_weights(digests):
        raise UserError(
            f"{directory}: the weights are not those the export was written with (fingerprints.weights); "
            "copy the export again"
        )


def check_tokenizer_fingerprint(directory: Path, config: SGTConfig) -> None:
    """Raise UserError if tokenizer or chat template are not those of the export."""
    wanted = config.fingerprints.get("tokenizer")
    if wanted is not None and wanted != fingerprint_tokenizer(directory):
        raise UserError(
            f"{directory}: tokenizer or chat template are not those the transform was trained with "
            "(fingerprints.tokenizer); copy the export again"
        )
