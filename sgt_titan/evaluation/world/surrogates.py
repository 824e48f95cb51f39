"""Surrogates for private values as a mechanism: alone, and in front of another one.

The client replaces values in text (sgt_titan/private). The battery compares token by token, so here a surrogate is
chosen that has as many tokens as its value; where none is found it is cut or its last token repeated, and counted
(``unfit``). The client itself does not do that: its server does not learn how many tokens a value has.

The answer is measured after restoring: at a token of a value, the probabilities of that token and of the surrogate's
are exchanged, which is what putting values back does to an answer.

Placeholders such as ``[NAME_1]`` are what others put there. No trunk writes one in as many tokens as a value has: their
utility and answers are of rows at their true length (``Respelt``), what attackers see is cut as above.

Legend: B batch, T sequence, D width, V vocabulary, N scored tokens flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sgt_titan.data.marks import offsets
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated, Respelt, Written
from sgt_titan.evaluation.world.samples import Padded, Sample
from sgt_titan.private import Conversation, Private, Replaced, Span
from sgt_titan.private.restore import Literal, restore
from sgt_titan.private.spans import settle
from sgt_titan.private.surrogates import folded
from sgt_titan.transform.prompts import special_ids

# The demo corpus' kinds -> ours. PUPA names none.
KINDS = {"address": "street", "city": "place", "birth_date": "date", "order": "code", "diagnosis": "text", "": "text"}
KINDS |= {"medication": "text"}


@dataclass
class Substitution:
    """Tokens of rows -> as many tokens with surrogates. Held: the same row always gives the same.

    private: what is looked for. told: rows whose marked values the application marks itself; nothing else is known of
    others. placeholder: a token for every token of a value, instead of surrogates (redaction of what was found).
    labels: ``[NAME_1]`` and so on instead of surrogates, a number for every value.
    """

    tokenizer: Any = field(repr=False)
    private: Private = field(repr=False)
    told: Sequence[Sample] = field(default=(), repr=False)
    placeholder: int | None = None
    labels: bool = False
    replaced: int = 0
    unfit: int = 0
    _known: dict[bytes, np.ndarray] = field(default_factory=dict, repr=False)
    _talks: dict[bytes, Conversation] = field(default_factory=dict, repr=False)
    _said: dict[bytes, dict[str, Literal]] = field(default_factory=dict, repr=False)  # labels, and their values

    def __post_init__(self) -> None:
        self._special = special_ids(self.tokenizer)
        # Rows that were cut may have one prompt, and one of them marks what the other does not.
        self._marks: dict[bytes, set[Any]] = {}
        for row in self.told:
            prompt = row.prompt()
            self._marks.setdefault(_key(prompt.ids), set()).update(prompt.spans)
        self._lengths: dict[str, int] = {}

    def __call__(self, batch: Padded) -> Padded:
        """The batch with other tokens; everything else stays."""
        tokens_BT = batch.tokens_BT.clone()
        for b in range(len(tokens_BT)):
            length = int(batch.valid_BT[b].sum())
            ids = batch.tokens_BT[b, :length].cpu().numpy()
            target = batch.target_BT[b, :length].cpu().numpy()
            prompt = int(np.argmax(target)) if target.any() else length
            tokens_BT[b, :length] = torch.from_numpy(self.row(ids, prompt)).to(tokens_BT)
        return batch._replace(tokens_BT=tokens_BT)

    def row(self, ids: np.ndarray, prompt: int) -> np.ndarray:
        """int64 (T,) with surrogates; ``prompt``: tokens before the response."""
        key = _key(ids)
        if key not in self._known:
            self._known[key] = self._substituted(ids, prompt)
        return self._known[key]

    def restored(self, prompt: Sample, answer: Sequence[int]) -> list[int]:
        """Tokens of an answer to ``prompt`` as it was sent, with the values put back."""
        if self.placeholder is not None or not answer:
            return list(answer)
        self.row(prompt.ids, len(prompt.ids))
        key, text = _key(prompt.ids), self.tokenizer.decode(answer)
        back = restore(text, self._said[key])[0] if self.labels else self._talks[key].restorer().feed(text, last=True)
        return self.tokenizer(back, add_special_tokens=False)["input_ids"]

    def written(self, row: Sample) -> Written:
        """The row at its true length: what replaces a value has as many tokens as it has."""
        prompt, target = len(row.prompt().ids), np.flatnonzero(row.target)
        ids: list[int] = []
        obfuscate: list[bool] = []
        scored: list[bool] = []
        first, done = np.arange(len(row.ids)), 0
        last = first + 1
        for start, stop, text in [*self._pieces(row.ids, prompt), (len(row.ids), len(row.ids), "")]:
            first[done:start] += len(ids) - done
            last[done:start] = first[done:start] + 1
            for kept, old in ((ids, row.ids), (obfuscate, row.obfuscate), (scored, row.target)):
                kept += old[done:start].tolist()
            if start < stop:
                new = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                first[start], last[start] = len(ids), len(ids) + len(new)
                first[start + 1 : stop] = -1
                ids += new
                obfuscate += [bool(row.obfuscate[start])] * len(new)
                scored += [bool(row.target[start])] * len(new)
            done = stop
        new_row = Sample(np.array(ids, dtype=np.int64), np.array(obfuscate), np.array(scored))
        return Written(new_row, first[target], last[target])

    def _substituted(self, ids: np.ndarray, prompt: int) -> np.ndarray:
        out = ids.astype(np.int64).copy()
        for start, stop, text in self._pieces(ids, prompt):
            self._write(out[start:stop], text)
        return out

    def _pieces(self, ids: np.ndarray, prompt: int) -> list[tuple[int, int, str]]:
        """Tokens ``start..stop-1`` that carry values, and the text that stands for all of them."""
        runs = list(self._runs(ids, prompt))
        parts = [offsets(self.tokenizer, ids[first:last].tolist()) for first, last in runs]
        texts = [text for text, _, _ in parts]
        marks = self._told_marks(ids[:prompt], runs, parts)
        asked = [i for i, (first, _) in enumerate(runs) if first < prompt]
        name = self.private.name_of([texts[i] for i in asked], marks)
        talk = self.private.conversation(name)
        talk.accept = None if self.labels else self._fits
        hidden = talk.hide(texts, marks)
        key, found = _key(ids), []
        self._talks[key], self._said[key] = talk, {}
        numbers: dict[tuple[str, str], str] = {}
        for (first, _), (text, starts, ends), result in zip(runs, parts, hidden, strict=True):
            for start, stop, pieces in _by_token(result.replaced, starts, ends):
                out, done = [], int(starts[start])
                for piece in pieces:
                    new = self._label(piece, numbers, key) if self.labels else piece.surrogate
                    out += [text[done : piece.span.start], new]
                    done = piece.span.stop
                found.append((first + start, first + stop, "".join([*out, text[done : int(ends[stop - 1])]])))
        return found

    def _label(self, piece: Replaced, numbers: dict[tuple[str, str], str], key: bytes) -> str:
        """A part of a value that has a label (Ada of Ada Lovelace) has the same; it comes back as the whole."""
        kind, value = piece.span.kind, folded(piece.value)
        known = (label for (k, v), label in numbers.items() if k == kind and f" {value} " in f" {v} ")
        if (label := next(known, None)) is None:
            number = 1 + sum(k == kind for k, _ in numbers)
            label = numbers[kind, value] = f"[{kind.upper()}_{number}]"
            self._said[key][label] = Literal(piece.value, kind)
        return label

    def _runs(self, ids: np.ndarray, prompt: int) -> Iterator[tuple[int, int]]:
        """Contents: no special token inside, the prompt apart from the response."""
        special = np.isin(ids, list(self._special)) if self._special else np.zeros(len(ids), dtype=bool)
        for low, high in ((0, prompt), (prompt, len(ids))):
            edges = np.flatnonzero(np.diff(np.concatenate([[False], ~special[low:high], [False]]))) + low
            yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)

    def _told_marks(
        self, ids: np.ndarray, runs: Sequence[tuple[int, int]], parts: Sequence[Any]
    ) -> dict[int, list[Span]]:
        found: dict[int, list[Span]] = {}
        for span in sorted(self._marks.get(_key(ids), ())):
            for i, (first, last) in enumerate(runs):
                if first <= span.start and span.stop <= last:
                    text, starts, ends = parts[i]
                    at = text.find(span.text, int(starts[span.start - first]))
                    if 0 <= at < int(ends[span.stop - 1 - first]):
                        end = span.kind == "card" and len(span.text) == 4
                        kind = "card_end" if end else KINDS.get(span.kind, span.kind)
                        found.setdefault(i, []).append(Span(at, at + len(span.text), kind))
        return {i: _disjoint(spans) for i, spans in found.items()}

    def _fits(self, value: str, surrogate: str) -> bool:
        """As many tokens, after a space."""
        return self._length(value) == self._length(surrogate)

    def _length(self, text: str) -> int:
        if text not in self._lengths:
            self._lengths[text] = len(self.tokenizer(" " + text, add_special_tokens=False)["input_ids"])
        return self._lengths[text]

    def _write(self, ids: np.ndarray, text: str) -> None:
        """The tokens of ``text`` over ``ids`` (a view), cut or lengthened."""
        self.replaced += 1
        if self.placeholder is not None:
            ids[:] = self.placeholder
            return
        new = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.unfit += len(new) != len(ids)
        new = [*new, *[new[-1]] * len(ids)][: len(ids)] if new else ids.tolist()
        ids[:] = new


def surrogates(
    substitution: Substitution, table_VD: torch.Tensor, before: Mechanism, name: str, title: str
) -> Mechanism:
    """``before`` (the mechanism that sees what is left) on rows with surrogates; ``nothing()``: surrogates alone."""

    def obfuscate(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> Obfuscated:
        seen = substitution(batch)
        return before.obfuscate(seen, table_VD[seen.tokens_BT].to(x_BTD), random)

    return Mechanism(
        name,
        title,
        obfuscate,
        transform=before.transform,
        std=before.std,
        denoises=before.denoises,
        rewrite=substitution,
        restore=substitution.restored if substitution.placeholder is None else None,
        respelt=Respelt(substitution.written, before) if substitution.labels else None,
    )


def _key(ids: np.ndarray) -> bytes:
    return np.ascontiguousarray(ids, dtype=np.int64).tobytes()


def _disjoint(spans: Sequence[Span]) -> list[Span]:
    """The longest of those that overlap."""
    return settle(spans)


def _by_token(
    replaced: Sequence[Replaced], starts: np.ndarray, ends: np.ndarray
) -> Iterator[tuple[int, int, list[Replaced]]]:
    """Occurrences with the tokens that carry them; those that share a token together."""
    groups: list[tuple[int, int, list[Replaced]]] = []
    for piece in replaced:
        start = int(np.searchsorted(ends, piece.span.start, side="right"))
        stop = int(np.searchsorted(starts, piece.span.stop - 1, side="right"))
        if groups and start < groups[-1][1]:
            first, last, pieces = groups.pop()
            groups.append((first, max(last, stop), [*pieces, piece]))
        else:
            groups.append((start, stop, [piece]))
    yield from groups
