"""A Hugging Face checkpoint directory, read tensor by tensor: regions, scales, fingerprint.

Nothing is unpickled and nothing is loaded that was not asked for: a rank of a 70B run reads its own shards, a
client its embedding table. Which files are the model, and how they are quantised, is said in ``sgt_titan.trunk``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sgt_titan.errors import UserError
from sgt_titan.trunk.check import EMBEDDING, check_shapes
from sgt_titan.trunk.files import CONFIG, check_folder, read_entries, read_json
from sgt_titan.trunk.quantisation import scale_name, scheme_of, weights_of

SAMPLE_BYTES = 4096

# What a matrix of a language model can hold. Trained ones have a mean |w| of 0.002 to 0.3 and no entry above 30;
# numbers that were stored for a scale, and read without it, a mean of 30 to 100 and a largest of 127 or 448.
LARGEST, LARGEST_MEAN = 100.0, 4.0


class TrunkFiles:
    """Weights of the checkpoint in directory ``path``; ``entries`` holds where each lies, ``scheme`` how it is stored.

    Raises:
        UserError: no such directory, no safetensors, two answers to which files are the model, a truncated file, a
            quantisation that is not read here.
    """

    def __init__(self, path: str | Path):
        self.path = check_folder(path)
        self.scheme = scheme_of(read_json(self.path / CONFIG))
        self._stored = read_entries(self.path)  # with scales
        self.entries = weights_of(self._stored, self.scheme)
        self._open: dict[Path, safe_open] = {}
        self.bytes_read = 0  # of tensors, so far

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every expected tensor is there with its shape.

        Raises:
            UserError: the first that is not.
        """
        check_shapes(self.path, expected, self.entries)

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Tensor ``name``, or a region of it with explicit bounds, in its stored dtype; quantised: times its scales,
        float32."""
        entry = self.entries[name]
        if region is None:
            region = tuple(slice(0, n) for n in entry.shape)
        tensor = self._slice(name, region)
        if self.scheme is None or (scales := scale_name(name, self._stored)) is None:
            return tensor
        scale = self._slice(scales, tuple(slice(0, n) for n in self._stored[scales].shape)).float()
        if scale.dim() == 1 and tensor.dim() == 2 and scale.numel() > 1:
            scale = scale[:, None]
        block = self.scheme.block or entry.shape
        for dim, part in enumerate(region if scale.numel() > 1 else ()):
            if scale.shape[dim] == entry.shape[dim]:
                scale = scale.narrow(dim, part.start, part.stop - part.start)
            elif scale.shape[dim] > 1:
                scale = scale.index_select(dim, torch.arange(part.start, part.stop) // block[dim])
        return tensor.float() * scale

    def _slice(self, name: str, region: tuple[slice, ...]) -> torch.Tensor:
        entry = self._stored[name]
        if entry.file not in self._open:
            try:
                self._open[entry.file] = safe_open(str(entry.file), framework="pt")
            except SafetensorError as error:
                raise UserError(f"{entry.file}: {error}") from None
        file = self._open[entry.file]
        found = file.get_slice(name)[region] if entry.shape else file.get_tensor(name)
        self.bytes_read += found.nbytes
        return found

    def check_values(self, name: str, tensor: torch.Tensor) -> None:
        """A weight, or a part of it, is what a language model's can be.

        Raises:
            UserError: NaN or infinite values; a matrix whose entries are too large, or all zero.
        """
        if not tensor.numel():
            return
        low, high = (bound.item() for bound in tensor.aminmax())
        largest = max(-low, high)
        if not math.isfinite(largest):
            raise UserError(f"{self.path}: {name} holds NaN or infinite values; download the checkpoint again")
        if tensor.dim() < 2:
            return
        mean = torch.linalg.vector_norm(tensor, 1, dtype=torch.float32).item() / tensor.numel()
        if largest > LARGEST or mean > LARGEST_MEAN:
            raise UserError(
                f"{self.path}: {name} has entries of up to {largest:.3g}, {mean:.3g} on average, which no trained "
                "matrix has: is it quantised, and config.json without its quantization_config?"
            )
        whole = name in self.entries and tuple(tensor.shape) == self.entries[name].shape
        if largest == 0 and whole:
            raise UserError(f"{self.path}: {name} is zero everywhere; an unfinished download? Download it again")

    def close(self) -> None:
        """Unmap the files; reading opens them again. A process that walks a whole checkpoint else keeps it resident."""
        self._open.clear()

    def embedding_table(self) -> torch.Tensor:
        """The embedding table (V, D) in its stored dtype."""
        self.check({EMBEDDING: self.entries[EMBEDDING].shape if EMBEDDING in self else ()})
        table_VD = self.read(EMBEDDING)
        self.check_values(EMBEDDING, table_VD)
        return table_VD

    def fingerprint(self) -> str:
        """sha256 over names, dtypes, shapes and the first and last 4 KiB of every tensor.

        Reading 140 GB on each start would cost minutes; a fine-tune or a re-quantisation changes every tensor, and
        this sees it.
        """
        digest = hashlib.sha256()
        if self.scheme is not None:
            digest.update(f"{self.scheme}\n".encode())
        for name in sorted(self._stored):
            entry = self._stored[name]
            digest.update(f"{name}|{entry.dtype}|{entry.shape}\n".encode())
            with entry.file.open("rb") as stream:
                stream.seek(entry.begin)
                digest.update(stream.read(min(SAMPLE_BYTES, entry.end - entry.begin)))
                stream.seek(max(entry.begin, entry.end - SAMPLE_BYTES))
                digest.update(stream.read(min(SAMPLE_BYTES, entry.end - entry.begin)))
        return digest.hexdigest()
