"""Which files of a folder are the model, and what their headers say. One rule for both worlds.

transformers reads ``model.safetensors`` where it exists and the shards of the index otherwise; vLLM does it the other
way round. So a folder that holds both is refused, and so is a tensor that stands in two shards: whoever trains and
whoever serves would not have the same model.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgt_titan.errors import UserError

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ADAPTER_CONFIG = "adapter_config.json"
# Bytes of an element, by safetensors' name of its type.
ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, dtype as safetensors writes it, shape, and bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return content


# -- folders -----------------------------------------------------------------------------------------------------------


def check_folder(path: str | Path, said: str = "trunk.path") -> Path:
    """``path``, a folder with a config.json.

    Raises:
        UserError: it is something else, with what would be right.
    """
    text, path = str(path), Path(path)
    if "://" in text:
        raise UserError(f"{said}: {text} is a URL; download the checkpoint (hf download OWNER/NAME --local-dir DIR) "
                        "and give its folder")  # fmt: skip
    if path.is_file():
        tool = {".gguf": f"; {_GGUF}", ".bin": "; convert its folder: sgt-titan convert-trunk"}.get(path.suffix)
        raise UserError(f"{said}: {path} is a file{tool or f'; give its folder, {path.parent}'}")
    if not path.is_dir():
        if any(letter in text for letter in "*?["):
            raise UserError(f"{said}: no directory {path}; patterns are not expanded, give one folder")
        hub = text.count("/") == 1 and not text.startswith((".", "/", "~")) and all(text.split("/"))
        hint = f"; if you mean the hub's, download it: hf download {text} --local-dir DIR" if hub else ""
        raise UserError(f"{said}: no directory {path}{hint}")
    if not (path / CONFIG).is_file():
        raise UserError(f"{said}: no config.json in {path}; {_what_it_is(path)}")
    return path


_GGUF = "sgt-titan convert-trunk FILE.gguf OUT dequantises one"


def _what_it_is(folder: Path) -> str:
    """Of a folder that is no checkpoint: what it looks like, and what to give instead."""
    snapshots = sorted((folder / "snapshots").glob("*/config.json"))
    if snapshots:
        return f"it is a folder of the hub's cache: give {snapshots[-1].parent}"
    if cached := sorted(folder.glob("models--*")):
        return f"it is the hub's cache: give a folder below {cached[0].name}/snapshots"
    if (folder / "blobs").is_dir():
        return "it is a folder of the hub's cache without a snapshot: download the model again"
    if (folder / ADAPTER_CONFIG).is_file():
        return "it is a LoRA adapter alone: merge it into its base first (sgt-titan convert-trunk --adapter)"
    if any(folder.glob("*.gguf")):
        return f"it holds GGUF files: {_GGUF}"
    if any(folder.glob("consolidated*")) and (folder / "params.json").is_file():
        return "it is a checkpoint in its maker's own format: give the Hugging Face version of it"
    return "it must be a Hugging Face checkpoint directory"


# -- weights -----------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are the model in ``folder``.

    Raises:
        UserError: none, or two answers to the question; a shard of the index that is missing.
    """
    single, index = folder / SINGLE, folder / INDEX
    if (single.is_file() or index.is_file()) and (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"trunk.path: {folder} holds weights and {ADAPTER_CONFIG}, which are two models: transformers adds the "
            "adapter to its base, vLLM does not; merge it (sgt-titan convert-trunk --adapter) or move it away"
        )
    if single.is_file() and index.is_file():
        raise UserError(
            f"trunk.path: {folder} holds {SINGLE} and {INDEX}, which are two models: transformers reads the first and "
            "vLLM the second; remove the one that is stale"
        )
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"trunk.path: no {SINGLE} and no {INDEX} in {folder}{_other_weights(folder)}")
    names = sorted(set(weight_map(index).values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"trunk.path: {folder} lacks {missing[0]} ({len(missing)} of {len(names)} files missing)")
    return [folder / name for name in names]


def holds_weights(folder: Path) -> bool:
    """Whether there are weights of any format, or an index of them."""
    return any(file.suffix in _WEIGHTS or file.name == INDEX for file in folder.iterdir())


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def _other_weights(folder: Path) -> str:
    if any(folder.glob("*.safetensors")):
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        return f", though there is {names[0]}: download the index, or give the file its name"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return "; its weights are a pickle (.bin), which can run code and is not read: sgt-titan convert-trunk"
    if any(folder.glob("*.gguf")):
        return f"; it holds GGUF files: {_GGUF}"
    if (folder / ADAPTER_CONFIG).is_file():
        return "; it holds a LoRA adapter without its base: sgt-titan convert-trunk --adapter"
    return "; download the weights"


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file of an index.

    Raises:
        UserError: it is none, or names files outside its folder.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in found.values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        plain, found = False, {}
    if not found or not plain:
        raise UserError(f"{index}: not a safetensors index; download it again")
    return found


def read_header(file: Path) -> dict[str, Entry]:
    """Entries of one file.

    Raises:
        UserError: not a safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError
            header = json.loads(stream.read(length))
        entries = {
            name: Entry(file, info["dtype"], tuple(info["shape"]), *(8 + length + o for o in info["data_offsets"]))
            for name, info in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        raise UserError(f"{file}: not a safetensors file (its header is unreadable); download it again") from None
    expected = max((entry.end for entry in entries.values()), default=8 + length)
    if size != expected:
        raise UserError(f"{file}: {size} bytes, its header says {expected}: truncated; download it again")
    for name, entry in entries.items():
        if entry.dtype in ITEMSIZE and entry.end - entry.begin != math.prod(entry.shape) * ITEMSIZE[entry.dtype]:
            raise UserError(f"{file}: {name} has not the bytes of its shape and type; download it again")
    return entries


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the model in ``folder``.

    Raises:
        UserError: as ``weight_files`` and ``read_header``; a tensor in two files, or not where the index says.
    """
    entries: dict[str, Entry] = {}
    for file in weight_files(folder):
        for name, entry in read_header(file).items():
            if name in entries:
                both = f"{entries[name].file.name} and {file.name}"
                raise UserError(f"trunk.path: {folder}: {name} is in {both}; one of the two is stale")
            entries[name] = entry
    index = folder / INDEX
    for name, said in weight_map(index).items() if index.is_file() else ():
        if name not in entries or entries[name].file.name != said:
            raise UserError(f"{index}: says {name} is in {said}, which it is not: stale; download it again")
    return entries
