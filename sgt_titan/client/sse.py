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
        self._rest: list[bytes] = []  # of a line without an end yet; joined once, however small its pieces
        self._data: list[bytes] = []
        self._held = 0  # bytes of both

    def feed(self, chunk: bytes) -> Iterator[str]:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            line = b"".join([*self._rest, end]).rstrip(b"\r")
            self._held -= sum(map(len, self._rest))
            self._rest = []
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._held += len(line)
            elif not line and self._data:
                yield b"\n".join(self._data).decode()
                self._data, self._held = [], 0
        if rest:
            self._rest.append(rest)
            self._held += len(rest)
        if self._held > MAX_EVENT:
            raise ValueError("an event without an end")
