"""Values back into a text: literals and what each becomes, in whole texts and in streams.

The literals are all forms in which a surrogate may come back (``Conversation.literals``). The leftmost, longest literal
wins, and never inside a word. A stream holds back what could still become one, as the stop scanner of the client does.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sgt_titan.private.spans import alternation, bounded

SURE = 4  # letters that are looked at before a whole beginning is compared


class Literal(NamedTuple):
    """What a form of a surrogate becomes, and of which kind it is."""

    value: str
    kind: str


class Restorer:
    """One answer's text, fed in pieces. ``restored``, ``left``: counts by kind, complete after the last piece.

    traces: what shows, in text that was not restored, that a surrogate stands there in a form nobody foresaw; by kind.
    """

    def __init__(self, literals: Mapping[str, Literal], traces: Mapping[str, str] | None = None):
        self._literals, self._traces = literals, traces or {}
        self._pattern = alternation(literals) if literals else None
        self._sorted = sorted(literals)
        self._starts = {literal[:k] for literal in literals for k in range(1, SURE + 1)}
        self._longest = max(map(len, literals), default=0)
        self._text = ""
        self._at = 0  # of _text, before which everything was shown; one character stays, to see where words begin
        self._clear: list[str] = []
        self.restored: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def feed(self, piece: str, *, last: bool = False) -> str:
        """What may be shown now."""
        if self._pattern is None:
            return piece
        self._text += piece
        shown = []
        while self._at < len(self._text):
            hold = len(self._text) if last else self._undecided()
            match = self._match(hold)
            stop = match[0] if match else hold
            shown.append(self._text[self._at : stop])
            self._clear.append(self._text[self._at : stop])
            self._at = stop
            if match is None:
                break
            value, kind = self._literals[self._text[match[0] : match[1]]]
            shown.append(value)
            self.restored[kind] += 1
            self._clear.append("\n")
            self._at = match[1]
        cut = max(self._at - 1, 0)
        self._text, self._at = self._text[cut:], self._at - cut
        if last:
            self._count_left()
        return "".join(shown)

    def _undecided(self) -> int:
        """Where the earliest end of the text begins that is the beginning of a literal, or a whole one."""
        for start in range(max(self._at, len(self._text) - self._longest), len(self._text)):
            if self._text[start : start + SURE] in self._starts and self._begins(start):
                return start
        return len(self._text)

    def _begins(self, start: int) -> bool:
        end = self._text[start:]
        at = bisect_left(self._sorted, end)
        fits = at < len(self._sorted) and self._sorted[at].startswith(end)
        return fits and (start == 0 or bounded(self._text, start, len(self._text)))

    def _match(self, hold: int) -> tuple[int, int] | None:
        """The first literal that begins before ``hold``."""
        assert self._pattern is not None  # `feed` looks for nothing then
        at = self._at
        while (found := self._pattern.search(self._text, at)) and found.start() < hold:
            # The longest alternative may end inside a word where a shorter one does not.
            for stop in range(found.end(), found.start(), -1):
                if self._text[found.start() : stop] in self._literals and bounded(self._text, found.start(), stop):
                    return found.start(), stop
            at = found.start() + 1
        return None

    def _count_left(self) -> None:
        clear = "".join(self._clear).casefold()
        for trace, kind in self._traces.items():
            if count := clear.count(trace):
                self.left[kind] += count
        self._clear.clear()


def restore(
    text: str, literals: Mapping[str, Literal], traces: Mapping[str, str] | None = None
) -> tuple[str, Restorer]:
    """The whole text at once, and the counts."""
    restorer = Restorer(literals, traces)
    return restorer.feed(text, last=True), restorer


def in_json(text: str, change: Callable[[str], str]) -> str:
    """A text with ``change`` made in it; where it is a JSON object or list, as a tool call's arguments are, in each of
    its strings and keys, so that what is put there is written as JSON writes it.

    Numbers are changed as the text they are written as, and stay numbers where the result is one.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict | list):
        return change(text)

    def walk(item: Any) -> Any:
        if isinstance(item, str):
            return in_json(item, change)
        if isinstance(item, list):
            return [walk(one) for one in item]
        if isinstance(item, dict):
            return {in_json(key, change): walk(value) for key, value in item.items()}
        if isinstance(item, int | float) and not isinstance(item, bool):
            said = change(repr(item))
            try:
                return type(item)(said)
            except ValueError:
                return said
        return item

    return json.dumps(walk(parsed), ensure_ascii=False)
