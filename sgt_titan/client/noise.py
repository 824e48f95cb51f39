"""Noise that is held: the same prompt gets the same noise again, so that repeating it leaves nothing to average.

The noise of a position is a function of a secret key, of the export, and of all tokens up to it: SHAKE-256 turned into
normals. Mean and std of a position depend on the tokens up to it and on nothing else (the estimator is causal), so what
is held is the whole sample z = x + mean + std eps, and not eps alone: a position is sent again either bit for bit (up
to the rounding of a longer pass) or, when any token up to it has changed, with noise that has nothing to do with the
old one. No two values that share an eps and differ in their mean are ever sent, whose difference would show that of the
means. The export is part of the function for the same reason: another transform, or the same one in other numbers
(``weights=``), has other means.

So the shared beginning of two prompts (a conversation, sent again with every turn) keeps its noise, and nothing has to
be remembered. What it gives up:

* The server sees that two prompts begin alike, and how far. With one key for many users it sees it across them.
* An edit near the beginning draws all noise after it anew: K such edits are K samples of the rest.
* A value that occurs in many different prompts is a fresh sample in each.
* Whoever holds the key can subtract the noise from everything that was sent under it.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from sgt_titan import disk
from sgt_titan.errors import UserError
from sgt_titan.transform.gaussian import normals

KEY_BYTES = 32
KEY_VARIABLE = "SGT_TITAN_NOISE_KEY"


class HeldNoise:
    """``eps_TD(ids, mask, width)`` of one secret in one context; :meth:`forget` draws another secret.

    context: whatever else decides what is sent (the export's fingerprints): noise of two contexts is independent.
    """

    def __init__(self, secret: bytes | None = None, context: str = ""):
        self._context = context
        self._use(secrets.token_bytes(KEY_BYTES) if secret is None else secret)

    def _use(self, secret: bytes) -> None:
        self._secret = hashlib.blake2b(self._context.encode(), key=secret, digest_size=32, person=b"sgt-held").digest()

    def forget(self) -> None:
        """From here on all noise of this object is new; a key that is kept in a file stays what it is."""
        self._use(secrets.token_bytes(KEY_BYTES))

    def __call__(self, ids: Sequence[int], mask: Sequence[bool] | np.ndarray, width: int) -> torch.Tensor:
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


def held_key(file: str | os.PathLike | None = None) -> bytes:
    """The secret of held noise: of ``file`` (made if there is none), of the environment, or of this process.

    Without a file and without ``SGT_TITAN_NOISE_KEY`` (64 hexadecimal digits) it is drawn once for this process, and a
    warning says that a restart sends the same prompts with other noise. Raises UserError, without a word of the key.
    """
    if file is not None:
        return _of_file(Path(file))
    text = os.environ.get(KEY_VARIABLE)
    if text is not None:
        return _parsed(text, KEY_VARIABLE)
    warnings.warn(
        "noise is held while this process lives: after a restart the same prompt is sent with other noise, and the "
        f"server can average the two. Keep a key: noise_key=FILE, --noise-key FILE, or {KEY_VARIABLE}",
        stacklevel=4,
    )
    return _of_process()


@cache
def _of_process() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def _of_file(path: Path) -> bytes:
    if os.path.lexists(path):
        return _read(path)
    key = secrets.token_bytes(KEY_BYTES)
    try:
        disk.create(path, key.hex() + "\n")
    except FileExistsError:  # another process was faster
        return _read(path)
    except OSError as error:
        raise UserError(f"noise key {path}: cannot be made ({error.strerror})") from None
    return key


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would be waited for
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"noise key {path}: not a file")
            if os.name == "posix" and status.st_mode & 0o077:
                raise UserError(f"noise key {path}: others may read it; chmod 600 it")
            content = stream.read(1024)
    except OSError as error:
        raise UserError(f"noise key {path}: cannot be read ({error.strerror})") from None
    return _parsed(content.decode("ascii", "replace"), f"noise key {path}")


def _parsed(text: str, where: str) -> bytes:
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}", text.strip()):
        raise UserError(f"{where}: must be {2 * KEY_BYTES} hexadecimal digits; make one with `openssl rand -hex 32`")
    return bytes.fromhex(text.strip())
