"""How a checkpoint's ``quantization_config`` turns stored numbers into weights, and which of them are read here.

All that are read are one formula: a weight is what is stored times a scale, and elements share scales by tensor, by
row or by block. DeepSeek-V3 (technical report, section 3.3) calls the scale ``weight_scale_inv``, and multiplies by it
all the same. What a method does to activations at inference is left out: the trunk is trained against in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from sgt_titan.errors import UserError

from .files import Entry

FLOATS = ("F64", "F32", "F16", "BF16")
QUANTISED = {"F8_E4M3": "float8", "I8": "int8"}
SCALES = ("_scale_inv", "_scale")
# Of activations and caches: nothing that a weight is made of.
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
                   ".input_activation_scale", ".input_scale_ub", ".weight_shape")  # fmt: skip
_FORMATS = {"float-quantized": "F8_E4M3", "int-quantized": "I8", "naive-quantized": ""}
_KNOWN = "fp8 (by block or tensor), fbgemm_fp8, compressed-tensors (float8 and int8, symmetric)"


@dataclass(frozen=True)
class Scheme:
    """One method. dtype: as safetensors writes it, "": either. block: rows and columns of a scale, where blocks share.

    name: what the user reads of it.
    """

    name: str
    dtype: str
    block: tuple[int, int] | None = None

    def scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that the scale of a weight may have: of the tensor, of its rows, of its blocks."""
        if self.block is not None and len(shape) == 2:
            return [(ceil(shape[0] / self.block[0]), ceil(shape[1] / self.block[1]))]
        return [(), (1,), (1, 1), (shape[0],), (shape[0], 1)]


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a config.json states; None: weights are stored as they are.

    Raises:
        UserError: one that is not read here, by its name.
    """
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise UserError("trunk: config.json: quantization_config must be a JSON object")
    method = str(found.get("quant_method") or _guess(found))
    if method == "fp8" and found.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn"):
        size = found.get("weight_block_size")
        return Scheme("fp8", "F8_E4M3", _block(size) if size else None)
    if method == "fbgemm_fp8":
        return Scheme("fbgemm_fp8", "F8_E4M3")
    if method == "compressed-tensors":
        return _compressed_tensors(found)
    raise UserError(
        f"trunk: config.json: weights quantised by {method!r} are not read here ({_KNOWN} are); give the checkpoint "
        "in bfloat16, or dequantise it first"
    )


def _guess(found: dict[str, Any]) -> str:
    if found.get("load_in_8bit") or found.get("load_in_4bit"):
        return "bitsandbytes"
    return "a method without a name"


def _block(size: Any) -> tuple[int, int]:
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise UserError(f"trunk: config.json: weight_block_size is {size!r}; expected two numbers, rows and columns")
    return int(size[0]), int(size[1])


def _compressed_tensors(found: dict[str, Any]) -> Scheme:
    stored = str(found.get("format"))
    groups = [group for group in (found.get("config_groups") or {}).values() if isinstance(group, dict)]
    if stored not in _FORMATS or not groups:
        raise UserError(
            f"trunk: config.json: compressed-tensors in the format {stored!r} are not read here "
            f"({', '.join(_FORMATS)} are); give the checkpoint in bfloat16, or dequantise it first"
        )
    for key in ("sparsity_config", "transform_config"):
        inner = found.get(key)
        if inner and inner.get("format", "not dense") != "dense":
            raise UserError(f"trunk: config.json: compressed-tensors with a {key} are not read here")
    blocks = set()
    for group in groups:
        weights = group.get("weights") or {}
        shape = {key: weights.get(key) for key in ("num_bits", "strategy", "symmetric")}
        strategy = weights.get("strategy")
        if weights.get("num_bits") != 8 or strategy not in ("tensor", "channel", "block"):
            raise UserError(f"trunk: config.json: compressed-tensors with weights of {shape} are not read here")
        if not weights.get("symmetric", True):
            raise UserError("trunk: config.json: compressed-tensors with zero points are not read here")
        blocks.add(_block(weights.get("block_structure")) if strategy == "block" else None)
    if len(blocks) > 1:
        raise UserError("trunk: config.json: compressed-tensors with groups of several block sizes are not read here")
    return Scheme(f"compressed-tensors {stored}", _FORMATS[stored], blocks.pop())


def scale_name(name: str, entries: Mapping[str, Entry]) -> str | None:
    """The tensor that holds the scales of ``name``."""
    return next((name + suffix for suffix in SCALES if name + suffix in entries), None)


def weights_of(entries: Mapping[str, Entry], scheme: Scheme | None) -> dict[str, Entry]:
    """Entries that are weights of the model; scales, and what belongs to activations, left out.

    Raises:
        UserError: a stored type that is no weight's by this scheme; a scale that is missing, of the wrong shape, or
            of a weight that needs none.
    """
    if scheme is None:
        for name, entry in entries.items():
            if entry.dtype not in FLOATS and name not in _BUFFERS and not name.endswith(_INTEGER_BUFFERS):
                raise UserError(
                    f"trunk.path: {name} is stored as {QUANTISED.get(entry.dtype, entry.dtype)}, and config.json has "
                    f"no quantization_config that says how to read it; download config.json again"
                )
        return dict(entries)
    found = {}
    for name, entry in entries.items():
        if name.endswith(SCALES) and name.removesuffix("_inv").removesuffix("_scale") in entries:
            continue
        if name.endswith(_OF_ACTIVATIONS):
            continue
        scale = scale_name(name, entries)
        if entry.dtype in FLOATS:
            if scale is not None:
                raise UserError(f"trunk.path: {name} has a scale, {scale}, but is stored as {entry.dtype}")
        elif name.endswith("_zero_point"):
            raise UserError(f"trunk.path: {name}: zero points are not read here; give the checkpoint in bfloat16")
        else:
            _check_scale(name, entry, scale, entries, scheme)
        found[name] = entry
    return found


# Buffers that old checkpoints hold and no weight is made of.
_BUFFERS = ("model.embeddings.position_ids",)
_INTEGER_BUFFERS = (".attn.bias", ".attn.masked_bias")


def _check_scale(name: str, entry: Entry, scale: str | None, entries: Mapping[str, Entry], scheme: Scheme) -> None:
    if entry.dtype not in QUANTISED or scheme.dtype not in ("", entry.dtype):
        wanted = QUANTISED.get(scheme.dtype, "float8 or int8")
        raise UserError(f"trunk.path: {name} is stored as {entry.dtype}; {scheme.name} stores {wanted}")
    if scale is None:
        raise UserError(f"trunk.path: {name} is stored as {QUANTISED[entry.dtype]} and has no scale ({name}_scale)")
    shape, allowed = entries[scale].shape, scheme.scale_shapes(entry.shape)
    if shape not in allowed or entries[scale].dtype not in (*FLOATS, "F8_E8M0"):
        by = f"blocks of {scheme.block}" if scheme.block else "the tensor or its rows"
        raise UserError(f"trunk.path: {scale} is {shape}, which is not a scale of {name} {entry.shape} by {by}")
