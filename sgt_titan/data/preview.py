"""``sgt-titan preview``: a row of one's own data as it will be trained on. It prints the row's text: that is what for.

Legend: T tokens of a sample.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from sgt_titan.config import schema
from sgt_titan.data.marks import offsets
from sgt_titan.data.mixture import Part, parts
from sgt_titan.data.sources import Rows
from sgt_titan.data.tokenization import Parts, TokenOptions, encode_row, kept, load_tokenizer, private_tokens
from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import RESPONSE, EncodedPrompt, obfuscation_mask

# What a token is to the training: how it looks on a terminal, and between which marks elsewhere.
KINDS = {
    "clear": ("\x1b[2m", "", ""),
    "obfuscated": ("\x1b[33m", "[", "]"),
    "private": ("\x1b[30;43m", "[[", "]]"),
    "response": ("\x1b[32m", "{", "}"),
    "cut": ("\x1b[9;2m", "~~", "~~"),
}
_RESET = "\x1b[0m"


def preview(config: schema.Config, row: int, *, color: bool, source: str = "") -> str:
    """Row number ``row`` (from 1) of the data of a resolved config, with what is said of it.

    Args:
        source: of several, by name; "": the first.

    Raises:
        UserError: no such source, tokenizer or row. A row that cannot be used is shown as what it is.
    """
    tokenizer = load_tokenizer(config.trunk.path)
    found = {part.name: part for part in parts(config, tokenizer)}
    if source and source not in found:
        raise UserError(f"--source: there is no {source!r}; {', '.join(filter(None, found)) or 'there is one source'}")
    shown = found[source] if source else next(iter(found.values()))
    if not 1 <= row <= len(shown.rows):
        raise UserError(f"--row: {row}, but {shown.rows.name} has rows 1 to {len(shown.rows)}")
    about = [line for part in found.values() for line in _about(part, config.data)]
    return "\n".join([*about, "", *_row(shown.rows, row - 1, tokenizer, shown.options, config.data, color)])


def _about(part: Part, data: schema.Data) -> Iterator[str]:
    rows, options = part.rows, part.options
    if part.name:
        weight = data.sources.get(part.name, schema.Source({})).get("weight")
        yield part.name + (", held out" if part.held_out else f", weight {weight:g}" if weight else "") + ":"
    columns = ", ".join(f"{name}: {column}" for name, column in rows.columns.items())
    yield f"{rows.name}: {len(rows):,} rows, format {rows.format} ({columns}), template {options.template}"
    if rows.left:
        yield f"not read: {'; '.join(rows.left)}"
    if rows.unused:
        yield f"columns not used: {', '.join(column or 'one without a name' for column in rows.unused)}"


def _row(rows: Rows, i: int, tokenizer: Any, options: TokenOptions, data: schema.Data, color: bool) -> Iterator[str]:
    try:
        conversation, samples, _ = encode_row(rows, i, tokenizer, options)
    except UserError as error:
        yield f"cannot be used: {error}"
        return
    turns = ", ".join(m["role"] for m in conversation.messages)
    yield f"{rows.where(i)}: {len(conversation.messages)} turns ({turns}), {len(conversation.private)} marked values"
    for encoded in samples:
        parts = Parts()
        parts.add(encoded, 0, i, conversation.private, tokenizer, options)
        for note in encoded.notes:
            yield f"not used, or not as it is: {note}"
        for reason, count in parts.dropped.items():
            if count:
                yield f"left out of the training: {reason}"
        yield from _sample(encoded, parts, tokenizer, options, data, color)
    yield ""
    yield "  ".join(_paint(kind, kind, color) for kind in KINDS)


def _sample(
    encoded: EncodedPrompt, parts: Parts, tokenizer: Any, options: TokenOptions, data: schema.Data, color: bool
) -> Iterator[str]:
    ids_T = np.array(encoded.ids)
    kept_T = kept(np.array(encoded.roles), options.seq_len, options.truncation) if parts.ids else None
    if kept_T is not None:
        roles_T = np.array(encoded.roles, dtype=np.uint8)
        roles_T[kept_T] = parts.roles[0]
        private_T = np.zeros(len(ids_T), dtype=bool)
        if parts.marks:
            private_T[kept_T] = private_tokens(parts.marks[0], int(kept_T.sum()))
    else:
        kept_T, roles_T = np.zeros(len(ids_T), dtype=bool), np.array(encoded.roles)
        private_T = kept_T
    hidden_T = obfuscation_mask(roles_T, obfuscate=data.obfuscate, obfuscate_template=data.obfuscate_template)
    kinds = np.full(len(ids_T), "clear", dtype=object)
    kinds[roles_T == RESPONSE] = "response"
    kinds[hidden_T] = "obfuscated"
    kinds[hidden_T & private_T] = "private"
    kinds[~kept_T] = "cut"
    counts = ", ".join(f"{(kinds == kind).sum()} {kind}" for kind in KINDS if (kinds == kind).any())
    yield f"{len(ids_T)} tokens (training.seq_len {options.seq_len}): {counts}"
    yield ""
    text, starts_T, _ = offsets(tokenizer, ids_T.tolist())
    edges = [*starts_T.tolist(), len(text)]
    shown = []
    for kind, run in groupby(range(len(ids_T)), key=lambda t: kinds[t]):
        positions = list(run)
        shown.append(_paint(kind, text[edges[positions[0]] : edges[positions[-1] + 1]], color))
    yield "".join(shown)


def _paint(kind: str, text: str, color: bool) -> str:
    style, before, after = KINDS[kind]
    # What a terminal would obey is shown instead.
    text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
    if not color:
        return f"{before}{text}{after}"
    return "\n".join(f"{style}{line}{_RESET}" if line else "" for line in text.split("\n"))


__all__ = ["KINDS", "preview"]
