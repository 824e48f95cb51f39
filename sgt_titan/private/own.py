"""A user's own values: a YAML file of words and patterns by kind.

    words:      {name: [Ada Lovelace], project: [Blue Heron, Heron]}
    patterns:   {ticket: ['TCK-\\d+']}
    surrogates: {project: [Red Kite, White Stork]}      # to draw from; else the template of what was found

Surrogates may be given for kinds of ours as well (``first``, ``last``, ``place``, ``org``, ``domain``, ``phone`` ...).

Patterns run in the `regex` package under a limit of time, since an expression can be written that takes exponential
time: one that is slow on text made to be hard is refused when it is read, one that is slow on a real text stops the
request. Nothing is sent in either case.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex
import yaml

from sgt_titan.errors import UserError
from sgt_titan.private.spans import Span, bounded
from sgt_titan.private.surrogates import DRAWN, INNER, NAMED

LIMIT_S = 0.25
_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class Own:
    """kinds: of its own, each with the surrogates to draw from (none: coined)."""

    words: tuple[tuple[str, str], ...] = ()  # kind, word
    patterns: tuple[tuple[str, Any], ...] = field(default=(), repr=False)
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, text: str) -> Iterator[Span]:
        """Raises UserError when a pattern takes too long."""
        for kind, word in self.words:
            expression = r"\s+".join(map(re.escape, word.split()))
            for match in re.finditer(expression, text, re.IGNORECASE):
                if bounded(text, match.start(), match.end()):
                    yield Span(match.start(), match.end(), kind)
        for number, (kind, pattern) in enumerate(self.patterns):
            try:
                for match in pattern.finditer(text, timeout=LIMIT_S):
                    if match.end() > match.start():
                        yield Span(match.start(), match.end(), kind)
            except TimeoutError:
                raise UserError(
                    f"private pattern {number + 1} of kind {kind}: took over {LIMIT_S} s on this text, and nothing "
                    "is sent; write it without nested repetitions"
                ) from None


def read_own(path: str | os.PathLike) -> Own:
    """Raises UserError: unreadable, an unknown key, a kind that is none, a pattern that is bad, empty or slow."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"{path}: is not YAML in UTF-8") from None
    return make_own(content, str(path))


def make_own(content: Any, where: str) -> Own:
    """``read_own`` of what the file holds."""
    sections = ("words", "patterns", "surrogates")
    if not isinstance(content, dict) or not content or set(content) - set(sections):
        raise UserError(f"{where}: must hold {', '.join(sections)} and nothing else")
    lists = {name: _lists(content.get(name) or {}, f"{where}: {name}", drawn=name == "surrogates") for name in sections}
    named = [*lists["words"], *lists["patterns"]]
    kinds: dict[str, tuple[str, ...]] = {kind: () for kind in named if kind not in NAMED}
    for kind, items in lists["surrogates"].items():
        if kind not in kinds and kind not in DRAWN:
            raise UserError(f"{where}: surrogates.{kind}: no words and no patterns of this kind, and none of ours")
        kinds[kind] = tuple(items)
    words = [(kind, word) for kind, items in lists["words"].items() for word in items]
    patterns = [
        (kind, _compiled(expression, f"{where}: patterns.{kind}[{i}]"))
        for kind, items in lists["patterns"].items()
        for i, expression in enumerate(items)
    ]
    return Own(tuple(words), tuple(patterns), kinds)


def _lists(section: Any, where: str, *, drawn: bool) -> dict[str, list[str]]:
    if not isinstance(section, dict):
        raise UserError(f"{where}: must be kinds with lists of text")
    for kind, items in section.items():
        if not isinstance(kind, str) or not _KIND.fullmatch(kind) or (kind in INNER and not drawn):
            raise UserError(f"{where}: {kind!r} is no kind; known: {', '.join(NAMED)}; or a new one in a-z, 0-9 and _")
        if (
            not isinstance(items, list)
            or not all(isinstance(item, str) and item.strip() for item in items)
            or not items
        ):
            raise UserError(f"{where}.{kind}: must be a list of text, none of it empty")
    return section


def _compiled(expression: str, where: str) -> Any:
    try:
        pattern = regex.compile(expression)
    except regex.error as error:
        raise UserError(f"{where}: is no regular expression ({error})") from None
    try:
        if any(
            match.end() == match.start() for text in ("", "a 1") for match in pattern.finditer(text, timeout=LIMIT_S)
        ):
            raise UserError(f"{where}: matches the empty text; it would find a value everywhere")
        for text in _hard(expression):
            pattern.search(text, timeout=LIMIT_S)
    except TimeoutError:
        raise UserError(f"{where}: takes exponential time on some texts; write it without nested repetitions") from None
    return pattern


def _hard(expression: str) -> Iterator[str]:
    """Texts that nested repetitions take long over: much of what the expression names, and an end that fits nothing."""
    literals = re.findall(r"[A-Za-z0-9]", re.sub(r"\\.", "", expression))
    for unit in dict.fromkeys([*literals, "a", "0", "A", " ", "a ", "a1", "-"]):
        # With what the expression wants to see at its end, or an engine gives up before it begins.
        yield unit * 48 + "\x00" + "".join(literals)
