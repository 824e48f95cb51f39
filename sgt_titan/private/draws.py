"""Keyed draws: all randomness of surrogates is SHAKE-256 of a key and labels, so that a draw can be made again.

The labels never contain a value. A surrogate therefore tells nothing about the value behind it even to somebody who has
the key; the key only keeps the surrogates of two conversations from being predicted and tied together.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from sgt_titan.errors import UserError

T = TypeVar("T")
KEY_BYTES = 32


class Draw:
    """A stream of uniform integers. Independent for every different sequence of labels."""

    def __init__(self, key: bytes, *labels: str):
        # Lengths first: ("ab", "c") and ("a", "bc") are different labels.
        self._seed = hashlib.shake_256(key + b"".join(_framed(label) for label in labels)).digest(KEY_BYTES)
        self._blocks, self._bytes = 0, b""

    def below(self, n: int) -> int:
        """Uniform in 0..n-1, by rejection."""
        if n < 1:
            raise ValueError(f"below({n})")
        width = max(1, (n.bit_length() + 7) // 8 + 1)
        limit = (1 << 8 * width) // n * n
        while True:
            value = int.from_bytes(self._take(width), "little")
            if value < limit:
                return value % n

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def letters(self, alphabet: str, count: int) -> str:
        return "".join(self.pick(alphabet) for _ in range(count))

    def _take(self, count: int) -> bytes:
        while len(self._bytes) < count:
            self._bytes += hashlib.shake_256(self._seed + self._blocks.to_bytes(8, "little")).digest(256)
            self._blocks += 1
        taken, self._bytes = self._bytes[:count], self._bytes[count:]
        return taken


def _framed(label: str) -> bytes:
    data = label.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def fresh_key() -> bytes:
    """A key from the operating system, for one process."""
    return os.urandom(KEY_BYTES)


def read_key(path: str | os.PathLike) -> bytes:
    """The key in a file: 64 hexadecimal digits, readable by its owner alone.

    Raises:
        UserError: no such file, readable by others, or not a key.
    """
    how = f"make one with `(umask 077; openssl rand -hex {KEY_BYTES} > {path})`"
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UserError(f"{path}: is not a file; {how}")
            if mode & 0o077:
                raise UserError(f"{path}: others may read this key (mode {mode & 0o777:o}); chmod 600 {path}")
            content = file.read(4096)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {how}") from None
    try:
        key = bytes.fromhex(content.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(f"{path}: is not a key of {2 * KEY_BYTES} hexadecimal digits; {how}")
    return key


def key_check(key: bytes, conversation: str) -> str:
    """Tells, without giving the key away, whether a saved conversation was made with it."""
    return hashlib.shake_256(key + _framed("check") + _framed(conversation)).hexdigest(16)
