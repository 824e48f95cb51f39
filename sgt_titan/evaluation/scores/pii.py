"""PII-Ratio: the share of private values that a reconstruction still gives away (PAPILLON, arXiv 2410.17127).

    leaked(reconstruction) / leaked(original), over the units that the (truncated) original contains

The paper asks a language model whether a value can be recovered (``judge.py``). Offline, a value is leaked if it
occurs: exactly, or fuzzily (rapidfuzz's partial ratio of at least 90; values of at most four characters or without a
letter exactly, where a near miss is another value). Texts are compared after NFKC and case folding.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from sgt_titan.errors import UserError
from sgt_titan.metrics.interval import ratio

FUZZY = 90.0
SHORT = 4


def pii_ratio(
    originals: Sequence[str], reconstructions: Sequence[str], units: Sequence[Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """exact_micro, exact_macro, fuzzy_micro, fuzzy_macro as JSON values of estimates.

    micro: over all values; macro: the mean over prompts that have any. A value that also stands in a clean part of the
    prompt leaks whatever is done, so the floor need not be 0.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, leaks in (("exact", is_in), ("fuzzy", is_nearly_in)):
        flags = [
            [leaks(unit, read) for unit in these if is_in(unit, original)]
            for original, read, these in zip(originals, reconstructions, units, strict=True)
        ]
        found |= ratios(name, flags)
    return found


def ratios(name: str, flags: Sequence[Sequence[bool]]) -> dict[str, dict[str, Any]]:
    """``NAME_micro`` and ``NAME_macro`` from what leaked, per prompt and value."""
    counts = np.array([len(these) for these in flags])
    leaked = np.array([sum(these) for these in flags])
    some = counts > 0
    shares = leaked[some] / counts[some]
    return {
        f"{name}_micro": ratio(leaked, counts, share=True).as_dict(),
        # A mean of shares varies less than one of as many successes, so Wilson's interval is wide enough.
        f"{name}_macro": ratio(shares, np.ones(len(shares)), share=True).as_dict(),
    }


def is_in(unit: str, text: str) -> bool:
    """The value occurs in the text, normalised."""
    return normal(unit) in normal(text)


def is_nearly_in(unit: str, text: str) -> bool:
    """The value, or something very much like it, occurs in the text."""
    needle, hay = normal(unit), normal(text)
    if needle in hay:
        return True
    if len(needle) <= SHORT or not any(c.isalpha() for c in needle):
        return False
    # partial_ratio looks for the shorter in the longer: a part of a value is not the value.
    return (_fuzz().partial_ratio if len(hay) >= len(needle) else _fuzz().ratio)(needle, hay) >= FUZZY


def normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _fuzz() -> Any:
    try:
        from rapidfuzz import fuzz
    except ImportError:
        raise UserError("fuzzy matching needs rapidfuzz: pip install 'sgt-titan[eval]'") from None
    return fuzz
