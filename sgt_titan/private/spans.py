"""Spans of a text, and the one form in which texts are searched.

A span is characters ``start..stop-1`` of the text as it was given. Finders see the text in *plain form*: NFKC, without
soft hyphens and other invisible characters, so that a card number in full-width digits is one. Case stays.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sgt_titan.errors import UserError


@dataclass(frozen=True, order=True)
class Span:
    """A private value: characters ``start..stop-1``, and its kind."""

    start: int
    stop: int
    kind: str


Finder = Callable[[str], Iterable[Span]]


def plain(text: str) -> tuple[str, list[int]]:
    """The text in plain form, and for each of its characters the one of ``text`` that it came from."""
    if text.isascii():
        return text, list(range(len(text)))
    pieces = ["" if unicodedata.category(c) == "Cf" else unicodedata.normalize("NFKC", c) for c in text]
    return "".join(pieces), [i for i, piece in enumerate(pieces) for _ in piece]


def find(text: str, finders: Sequence[Finder]) -> list[Span]:
    """What the finders find in ``text``, without overlaps, in order of position."""
    searched, origin = plain(text)
    found = [span for finder in finders for span in finder(searched)]
    return settle([Span(origin[s.start], origin[s.stop - 1] + 1, s.kind) for s in found if s.stop > s.start])


def settle(spans: Iterable[Span], first: Iterable[Span] = ()) -> list[Span]:
    """Spans without overlaps, in order: ``first`` as they are, then the longest (of equals the one found first), and
    of the others what is not covered yet.

    No character that anybody found is left out.
    """
    kept, spans = sorted(first), sorted(spans, key=lambda s: s.start - s.stop)
    covered = cover(kept, max((span.stop for span in [*kept, *spans]), default=0))
    for span in spans:
        start = covered.find(0, span.start, span.stop)
        while start >= 0:
            stop = covered.find(1, start, span.stop)
            stop = span.stop if stop < 0 else stop
            kept.append(Span(start, stop, span.kind))
            start = covered.find(0, stop, span.stop)
        covered[span.start : span.stop] = b"\1" * (span.stop - span.start)
    return sorted(kept)


def cover(spans: Iterable[Span], size: int) -> bytearray:
    """1 for every character of a span."""
    covered = bytearray(size)
    for span in spans:
        covered[span.start : span.stop] = b"\1" * (span.stop - span.start)
    return covered


def check_marks(spans: Iterable[Span], text: str, where: str) -> list[Span]:
    """Marked spans in order.

    Raises:
        UserError: a span outside the text, empty, or over another.
    """
    found, before = sorted(spans), 0
    for span in found:
        if not 0 <= span.start < span.stop <= len(text):
            raise UserError(
                f"{where}: marked span {span.start}..{span.stop} is empty or outside its text of {len(text)} characters"
            )
        if span.start < before:
            raise UserError(f"{where}: marked span {span.start}..{span.stop} overlaps the one before it")
        before = span.stop
    return found


def bounded(text: str, start: int, stop: int) -> bool:
    """Whether ``start..stop`` does not cut a word: no letter or digit of the same sort goes on at either end."""
    left = start > 0 and _joined(text[start - 1], text[start])
    return not left and not (stop < len(text) and _joined(text[stop - 1], text[stop]))


def alternation(literals: Iterable[str]) -> re.Pattern[str]:
    """An expression for any of the literals, of those that fit at a place the longest.

    By their first letters: an engine tries the branches of an alternation one by one, and there may be thousands.
    """
    groups: dict[str, list[str]] = {}
    for literal in sorted(literals, key=len, reverse=True):
        groups.setdefault(literal[:3], []).append(literal[3:])
    heads = sorted(groups, key=len, reverse=True)  # whole literals of one or two letters come after all that go on
    return re.compile("|".join(f"{re.escape(head)}(?:{'|'.join(map(re.escape, groups[head]))})" for head in heads))


def _joined(a: str, b: str) -> bool:
    """Latin letters and digits form words; a letter of another script beside them begins a new one."""
    return a.isalnum() and b.isalnum() and (a < "\u0250") == (b < "\u0250") and a < "\u2e80"
