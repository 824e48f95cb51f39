"""A Hugging Face checkpoint directory, read tensor by tensor: regions, checks, fingerprint.

Nothing is unpickled and nothing is loaded that was not asked for: a rank of a 70B run reads its own shards, a
client its embedding table.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sgt_titan.errors import UserError

EMBEDDING = "model.embed_tokens.weight"
FP8_BLOCK = 128  # rows and columns that share one scale in DeepSeek-V3's fp8 checkpoints
SAMPLE_BYTES = 4096
TOKENIZER = ("tokenizer", "special_tokens_map", "vocab.json", "merges.txt", "added_tokens", "chat_template")


def tokenizer_files(path: Path) -> list[Path]:
    """What a client needs to make the ids that a checkpoint was trained on."""
    return sorted(file for file in path.iterdir() if file.is_file() and file.name.startswith(TOKENIZER))


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, dtype as safetensors writes it, shape, and bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_header(file: Path) -> dict[str, Entry]:
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
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise UserError(f"{file}: not a safetensors file (its header is unreadable); download it again") from None
    expected = max((entry.end for entry in entries.values()), default=8 + length)
    if size != expected:
        raise UserError(f"{file}: {size} bytes, its header says {expected}: truncated; download it again")
    return entries


class TrunkFiles:
    """Tensors of the checkpoint in directory ``path``.

    Raises:
        UserError: no such directory, no safetensors, a shard of the index missing, a truncated file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise UserError(f"trunk.path: {self.path} has no config.json; expected a Hugging Face checkpoint directory")
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                missing = [name for name in names if not (self.path / name).is_file()]
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index}: not a safetensors index; download it again") from None
            if missing:
                raise UserError(
                    f"trunk.path: {self.path} lacks {missing[0]} ({len(missing)} of {len(names)} files missing)"
                )
            files = [self.path / name for name in names]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(f"trunk.path: {self.path} has no *.safetensors; convert the checkpoint to safetensors")
        self.entries: dict[str, Entry] = {}
        for file in files:
            self.entries |= _read_header(file)
        self._open: dict[Path, safe_open] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every expected tensor is there with its shape.

        Raises:
            UserError: the first that is not.
        """
        for name, shape in expected.items():
            if name not in self.entries:
                raise UserError(f"trunk.path: {self.path} has no tensor {name}; config.json promises {tuple(shape)}")
            if self.entries[name].shape != tuple(shape):
                found = self.entries[name].shape
                raise UserError(f"trunk.path: {self.path}: {name} is {found}, config.json promises {tuple(shape)}")

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Tensor ``name``, or a region of it with explicit bounds, in its stored dtype (fp8 blocks: float32)."""
        entry = self.entries[name]
        if entry.file not in self._open:
            try:
                self._open[entry.file] = safe_open(str(entry.file), framework="pt")
            except SafetensorError as error:
                raise UserError(f"{entry.file}: {error}") from None
        file = self._open[entry.file]
        if region is None:
            region = tuple(slice(0, n) for n in entry.shape)
        tensor = file.get_slice(name)[region] if entry.shape else file.get_tensor(name)
        scale_name = f"{name}_scale_inv"
        return tensor if scale_name not in self.entries else self._dequantise(tensor, scale_name, region)

    def _dequantise(self, tensor: torch.Tensor, scale_name: str, region: tuple[slice, ...]) -> torch.Tensor:
        """fp8 values times the scale of their 128 x 128 block (DeepSeek-V3 technical report, section 3.3)."""
        scale = self.read(scale_name).float()
        for dim, part in enumerate(region):
            scale = scale.index_select(dim, torch.arange(part.start, part.stop) // FP8_BLOCK)
        return tensor.float() * scale

    def close(self) -> None:
        """Unmap the files; reading opens them again. A process that walks a whole checkpoint else keeps it resident."""
        self._open.clear()

    def embedding_table(self) -> torch.Tensor:
        """The embedding table (V, D) in its stored dtype."""
        self.check({EMBEDDING: self.entries[EMBEDDING].shape if EMBEDDING in self else ()})
        return self.read(EMBEDDING)

    def fingerprint(self) -> str:
        """sha256 over names, dtypes, shapes and the first and last 4 KiB of every tensor.

        Reading 140 GB on each start would cost minutes; a fine-tune or a re-quantisation changes every tensor, and
        this sees it.
        """
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}|{entry.dtype}|{entry.shape}\n".encode())
            with entry.file.open("rb") as stream:
                stream.seek(entry.begin)
                digest.update(stream.read(min(SAMPLE_BYTES, entry.end - entry.begin)))
                stream.seek(max(entry.begin, entry.end - SAMPLE_BYTES))
                digest.update(stream.read(min(SAMPLE_BYTES, entry.end - entry.begin)))
        return digest.hexdigest()
