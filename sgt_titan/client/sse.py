"""Server-sent events out of bytes (HTML standard, section 9.2, as far as language model servers use it)."""

from __future__ import annotations

from collections.abc import Iterator

DONE = "[DONE]"
MAX_EVENT = 1 << 24  # bytes of one event; a server that sends more without an end is broken


class EventDecoder:
    """``feed`` bytes as they arrive, get the data of every event that is complete.

    Lines end in LF or CR LF, and in nothing else: text splitters that also break at U+2028 would cut an answer that
    contains one. Raises ValueError for an event longer than ``MAX_EVENT``.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        *lines, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n")
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT:
            raise ValueError("an event without an end")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data).decode()
                self._data = []
