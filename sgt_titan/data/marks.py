"""Where the private values of a row are among its tokens.

Data mark them in three ways: as text (PUPA's ``pii_units``, separated by ``||``), as a list of texts, or as spans
``{"text"}``, ``{"message", "start", "end"}`` or both (the demo corpus), which may name a ``kind``. Either way every
occurrence of the value in the prompt counts, found in the text that its tokens decode to, after NFKC and case folding:
PUPA's lists are in lower case, its prompts are not. A span whose place does not hold its text marks something else than
was meant, and a training would leave the value itself unprotected: it is refused, never guessed.

Legend: T tokens of a row, M marks.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from json.encoder import ESCAPE
from typing import Any, NamedTuple

import numpy as np

from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import PROMPT

SEPARATOR = "||"
Units = Sequence[tuple[str, str]]  # text and kind


class MarkError(UserError):
    """A mark that cannot be what was meant; ends the preparation whatever is done about other bad rows."""


class Mark(NamedTuple):
    """An occurrence of a private value: tokens ``start..stop-1`` carry it, and its text begins ``lead`` characters
    after the beginning of the first."""

    start: int
    stop: int
    lead: int
    text: str
    kind: str


def private_values(
    row: Mapping[str, Any], column: str, messages: Sequence[Mapping[str, str]] = ()
) -> list[tuple[str, str]]:
    """(text, kind) of each distinct private value that a source row marks in a column.

    Args:
        messages: the turns of the row, for spans that have a place: ``message``, by default the first of a user.

    Raises:
        MarkError: a span outside of its text, or one that does not say which text it marks.
    """
    value = row.get(column)
    if value is None:
        return []
    if isinstance(value, str):
        value = value.split(SEPARATOR)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise MarkError(f"{column!r} (field 'private') must be texts or spans, is {type(value).__name__}")
    found: dict[str, str] = {}
    for n, item in enumerate(value):
        text, kind = (item.strip(), "") if isinstance(item, str) else _of_span(item, f"{column}[{n}]", messages)
        if text:
            found[text] = kind
    return list(found.items())


def _of_span(span: Any, where: str, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """Text and kind of a span, which lies where it says."""
    if not isinstance(span, Mapping) or (span.get("text") is None and span.get("start") is None):
        raise MarkError(f"{where} (field 'private') must be a text, or a span with text, or start and end, or both")
    text, start, end, kind = span.get("text"), span.get("start"), span.get("end"), span.get("kind") or ""
    if not isinstance(text, str | None) or not isinstance(kind, str):
        raise MarkError(f"{where} (field 'private'): text and kind must be text")
    if start is None and end is None:
        return text or "", kind
    message = span.get("message")
    if message is None:
        message = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    if type(start) is not int or type(end) is not int or type(message) is not int:  # True is none either
        raise MarkError(f"{where} (field 'private'): start, end and message must be integers")
    if not 0 <= message < len(messages):
        raise MarkError(
            f"{where} (field 'private'): lies in turn {message}, but the row has turns 0 to {len(messages) - 1}"
        )
    content = messages[message]["content"]
    if not 0 <= start < end <= len(content):
        raise MarkError(
            f"{where} (field 'private'): characters {start} to {end} lie outside of the text of turn {message}, which "
            f"has {len(content)}"
        )
    if text is not None and content[start:end] != text:
        raise MarkError(
            f"{where} (field 'private'): characters {start} to {end} of turn {message} are not the text that it marks"
        )
    return content[start:end], kind


def forms(unit: str) -> tuple[str, ...]:
    """A value as texts may hold it, folded: as it is, and as JSON writes it, which is how templates print calls."""
    if unit.isascii() and not ESCAPE.search(unit):
        return (unit.lower(),) if unit else ()
    written = (unit, *(json.dumps(unit, ensure_ascii=ascii)[1:-1] for ascii in (False, True)))
    return tuple(dict.fromkeys(filter(None, (fold(text)[0] for text in written))))


def mark(
    tokenizer: Any,
    ids_T: np.ndarray,
    roles_T: np.ndarray,
    units: Units,
    *,
    text: str = "",
    spans_T2: np.ndarray | None = None,
) -> Iterator[Mark]:
    """Every occurrence of a unit in the prompt.

    A token that carries any character of a value belongs to it. What truncation cut off is not found.

    Args:
        text, spans_T2: what the tokens were made of, and where in it each starts and ends, int64 (T, 2): saves to
            tokenize it once more. The same marks are found without them.
    """
    needles = [(needle, kind) for unit, kind in units for needle in forms(unit)]
    for first, last in _prompts(roles_T):
        if not needles:
            return
        ids = ids_T[first:last].tolist()
        known = None if spans_T2 is None else _known(tokenizer, ids, text, spans_T2[first:last])
        said, *edges = known or offsets(tokenizer, ids)
        starts, ends = (edge.tolist() for edge in edges)
        folded, origin = fold(said)
        for needle, kind in needles:
            at = folded.find(needle)
            while at >= 0:
                begin, end = origin[at], origin[at + len(needle) - 1]
                # From the first token that ends after the first character to the last that starts by the last one.
                start, stop = bisect_right(ends, begin), bisect_right(starts, end)
                yield Mark(first + start, first + stop, begin - starts[start], said[begin : end + 1], kind)
                at = folded.find(needle, at + 1)


def texts(tokenizer: Any, ids_T: np.ndarray, roles_T: np.ndarray, marks_M4: np.ndarray) -> list[str]:
    """The text of marks (start, stop, lead, characters), read out of the tokens as ``mark`` read it."""
    found = {}
    for first, last in _prompts(roles_T):
        here = [m for m, (start, *_) in enumerate(marks_M4.tolist()) if first <= start < last]
        if here:
            text, starts, _ = offsets(tokenizer, ids_T[first:last].tolist())
            for m in here:
                start, _, lead, length = marks_M4[m].tolist()
                begin = int(starts[start - first]) + lead
                found[m] = text[begin : begin + length]
    return [found[m] for m in range(len(marks_M4))]


def _prompts(roles_T: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of prompt tokens, as [first, last)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], roles_T == PROMPT, [False]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def fold(text: str) -> tuple[str, Sequence[int]]:
    """The text in the form in which values are compared, and for each of its characters the one it came from."""
    if text.isascii():
        return text.lower(), range(len(text))
    pieces = [unicodedata.normalize("NFKC", c).casefold() for c in text]
    return "".join(pieces), [i for i, piece in enumerate(pieces) for _ in piece]


def offsets(tokenizer: Any, ids: Sequence[int]) -> tuple[str, np.ndarray, np.ndarray]:
    """The text of a run of tokens, and where in it each token starts and ends (int64, ascending).

    By the tokenizer's own offsets where it gives the same ids back for the text, else by decoding prefixes. Tokens that
    are parts of one character all cover it.
    """
    text = tokenizer.decode(ids)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if encoded["input_ids"] == list(ids):
        starts, ends = np.array(encoded["offset_mapping"], dtype=np.int64).T
    else:
        ends = np.array([_common(text, tokenizer.decode(ids[: n + 1])) for n in range(len(ids))], dtype=np.int64)
        ends[-1] = len(text)
        starts = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
        ends = np.maximum(ends, starts + 1)
    return text, *_gapless(starts, ends)


def _known(
    tokenizer: Any, ids: Sequence[int], text: str, spans_T2: np.ndarray
) -> tuple[str, np.ndarray, np.ndarray] | None:
    """As ``offsets``, from where the tokens are in the text they were made of; None if they decode to another one."""
    said = tokenizer.decode(ids)
    last = int(spans_T2[-1, 1])
    first = last - len(said)  # a space that the first token brought may be no part of what it decodes to
    if first < 0 or abs(first - int(spans_T2[0, 0])) > 1 or text[first:last] != said:
        return None
    starts, ends = np.maximum(spans_T2 - first, 0).T
    return said, *_gapless(starts, ends)


def _gapless(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending, and what lies between two tokens is the second's: some tokenizers trim the space off a word."""
    ends = np.maximum.accumulate(ends)
    before = np.concatenate([[0], ends[:-1]])
    return np.minimum(np.maximum.accumulate(starts), before), ends


def _common(text: str, prefix: str) -> int:
    """Length of the longest common beginning."""
    if text.startswith(prefix):
        return len(prefix)
    return next((i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b), min(len(text), len(prefix)))
