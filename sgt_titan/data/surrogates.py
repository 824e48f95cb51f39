"""Rows with surrogates in place of their private values, for a transform that will only ever see such text.

The key is public and a row's number is its conversation: nothing is hidden here, the rows only look as a client's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sgt_titan.data.marks import fold
from sgt_titan.private import Private
from sgt_titan.private.tables import VERSION

__all__ = ["VERSION", "finders", "with_surrogates"]

KEY = b"sgt_titan: rows of training data"


@lru_cache(maxsize=2)
def finders(names: str, own: str) -> Private:
    """As ``Private.of``, once a process. Raises UserError as it does."""
    return Private.of(names, own=own or None, key=KEY)


def with_surrogates(
    messages: Sequence[dict[str, str]], units: Sequence[tuple[str, str]], row: int, private: Private
) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """The turns as a client would send them, and the marked values that are still in them."""
    hidden = private.conversation(f"row {row}").hide([message["content"] for message in messages])
    turns = [{**message, "content": text.text} for message, text in zip(messages, hidden, strict=True)]
    said = fold("\n".join(text.text for text in hidden))[0]
    return turns, [(text, kind) for text, kind in units if fold(text)[0] in said]
