"""What is looked for, and with which key: what an application or a command line says once."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sgt_titan.errors import UserError
from sgt_titan.private.conversation import Conversation
from sgt_titan.private.detectors import DETECTORS, load_detector
from sgt_titan.private.draws import fresh_key, read_key
from sgt_titan.private.own import Own, read_own
from sgt_titan.private.patterns import find_patterns
from sgt_titan.private.spans import Finder, Span, find


def _names(argument: str) -> Finder:
    from sgt_titan.private.names import find_names, lists

    lists()  # a missing extra is told now
    return find_names


def _capitals(argument: str) -> Finder:
    from sgt_titan.private.names import find_capitals, lists

    lists()
    return find_capitals


FINDERS: dict[str, Callable[[str], Finder]] = {
    "patterns": lambda argument: find_patterns,
    "names": _names,
    "capitals": _capitals,
    **{name: partial(load_detector, name) for name in DETECTORS},
}


@dataclass(frozen=True)
class Private:
    """finders: in the order given. own: a user's words and patterns. key: 32 bytes."""

    finders: tuple[Finder, ...]
    key: bytes = field(repr=False)
    own: Own | None = field(default=None, repr=False)
    names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        finders: str | Sequence[str] = "patterns,names",
        *,
        own: str | os.PathLike | None = None,
        key_file: str | os.PathLike | None = None,
        key: bytes | None = None,
    ) -> Private:
        """
        Args:
            finders: names, by commas: patterns, names, capitals, or a detector with its model after a colon.
            own: a YAML file of words and patterns (own.py).
            key_file: see ``draws.read_key``; without one (and without ``key``) the key lasts as long as this object.

        Raises:
            UserError: an unknown or uninstalled finder, a bad file of either kind.
        """
        asked = [name.strip() for name in (finders.split(",") if isinstance(finders, str) else finders)]
        loaded = []
        for name in filter(None, asked):
            base, _, argument = name.partition(":")
            if base not in FINDERS:
                raise UserError(f"private: {base!r} is no finder; known: {', '.join(FINDERS)}")
            if argument and base not in DETECTORS:
                raise UserError(f"private: {base} takes nothing after a colon")
            loaded.append(FINDERS[base](argument))
        words = read_own(own) if own is not None else None
        if words is not None:
            loaded.append(words)
        found_key = read_key(key_file) if key_file is not None else key or fresh_key()
        return cls(tuple(loaded), found_key, words, tuple(filter(None, asked)))

    def conversation(self, name: str | None = None) -> Conversation:
        """A conversation of this name; None: one of its own."""
        name = secrets.token_hex(16) if name is None else name
        return Conversation(self.key, name, self.finders, self.own.kinds if self.own else None)

    def name_of(self, texts: Sequence[str], marks: Mapping[int, Iterable[Span]] | None = None) -> str:
        """A name made of how a conversation begins, with its values taken out: the same for every turn of it."""
        digest = hashlib.shake_256(self.key)
        for i, text in enumerate(texts):
            done = 0
            for span in sorted([*find(text, self.finders), *(marks or {}).get(i, ())]):
                digest.update(text[done : span.start].encode("utf-8", "surrogatepass") + f"\0{span.kind}\0".encode())
                done = max(done, span.stop)
            digest.update(text[done:].encode("utf-8", "surrogatepass") + b"\0\0")
        return digest.hexdigest(16)


def parse_marks(listed: Any, where: str) -> list[Span]:
    """Spans from JSON: ``[{"start": 3, "stop": 9, "kind": "name"}, ...]``. Raises UserError."""
    if not isinstance(listed, list):
        raise UserError(f"{where}: must be a list of spans")
    found = []
    for item in listed:
        if not isinstance(item, dict) or set(item) - {"start", "stop", "kind"}:
            raise UserError(f"{where}: a span is start, stop and kind")
        start, stop, kind = item.get("start"), item.get("stop"), item.get("kind", "text")
        if type(start) is not int or type(stop) is not int or not isinstance(kind, str):
            raise UserError(f"{where}: start and stop are whole numbers, kind is text")
        found.append(Span(start, stop, kind))
    return found
