"""Where the private values of a row are among its tokens.

Sources mark them in two ways: PUPA lists them as text (``pii_units``, separated by ``||``), the demo corpus as spans.
Either way every occurrence in the prompt counts, found in the text that its tokens decode to, after NFKC and case
folding: PUPA's lists are in lower case, its prompts are not.

Legend: T tokens of a row.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from sgt_titan.transform.prompts import PROMPT

SEPARATOR = "||"
Units = Sequence[tuple[str, str]]  # text and kind


def private_values(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(text, kind) of each distinct private value that a source row marks."""
    found: dict[str, str] = {}
    if isinstance(row.get("pii_units"), str):
        found |= {unit.strip(): "" for unit in row["pii_units"].split(SEPARATOR) if unit.strip()}
    if isinstance(row.get("spans"), list):
        found |= {span["text"]: span.get("kind", "") for span in row["spans"] if span.get("text")}
    return list(found.items())


def mark(tokenizer: Any, ids_T: np.ndarray, roles_T: np.ndarray, units: Units) -> Iterator[tuple[int, int, str, str]]:
    """(start, stop, text, kind) for every occurrence of a unit in the prompt; tokens ``start..stop-1`` carry it.

    A token that carries any character of a value belongs to it. What truncation cut off is not found.
    """
    for is_prompt, run in groupby(range(len(ids_T)), key=lambda t: roles_T[t] == PROMPT):
        if not is_prompt:
            continue
        positions = list(run)
        text, starts, ends = offsets(tokenizer, [int(ids_T[t]) for t in positions])
        folded, origin = fold(text)
        for unit, kind in units:
            needle = fold(unit)[0]
            at = folded.find(needle) if needle else -1
            while at >= 0:
                first, last = origin[at], origin[at + len(needle) - 1]
                # From the first token that ends after the first character to the last that starts by the last one.
                start = int(np.searchsorted(ends, first, side="right"))
                stop = int(np.searchsorted(starts, last, side="right")) - 1
                yield positions[start], positions[stop] + 1, text[first : last + 1], kind
                at = folded.find(needle, at + 1)


def fold(text: str) -> tuple[str, list[int]]:
    """The text in the form in which values are compared, and for each of its characters the one it came from."""
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
    return text, np.maximum.accumulate(starts), np.maximum.accumulate(ends)


def _common(text: str, prefix: str) -> int:
    """Length of the longest common beginning."""
    if text.startswith(prefix):
        return len(prefix)
    return next((i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b), min(len(text), len(prefix)))
