"""One conversation: which value has which surrogate, texts on the way out, answers on the way in.

A value is identified by kind and canonical form, and gets its surrogate when it first appears: a keyed draw labelled
with the conversation, the kind, the value's shape and its *number* (the how-manieth value of its kind), never with the
value. The same text so gives the same bytes whatever the values are; see docs/PRIVATE_VALUES.md for what still depends
on them. Messages are gone through in order, and a message's surrogates depend on it and those before it alone: the same
conversation, sent again one turn longer, keeps its surrogates without anybody storing them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sgt_titan.errors import UserError
from sgt_titan.private import amounts, dates, surrogates, tables
from sgt_titan.private.draws import Draw, key_check
from sgt_titan.private.restore import Literal, Restorer
from sgt_titan.private.spans import Finder, Span, alternation, bounded, check_marks, cover, find, plain, settle
from sgt_titan.private.surrogates import KINDS, ORDER, Kind, as_cased, folded, only_digits

ATTEMPTS = 512
LENGTHEN_EVERY = 64
_WORD = re.compile(r"[^\s,;:()\"“”]+")
_DIGIT_KINDS = ("card", "phone", "ssn", "number", "iban")


@dataclass(frozen=True)
class Unit:
    """A value and what stands for it, both in canonical form; ``value`` as it was first written."""

    kind: str
    norm: str = field(repr=False)
    value: str = field(repr=False)
    surrogate: str = field(repr=False)


@dataclass(frozen=True)
class Replaced:
    """An occurrence: ``span`` of the text, and ``at`` of the text that is sent."""

    span: Span
    value: str = field(repr=False)
    surrogate: str = field(repr=False)
    at: int


@dataclass(frozen=True)
class Hidden:
    """A text as it is sent, and what was replaced in it."""

    text: str
    replaced: tuple[Replaced, ...] = field(repr=False)


class Conversation:
    """Surrogates of one conversation; ``hide`` and ``restorer`` are its two doors. Not for two threads at a time.

    kinds: beyond ``surrogates.KINDS``: a user's own, with the surrogates to draw from.
    """

    def __init__(
        self, key: bytes, name: str, finders: Sequence[Finder], kinds: Mapping[str, Sequence[str]] | None = None
    ):
        self.name, self._key, self._finders = name, key, finders
        self._kinds = KINDS | {kind: _own_kind(tuple(items), KINDS.get(kind)) for kind, items in (kinds or {}).items()}
        self._hosts = tuple((kinds or {}).get("domain", ()))
        self._units: dict[tuple[str, str], Unit] = {}
        self._counts: dict[str, int] = {}
        self._taken: set[str] = set()
        self._forms: tuple[int, dict[str, str], re.Pattern[str] | None] | None = None
        self._seen = ""  # every text so far, folded
        self._digits = ""  # and its digits
        self._occurrences: dict[str, Literal] = {}
        self._names: set[str] = set()  # of several words, as written: together they are one in lower case too
        self._sums: list[tuple[str, tuple[str, ...]]] = []  # amounts that add up, as written: a total and its parts
        # A further wish of (value, surrogate), given up after half of the attempts. An answer that depends on more of
        # the value than is said in docs/PRIVATE_VALUES.md is the caller's to state.
        self.accept: Callable[[str, str], bool] | None = None

    def __repr__(self) -> str:
        return f"Conversation({len(self._units)} values)"  # never the values

    # -- out -----------------------------------------------------------------------------------------------------------

    def hide(self, texts: Sequence[str], marks: Mapping[int, Iterable[Span]] | None = None) -> list[Hidden]:
        """The texts of a conversation in order, as they are sent. ``marks``: spans that the application names itself.

        Raises:
            UserError: marks outside their text, overlapping or of no known kind; a finder that fails.
        """
        marks = marks or {}
        for index in marks:
            if not 0 <= index < len(texts):
                raise UserError(f"private marks: text {index} does not exist; there are {len(texts)}")
        marked = [check_marks(marks.get(i, ()), text, f"text {i}") for i, text in enumerate(texts)]
        for spans in marked:
            for span in spans:
                if span.kind != "name" and (span.kind not in self._kinds or span.kind in ("first", "last", "initial")):
                    known = ", ".join(["name", *(k for k in self._kinds if k not in ("first", "last", "initial"))])
                    raise UserError(f"private marks: unknown kind; known: {known}")
        found = []
        for text, own in zip(texts, marked, strict=True):
            spans = settle([*find(text, self._finders), *self._surrogates_in(text)], own)
            self._see(text)
            self._add(text, spans)
            found.append(spans)
        # Only now: a value that a later message gave away is replaced in the earlier ones as well.
        return [self._replaced(text, settle([*spans, *self._known_in(text, spans)], own))
                for text, spans, own in zip(texts, found, marked, strict=True)]  # fmt: skip

    def _see(self, text: str) -> None:
        new = folded(plain(text)[0])
        self._seen, self._digits = f"{self._seen}\n{new}", self._digits + only_digits(new)

    def apply(self, text: str) -> str:
        """Known values replaced, nothing looked for: what else goes with a request, as a stop string."""
        return self._replaced(text, settle(self._known_in(text, ()))).text

    def _add(self, text: str, spans: Sequence[Span]) -> None:
        for span in spans:
            value = plain(text[span.start : span.stop])[0]
            if span.kind == "name" and " " in value:
                self._names |= {value.lower(), value.title()}
        parts = [part for span in spans for part in _parts(text, span)]
        totals = self._find_sums([piece for kind, piece, _ in sorted(parts, key=lambda p: p[2]) if kind == "amount"])
        for kind, piece, _ in sorted(
            parts, key=lambda p: (ORDER.get(p[0], 2), p[0] == "amount" and p[1] in totals, p[2])
        ):
            self._unit(kind, piece)

    def _find_sums(self, new: Sequence[str]) -> set[str]:
        """Note which amounts, of those known and the new ones, add up; returns the totals, which are drawn last."""
        if not new:
            return set()
        known = [unit.value for (kind, _), unit in self._units.items() if kind == "amount"]
        read = {text: amount for text in dict.fromkeys([*known, *new]) if (amount := amounts.read(text))}
        texts = list(read)
        self._sums = [
            (texts[total], tuple(texts[part] for part in parts)) for total, parts in amounts.sums(list(read.values()))
        ]
        return {total for total, _ in self._sums}

    def _summed(self, text: str, norm: str) -> str | None:
        """The surrogate of an amount that makes a sum complete, if there is one that may be sent."""
        known = {
            unit.value: found.value
            for (kind, _), unit in self._units.items()
            if kind == "amount" and (found := amounts.read(unit.surrogate))
        }
        value = amounts.completed(text, self._sums, known)
        if value is None:
            return None
        summed = amounts.write(value, text)
        return summed if self._free("amount", folded(summed), norm) and self._wanted(text, summed, 0) else None

    def _unit(self, kind: str, text: str) -> Unit:
        norm = self._kinds[kind].norm(text)
        same = ("first", "last") if kind in ("first", "last") else (kind,)
        for name in same:
            if (name, norm) in self._units:
                return self._units[name, norm]
        card = None
        if kind == "card_end":
            card = next((u for (k, n), u in self._units.items() if k == "card" and n.endswith(norm)), None)
        if kind == "email":
            surrogate = self._email(text)
        elif card is not None:
            surrogate = card.surrogate[-4:]
        elif kind == "amount" and (summed := self._summed(text, norm)):
            surrogate = summed
        else:
            surrogate = self._draw(kind, text, norm)
        unit = Unit(kind, norm, text, surrogate)
        self._units[kind, norm] = unit
        self._taken.add(folded(surrogate))
        return unit

    def _draw(self, kind: str, text: str, norm: str) -> str:
        row, shape = self._kinds[kind], self._shape(kind, text, norm)
        number = self._counts[kind] = self._counts.get(kind, 0) + 1
        for attempt in range(ATTEMPTS):
            draw = Draw(self._key, tables.VERSION, self.name, kind, shape, str(number), str(attempt))
            found = row.draw(shape, draw, attempt // LENGTHEN_EVERY)
            if kind == "card" and (end := self._end_of(norm)) and not found.endswith(end):
                continue
            if self._free(kind, folded(found), norm) and self._wanted(text, row.write(found, text), attempt):
                return found
        raise UserError(f"private values: no surrogate of kind {kind} is left in this conversation; start a new one")

    def _wanted(self, value: str, written: str, attempt: int) -> bool:
        return self.accept is None or attempt >= ATTEMPTS // 2 or self.accept(value, written)

    def _free(self, kind: str, found: str, norm: str) -> bool:
        if found in self._taken or found == norm or (kind, found) in self._units:
            return False
        if kind == "initial":
            return True
        if kind == "date":
            return all(form not in self._seen for form in _date_forms(found))
        digits = only_digits(found)
        return found not in self._seen and not (kind in _DIGIT_KINDS and digits in self._digits)

    def _shape(self, kind: str, text: str, norm: str) -> str:
        """A date also goes between its neighbours; a card ends as what is known to be its end does."""
        if kind == "date":
            known = sorted((unit.norm, unit.surrogate) for (k, _), unit in self._units.items() if k == "date")
            low = max((s for n, s in known if n < norm), default=None)
            high = min((s for n, s in known if n > norm), default=None)
            first, last = surrogates.EPOCH.toordinal(), surrogates.EPOCH.toordinal() + surrogates.DAYS
            return f"{_ordinal(low, first)}:{_ordinal(high, last)}"
        shape = self._kinds[kind].shape(text)
        if kind == "card" and (end := self._end_of(norm)):
            return f"{shape}:{end}"
        return shape

    def _end_of(self, card: str) -> str:
        unit = self._units.get(("card_end", card[-4:]))
        return unit.surrogate if unit else ""

    def _email(self, text: str) -> str:
        """Of the surrogates of the names in it; the other words coined, the numbers drawn, the domain one for one."""
        local, _, domain = folded(text).rpartition("@")
        named = {unit.norm: unit.surrogate.lower() for (k, _), unit in self._units.items() if k in ("first", "last")}
        initials = {norm[0]: word[0] for norm, word in named.items()}
        number = self._counts["email"] = self._counts.get("email", 0) + 1
        for attempt in range(ATTEMPTS):
            draw = Draw(self._key, tables.VERSION, self.name, "email", "", str(number), str(attempt))
            pieces = []
            for piece in re.findall(r"\d+|[^\W\d_]+|[\W_]+", local):
                if piece.isdigit():
                    pieces.append(draw.letters(tables.DIGITS, len(piece)))
                elif piece.isalpha():
                    pieces.append(_rename(piece, named, initials) or surrogates.coined(draw).lower())
                else:
                    pieces.append(piece)
            if attempt >= LENGTHEN_EVERY:
                pieces.append(draw.letters(tables.DIGITS, 3))
            host = self._domain(domain, attempt)
            if host is None:
                continue
            found = "".join(pieces) + "@" + host
            if self._free("email", found, folded(text)) and self._wanted(text, found, attempt):
                if ("domain", domain) not in self._units:
                    self._counts["domain"] = self._counts.get("domain", 0) + 1
                    self._units["domain", domain] = Unit("domain", domain, domain, host)
                    self._taken.add(host)
                return found
        raise UserError("private values: no surrogate of kind email is left in this conversation; start a new one")

    def _domain(self, domain: str, attempt: int) -> str | None:
        """The surrogate of a known domain, or one to try for a new one; None if that is taken."""
        if ("domain", domain) in self._units:
            return self._units["domain", domain].surrogate
        host = self._host(self._counts.get("domain", 0) + 1, attempt)
        return None if host in self._taken or host in self._seen else host

    def _host(self, number: int, attempt: int) -> str:
        draw = Draw(self._key, tables.VERSION, self.name, "domain", "", str(number), str(attempt))
        if self._hosts and attempt < LENGTHEN_EVERY:
            return draw.pick(self._hosts).lower()
        return surrogates.coined(draw, extra=attempt // LENGTHEN_EVERY).lower() + ".example"

    def _replaced(self, text: str, spans: Sequence[Span]) -> Hidden:
        out, done, replaced = [], 0, []
        length = 0
        for span in spans:
            before = text[done : span.start]
            new = self._written(text, span)
            out += [before, new]
            length += len(before)
            value = text[span.start : span.stop]
            replaced.append(Replaced(span, value, new, length))
            length += len(new)
            done = span.stop
            self._occurrences[new] = Literal(value, span.kind)
        return Hidden("".join([*out, text[done:]]), tuple(replaced))

    def _written(self, text: str, span: Span) -> str:
        out, done = [], span.start
        for kind, piece, start in _parts(text, span):
            unit = self._unit(kind, piece)
            out += [text[done:start], self._kinds[unit.kind].write(unit.surrogate, piece)]
            done = start + len(piece)
        return "".join([*out, text[done : span.stop]])

    # -- what is known, in texts ---------------------------------------------------------------------------------------

    def _known_in(self, text: str, found: Sequence[Span]) -> Iterator[Span]:
        """Occurrences of known values that no finder found, by their forms."""
        covered, (forms, pattern) = cover(found, len(text)), self._known()
        if pattern is None:
            return
        searched, origin = plain(text)
        for match in pattern.finditer(searched):
            start, stop = origin[match.start()], origin[match.end() - 1] + 1
            if bounded(searched, *match.span()) and covered.find(1, start, stop) < 0:
                yield Span(start, stop, forms[match[0]])

    def _known(self) -> tuple[dict[str, str], re.Pattern[str] | None]:
        """Forms of the known values with their kinds, and an expression for them; made anew when there are more."""
        size = len(self._units) + len(self._names)
        if self._forms is None or self._forms[0] != size:
            forms: dict[str, str] = dict.fromkeys(self._names, "name")
            for unit in self._units.values():
                if unit.kind in self._kinds and unit.kind != "initial":
                    for form in self._value_forms(unit):
                        forms.setdefault(form, _outer(unit.kind))
            self._forms = size, forms, alternation(forms) if forms else None
        return self._forms[1:]

    def _value_forms(self, unit: Unit) -> Iterable[str]:
        value = plain(unit.value)[0]
        if unit.kind == "card_end" or len(value) < 3:
            return ()
        if unit.kind in ("first", "last", "place", "org", "term"):
            # In lower case a single word may be an ordinary one.
            return {value, value.upper(), *([value.lower(), value.title()] if " " in value or value.islower() else ())}
        if unit.kind in ("card", "ssn", "phone", "number"):
            return {value, *_spaced(unit.norm)}
        return {value, value.lower()} if unit.kind in ("email", "text", "handle") else {value}

    def _surrogates_in(self, text: str) -> Iterator[Span]:
        """Where the text itself says what already stands for something else: a value like any other."""
        for unit in list(self._units.values()):
            if unit.kind in self._kinds and unit.kind not in ("initial", "card_end"):
                for form in {unit.surrogate, unit.surrogate.upper(), unit.surrogate.lower()}:
                    if form not in text:
                        continue
                    for match in re.finditer(re.escape(form), text):
                        if bounded(text, *match.span()):
                            yield Span(*match.span(), _outer(unit.kind))

    # -- in ------------------------------------------------------------------------------------------------------------

    def restorer(self) -> Restorer:
        """For one answer: everything that was sent so far, in all forms in which it may come back."""
        return Restorer(self.literals(), self.traces())

    def literals(self) -> dict[str, Literal]:
        """Forms of surrogates, and what each becomes. A form that could be two values is neither."""
        forms: dict[str, set[Literal]] = {}
        for unit in self._units.values():
            for form, value in _answer_forms(unit):
                if len(form) > 1:
                    forms.setdefault(form, set()).add(Literal(value, _outer(unit.kind)))
        for form, literal in self._occurrences.items():
            forms[form] = {literal}
            if literal.kind == "name" and form.count(" ") and literal.value.count(" "):
                short = f"{form[0]}. {form.split()[-1]}", f"{literal.value[0]}. {literal.value.split()[-1]}"
                forms.setdefault(short[0], set()).add(Literal(short[1], "name"))
        return {form: next(iter(found)) for form, found in forms.items() if len({lit.value for lit in found}) == 1}

    def traces(self) -> dict[str, str]:
        """Pieces of surrogates that show one where it was not restored."""
        found = {}
        for unit in self._units.values():
            pieces = re.findall(r"\d{4,}|[^\W\d_]{5,}", folded(unit.surrogate).removesuffix(".example"))
            for piece in pieces:
                if unit.kind not in ("date", "url", "domain") and piece not in tables.ORG_WORDS:
                    found[piece] = _outer(unit.kind)
        return found

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(self._units.values())

    # -- kept by an application ----------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """To go on later, where earlier messages are no longer sent. It holds the values: keep it as you keep them."""
        units = [[unit.kind, unit.norm, unit.value, unit.surrogate] for unit in self._units.values()]
        said = [[form, *literal] for form, literal in self._occurrences.items()]
        check = key_check(self._key, self.name)
        return {"name": self.name, "check": check, "units": units, "counts": self._counts, "said": said}

    def load(self, saved: Mapping[str, Any]) -> Conversation:
        """Go on from ``as_dict``. Raises UserError if it is damaged, or was made with another key."""
        try:
            name, check = saved["name"], saved["check"]
            units = [Unit(*map(str, unit)) for unit in saved["units"]]
            counts = {str(kind): int(count) for kind, count in saved["counts"].items()}
            said = {str(form): Literal(str(value), str(kind)) for form, value, kind in saved["said"]}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError("private conversation: what was saved is damaged; start a new one") from None
        if not isinstance(name, str) or check != key_check(self._key, name):
            raise UserError("private conversation: made with another key; use that key, or start a new conversation")
        self.name, self._counts, self._occurrences = name, counts, said
        self._names = {
            form
            for literal in said.values()
            if literal.kind == "name" and " " in literal.value
            for form in (plain(literal.value)[0].lower(), plain(literal.value)[0].title())
        }
        self._units = {(unit.kind, unit.norm): unit for unit in units}
        self._taken = {folded(unit.surrogate) for unit in units}
        return self


def _outer(kind: str) -> str:
    """The kind that a caller knows."""
    return "name" if kind in ("first", "last") else kind


# -- pieces ------------------------------------------------------------------------------------------------------------


def _parts(text: str, span: Span) -> Iterator[tuple[str, str, int]]:
    """(kind, text, start) of the units of an occurrence: a name's words, else the whole. Titles stay."""
    if span.kind != "name":
        yield span.kind, text[span.start : span.stop], span.start
        return
    words = [(m[0], span.start + m.start()) for m in _WORD.finditer(text[span.start : span.stop])]
    words = [(_bare(word), start) for word, start in words if folded(word).rstrip(".") not in tables.TITLES]
    words = [(word, start) for word, start in words if any(c.isalnum() for c in word)]
    before = re.findall(r"\w+", text[max(0, span.start - 16) : words[0][1]]) if words else []
    titled = bool(before) and before[-1].casefold() in tables.TITLES
    for i, (word, start) in enumerate(words):
        last = i == len(words) - 1 and (len(words) > 1 or titled)
        is_initial = re.fullmatch(r"[^\W\d_]\.", word) is not None
        yield ("initial" if is_initial else "last" if last else "first"), word, start


def _bare(word: str) -> str:
    """Without a possessive and without marks at its end; an initial keeps its point."""
    word = re.sub(r"['’][sS]?$", "", word)
    return word if re.fullmatch(r"[^\W\d_]\.", word) else word.rstrip(".!?'’")


def _rename(piece: str, named: Mapping[str, str], initials: Mapping[str, str]) -> str | None:
    """A piece of a mail address that is a name, two names run together, or an initial and a name."""
    if piece in named:
        return named[piece]
    for cut in range(1, len(piece)):
        head, tail = piece[:cut], piece[cut:]
        if tail in named and (head in named or (cut == 1 and head in initials)):
            return (named.get(head) or initials[head]) + named[tail]
        if head in named and len(tail) == 1 and tail in initials:
            return named[head] + initials[tail]
    return initials.get(piece) if len(piece) == 1 else None


def _ordinal(iso: str | None, otherwise: int) -> int:
    return datetime.date.fromisoformat(iso).toordinal() if iso else otherwise


def _date_forms(iso: str) -> list[str]:
    return [dates.write(datetime.date.fromisoformat(iso), form).casefold() for form in dates.FORMS]


def _spaced(digits: str) -> set[str]:
    """A number as people group it."""
    groups = {4: [(4,) * (len(digits) // 4)], 3: [(3, 3, 4), (1, 3, 3, 4), (3, 2, 4)]}
    found = {digits} if len(digits) > 5 else set()
    for pattern in groups[4] + groups[3]:
        if pattern and sum(pattern) == len(digits):
            cuts = [sum(pattern[:i]) for i in range(len(pattern) + 1)]
            pieces = [digits[a:b] for a, b in pairwise(cuts)]
            found |= {separator.join(pieces) for separator in (" ", "-", ".")}
            if pattern == (3, 3, 4):
                found.add(f"({pieces[0]}) {pieces[1]}-{pieces[2]}")
    return found


def _answer_forms(unit: Unit) -> Iterator[tuple[str, str]]:
    """(form of the surrogate, the value in that form)."""
    sent, value = unit.surrogate, unit.value
    if unit.kind in ("first", "last", "place", "org", "term", "text", "street"):
        for form in (sent, sent.upper(), sent.lower(), sent.title()):
            back = value if form == sent else as_cased(value, form)
            yield form, back
            if unit.kind in ("first", "last"):
                yield form + ("S" if form.isupper() else "s"), back + ("S" if form.isupper() else "s")
    elif unit.kind in ("card", "phone", "ssn", "number"):
        theirs = _spaced(sent)
        for form in theirs:
            yield form, surrogates.into_template(unit.norm, form) if len(unit.norm) == len(sent) else value
        yield surrogates.into_template(sent, value), value
        if unit.kind == "card":
            yield sent[-4:], unit.norm[-4:]
    elif unit.kind == "iban":
        yield sent, unit.norm.upper()
        yield surrogates._write_iban(sent, " "), surrogates._write_iban(unit.norm.upper(), " ")
    elif unit.kind == "date":
        ours = dates.read(value)
        if ours:
            for form in {*dates.FORMS, ours[1]}:
                yield (dates.write(datetime.date.fromisoformat(sent), form), dates.write(ours[0], form))
    elif unit.kind == "amount":
        yield sent, value
        number = re.compile(r"\d[\d.,' ]*")
        a, b = number.search(sent), number.search(value)
        if a and b and len(only_digits(a[0])) > 2:
            yield a[0].strip(), b[0].strip()
            yield re.sub(r"[,' ](?=\d{3})", "", a[0]).strip(), re.sub(r"[,' ](?=\d{3})", "", b[0]).strip()
    elif unit.kind in ("email", "url", "handle", "domain", "code", "mac"):
        yield sent, value
        yield sent.capitalize(), value
        yield sent.upper(), value.upper()
        if unit.kind == "code":
            yield sent.replace("-", ""), value.replace("-", "")
    else:
        yield sent, value


def _own_kind(items: tuple[str, ...], base: Kind | None) -> Kind:
    """A user's kind, or a kind of ours with a user's surrogates: drawn from his list, and where that is used up as ours
    are, or with a number. Without a list the template of what stood there."""
    if not items:
        return base or Kind(folded, surrogates.template, surrogates.fill, lambda s, o: s)

    def draw(shape: str, draw: Draw, extra: int) -> str:
        picked = draw.pick(items)
        if base is not None:
            numeric = base.norm is only_digits
            return base.draw(shape, draw, extra - 1) if extra else only_digits(picked) if numeric else picked
        return picked + (f" {2 + draw.below(10**extra)}" if extra else "")

    return (
        Kind(base.norm, base.shape, draw, base.write) if base else Kind(folded, lambda text: "", draw, lambda s, o: s)
    )
