"""A secret: 32 bytes from the operating system, and every matrix that is derived from them.

The matrices are functions of (key, label), so the file stays small whatever the model, and a conversion can make them
one at a time. SHAKE-256 of key and label is the stream of random bits; 53 of them make a uniform number, and Box and
Muller's transform a normal one. Anyone with the file can undo the rotation: it is stored apart from both directories,
readable by its owner alone, and its content appears in no log, representation or error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sgt_titan import disk
from sgt_titan.errors import UserError

FORMAT = 1
KEY_BYTES = 32
BLOCK = 1 << 20  # numbers a SHAKE call makes: 16 MiB


@dataclass(frozen=True)
class Secret:
    """``key``: 32 bytes. Equal keys give equal matrices to about 1e-12 on any machine (QR in float64)."""

    key: bytes = field(repr=False)

    @classmethod
    def fresh(cls) -> Secret:
        return cls(secrets.token_bytes(KEY_BYTES))

    @property
    def name(self) -> str:
        """16 hexadecimal digits that say which secret, and nothing of it: both halves of a conversion carry them."""
        return hashlib.sha256(b"name of a secret|" + self.key).hexdigest()[:16]

    def uniform(self, label: str, count: int) -> torch.Tensor:
        """``count`` numbers in [0, 1), float64."""
        parts = []
        for start in range(0, count, BLOCK):
            size = min(BLOCK, count - start)
            bits = hashlib.shake_256(self.key + f"|{label}|{start}".encode()).digest(8 * size)
            parts.append(torch.from_numpy((np.frombuffer(bits, dtype="<u8") >> np.uint64(11)) * 2.0**-53))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def normal(self, label: str, *shape: int) -> torch.Tensor:
        """Standard normal, float64."""
        count = math.prod(shape)
        radius = (-2 * (1 - self.uniform(f"{label}|radius", count)).log()).sqrt()
        return (radius * (2 * math.pi * self.uniform(f"{label}|angle", count)).cos()).reshape(shape)

    def orthogonal(self, label: str, size: int, count: int | None = None) -> torch.Tensor:
        """Haar-distributed orthogonal matrices, (size, size) or (count, size, size) float64.

        QR of a normal matrix with R's diagonal made positive (Mezzadri, arXiv math-ph/0609050).
        """
        q, r = torch.linalg.qr(self.normal(label, *(() if count is None else (count,)), size, size))
        return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)

    def permutation(self, label: str, size: int) -> torch.Tensor:
        """(size,) int64."""
        return self.uniform(label, size).argsort()


def save(secret: Secret, path: Path) -> None:
    """Write a new file that only its owner can read.

    Raises:
        UserError: the file exists (a secret is never overwritten: the old server would become unreadable), or cannot
            be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.create(path, json.dumps({"format": FORMAT, "key": secret.key.hex()}))
    except FileExistsError:
        raise UserError(f"--secret {path}: exists; a conversion makes a new secret, choose another file") from None
    except OSError as error:
        raise UserError(f"--secret {path}: cannot be written: {error.strerror}") from None


def load(path: Path) -> Secret:
    """Read a secret.

    Raises:
        UserError: no such file, others may read it, or it is no secret of ours. The message never holds its content.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--secret {path}: cannot be read; give the file that the conversion wrote") from None
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise UserError(f"--secret {path}: others may read it (mode {stat.S_IMODE(mode):04o}); chmod 600 it")
    try:
        found = json.loads(text)
        key = bytes.fromhex(found["key"])
        if found["format"] != FORMAT or len(key) != KEY_BYTES:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--secret {path}: not a secret that this version wrote") from None
    return Secret(key)
