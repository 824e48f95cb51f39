"""Noise that is held: the same prompt gets the same noise again, so that repeating it leaves nothing to average.

The noise of a position is a function of a secret of this process and of all tokens up to it: SHAKE-256 keyed with 32
bytes from the operating system, turned into normals. So the shared beginning of two prompts (a conversation, sent again
with every turn) also keeps its noise, nothing has to be remembered, and another process starts with another secret.
What it costs: the server sees that two prompts begin alike, and how far. Fresh noise hides that, and can be averaged.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import torch

from sgt_titan.transform.gaussian import normals


class HeldNoise:
    """``eps_TD(ids, mask, width)`` of one secret; :meth:`forget` draws another."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """From here on all noise is new."""
        self._secret = secrets.token_bytes(32)

    def __call__(self, ids: Sequence[int], mask: Sequence[bool], width: int) -> torch.Tensor:
        """float32 ``(T, D)``, standard normal."""
        chain, stream = self._secret, bytearray()
        size = 8 * ((width + 1) // 2)
        for token, hidden in zip(ids, mask, strict=True):
            step = int(token).to_bytes(8, "little") + bytes([bool(hidden)])
            chain = hashlib.blake2b(step + chain, key=self._secret).digest()
            stream += hashlib.shake_256(b"noise" + self._secret + chain).digest(size)
        return normals(stream, max(len(ids), 1))[:, :width]

    def __repr__(self) -> str:
        return "HeldNoise(...)"  # never the secret
