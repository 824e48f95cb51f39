"""How well private values are found, and what is left where they are not: text alone, no model.

A row's prompt goes through a conversation as a client sends it. A value that the data mark has *leaked* if it still
stands in what is sent (pii.py: exactly or fuzzily). The true answer stands in for that of a perfect model: with the
surrogates in place of the values, does it come back as it was?
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sgt_titan.data.marks import fold
from sgt_titan.evaluation.scores.pii import is_in, pii_ratio
from sgt_titan.metrics.interval import ratio
from sgt_titan.private import Private, Span
from sgt_titan.private.spans import settle
from sgt_titan.private.surrogates import NAMED

# Kinds of the data -> ours, where a value is marked by the application.
KINDS = {"address": "street", "city": "place", "birth_date": "date", "order": "code"}
# A data set that was redacted before holds marks instead of values: nothing is private about them.
_ALREADY = re.compile(r"<?presidio_anonymized_\w+>?|\[redacted\]", re.IGNORECASE)


class Row(NamedTuple):
    """prompt: contents of all turns before the answer. units: distinct private values in it, with kinds. group: of
    the data set's own, to report by."""

    prompt: tuple[str, ...]
    answer: str
    units: tuple[tuple[str, str], ...]
    group: str = ""


def to_row(messages: Sequence[dict[str, str]], units: Sequence[tuple[str, str]], group: str = "") -> Row:
    """Of a source's row; values that its prompt does not hold, and marks of an earlier redaction, are left out."""
    last = messages[-1]["role"] == "assistant"
    prompt = tuple(m["content"] for m in (messages[:-1] if last else messages))
    text = "\n".join(prompt)
    kept = [(unit, kind) for unit, kind in units if is_in(unit, text) and not _ALREADY.fullmatch(unit)]
    return Row(prompt, messages[-1]["content"] if last else "", tuple(kept), group)


def told(row: Row) -> dict[int, list[Span]]:
    """Marks as an application would give them that knows its values."""
    found = {}
    for i, text in enumerate(row.prompt):
        spans = [Span(*place, our_kind(unit, kind)) for unit, kind in row.units for place in places(unit, text)]
        if spans:
            found[i] = settle(spans)
    return found


def our_kind(unit: str, kind: str) -> str:
    if kind == "card" and len(unit) == 4:
        return "card_end"
    kind = KINDS.get(kind, kind)
    return kind if kind in NAMED else "text"


def places(unit: str, text: str) -> list[tuple[int, int]]:
    """Where a value stands in a text, folded."""
    folded, origin = fold(text)
    needle, found = fold(unit)[0], []
    at = folded.find(needle) if needle else -1
    while at >= 0:
        found.append((origin[at], origin[at + len(needle) - 1] + 1))
        at = folded.find(needle, at + len(needle))
    return found


def measure(rows: Sequence[Row], private: Private, *, marks: bool = False) -> dict[str, Any]:
    """recall (values of which no occurrence is left), precision (occurrences replaced that touch a marked value), both
    also by kind; pii: what is left; returned: true answers that come back exactly through surrogates, of those that
    repeat a replaced value, and values in them; groups: recall by group."""
    sent, hits, precise = [], [], []
    by_kind: dict[str, list[list[int]]] = defaultdict(lambda: [[], []])
    ours: dict[str, list[list[int]]] = defaultdict(lambda: [[], []])
    groups: dict[str, list[list[int]]] = defaultdict(lambda: [[], []])
    back, whole = [], []
    for number, row in enumerate(rows):
        talk = private.conversation(f"row {number}")
        hidden = talk.hide(row.prompt, told(row) if marks else None)
        out = "\n".join(h.text for h in hidden)
        sent.append(out)
        gone = [not is_in(unit, out) for unit, _ in row.units]
        hits.append((sum(gone), len(gone)))
        groups[row.group][0].append(sum(gone))
        groups[row.group][1].append(len(gone))
        for (_, kind), is_gone in zip(row.units, gone, strict=True):
            by_kind[kind][0].append(int(is_gone))
            by_kind[kind][1].append(1)
        good = total = 0
        for text, result in zip(row.prompt, hidden, strict=True):
            truth = [place for unit, _ in row.units for place in places(unit, text)]
            for item in result.replaced:
                right = any(item.span.start < stop and start < item.span.stop for start, stop in truth)
                ours[item.span.kind][0].append(int(right))
                ours[item.span.kind][1].append(1)
                good, total = good + right, total + 1
        precise.append((good, total))
        answer = talk.apply(row.answer)
        if answer != row.answer:
            restored = talk.restorer().feed(answer, last=True)
            whole.append(restored == row.answer)
            values = [unit for unit, _ in row.units if is_in(unit, row.answer)]
            back.append((sum(is_in(unit, restored) for unit in values), len(values)))
    texts = ["\n".join(row.prompt) for row in rows]
    return {
        "rows": len(rows),
        "recall": _ratio(hits),
        "precision": _ratio(precise),
        "recall_by_kind": _ratios(by_kind),
        "precision_by_kind": _ratios(ours),
        "pii": pii_ratio(texts, sent, [[unit for unit, _ in row.units] for row in rows]),
        "answers_back": _ratio([(int(one), 1) for one in whole]),
        "values_back": _ratio(back),
        "recall_by_group": _ratios(groups),
    }


def _ratios(counts: dict[str, list[list[int]]]) -> dict[str, Any]:
    return {name: _ratio(list(zip(*both, strict=True))) for name, both in sorted(counts.items())}


def _ratio(pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    top, bottom = (np.array([pair[i] for pair in pairs], dtype=np.float64) for i in (0, 1))
    return ratio(top, bottom, share=True).as_dict()
