"""What stands in for a value: a row of ``KINDS`` a kind.

A surrogate is a function of a keyed draw and of the value's *shape*, which is all that ``Kind.shape`` returns: how many
digits, which separators, which known prefix. It never sees the value; docs/PRIVATE_VALUES.md lists the shapes.
Canonical forms (``norm``) decide whether two occurrences are one value; ``write`` puts a surrogate into the form of an
occurrence.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from sgt_titan.private import checksums, dates, tables
from sgt_titan.private.draws import Draw

EPOCH, DAYS = datetime.date(1940, 1, 1), 365 * 80
_KNOWN_PREFIX = re.compile(r"^(?:sk-|pk-|gh[pousr]_|xox[abprs]-|AKIA|ASIA|AIza|glpat-|hf_|rk_live_|sk_live_|eyJ)")


@dataclass(frozen=True)
class Kind:
    """``norm(text)``: canonical value. ``shape(text)``: all of the value that its surrogate may depend on.
    ``draw(shape, draw, extra)``: a canonical surrogate; ``extra`` makes it longer where the short ones are used up.
    ``write(surrogate, occurrence)``: the surrogate in the form of an occurrence."""

    norm: Callable[[str], str]
    shape: Callable[[str], str]
    draw: Callable[[str, Draw, int], str]
    write: Callable[[str, str], str]


# -- forms -------------------------------------------------------------------------------------------------------------


def folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def only_digits(text: str) -> str:
    return "".join(str(unicodedata.digit(c)) for c in text if c.isdigit())


def as_cased(surrogate: str, occurrence: str) -> str:
    """In capitals or in lower case where the occurrence is."""
    letters = [c for c in occurrence if c.isalpha()]
    if len(letters) > 1 and all(c.isupper() for c in letters):
        return surrogate.upper()
    return surrogate.lower() if letters and all(c.islower() for c in letters) else surrogate


def into_template(digits: str, occurrence: str) -> str:
    """``digits`` one by one for the digits of the occurrence; what is too many comes at the end."""
    rest = iter(digits)
    out = [next(rest, "") if c.isdigit() else c for c in occurrence]
    return "".join(out) + "".join(rest)


def template(text: str) -> str:
    """Signs by class: 0 a digit, A and a letters, anything else itself."""
    return "".join("0" if c.isdigit() else "A" if c.isupper() else "a" if c.isalpha() else c for c in text)


def fill(shape: str, draw: Draw, extra: int = 0) -> str:
    """Random signs for a template; the first digit of a run is no zero where the run is a whole number."""
    out = []
    for i, c in enumerate(shape + "0" * extra):
        if c == "0":
            first = i == 0 or shape[i - 1 : i] in (" ", "$", "€", "£", "¥", "₹")
            out.append(draw.pick(tables.DIGITS[1:] if first else tables.DIGITS))
        else:
            out.append({"A": draw.pick(tables.LETTERS).upper(), "a": draw.pick(tables.LETTERS)}.get(c, c))
    return "".join(out)


# -- words -------------------------------------------------------------------------------------------------------------


def coined(draw: Draw, tails: tuple[str, ...] = tables.SURNAME_TAILS, extra: int = 0) -> str:
    middles = "".join(draw.pick(tables.MIDDLES) for _ in range(1 + extra))
    return draw.pick(tables.HEADS) + middles + draw.pick(tails)


def _first(shape: str, draw: Draw, extra: int) -> str:
    return coined(draw, extra=extra) if extra else draw.pick(tables.FIRST)


def _place(shape: str, draw: Draw, extra: int) -> str:
    return coined(draw, tables.PLACE_TAILS, extra)


def org_word(text: str) -> str:
    """The generic word an organisation's name ends with, or nothing."""
    last = text.split()[-1] if text.split() else ""
    return last if last.casefold() in tables.ORG_WORDS and len(text.split()) > 1 else ""


def _org(shape: str, draw: Draw, extra: int) -> str:
    return f"{coined(draw, extra=extra)} {shape}".strip()


def street_type(text: str) -> str:
    number, _, rest = text.partition(" ")
    return f"{template(number)} {rest.split()[-1] if rest else ''}"


def _street(shape: str, draw: Draw, extra: int) -> str:
    number, _, kind = shape.partition(" ")
    return f"{fill(number, draw)} {coined(draw, extra=extra)} {kind}".strip()


def _text(shape: str, draw: Draw, extra: int) -> str:
    return " ".join(coined(draw, extra=extra).lower() for _ in range(int(shape)))


# -- numbers -----------------------------------------------------------------------------------------------------------


def _card(shape: str, draw: Draw, extra: int) -> str:
    """Valid by Luhn; issuer digit 9, which no card network has. ``shape``: digits, and last four to end with."""
    count, _, end = shape.partition(":")
    if not end:
        body = "9" + draw.letters(tables.DIGITS, int(count) - 2 + extra)
        return body + checksums.luhn_digit(body)
    while True:  # one in ten ends as it should
        body = "9" + draw.letters(tables.DIGITS, int(count) - 5 + extra) + end
        if checksums.luhn(body):
            return body


def _iban(shape: str, draw: Draw, extra: int) -> str:
    """German, of a bank code beginning with 9, which no bank has."""
    account = "9" + draw.letters(tables.DIGITS, 17)
    return "DE" + checksums.iban_digits("DE", account) + account


def grouped(text: str) -> str:
    """An IBAN's shape: in groups of four or without spaces."""
    return "groups" if " " in text.strip() else ""


def _write_iban(surrogate: str, occurrence: str) -> str:
    step = 4 if grouped(occurrence) else len(surrogate)
    return " ".join(surrogate[i : i + step] for i in range(0, len(surrogate), step))


def phone_shape(text: str) -> str:
    """Groups of digits, and whether it starts with + or 0."""
    groups = re.findall(r"\d+", text)
    sign = "+" if text.lstrip("( ").startswith("+") else "0" if groups and groups[0].startswith("0") else ""
    return sign + "-".join(str(len(g)) for g in groups)


def _phone(shape: str, draw: Draw, extra: int) -> str:
    """North American where the groups are (555-01xx, kept for fiction), else from 999, which no country has."""
    counts = [int(n) for n in re.findall(r"\d+", shape)]
    area = draw.pick("23456789") + draw.letters(tables.DIGITS, 2)
    if counts[-3:] == [3, 3, 4] and counts[:-3] in ([], [1]):
        return "1" * len(counts[:-3]) + area + "55501" + draw.letters(tables.DIGITS, 2 + extra)
    total = sum(counts)
    if shape.startswith("0"):
        return "0" + draw.letters(tables.DIGITS, total - 1 + extra)
    return ("999" + draw.letters(tables.DIGITS, max(total - 3, 1) + extra))[: total + extra]


def number_shape(text: str) -> str:
    digits = only_digits(text)
    return f"{'0' if digits.startswith('0') else ''}:{len(digits)}"


def _number(shape: str, draw: Draw, extra: int) -> str:
    zero, _, count = shape.partition(":")
    first = zero or draw.pick(tables.DIGITS[1:])
    return first + draw.letters(tables.DIGITS, int(count) - 1 + extra)


def _ssn(shape: str, draw: Draw, extra: int) -> str:
    """Area 666, which is never issued."""
    return "666" + draw.letters(tables.DIGITS[1:], 2) + draw.letters(tables.DIGITS[1:], 4)


def _ip(shape: str, draw: Draw, extra: int) -> str:
    """Of the blocks kept for documentation: RFC 5737, RFC 3849."""
    if shape == "6":
        return f"2001:db8::{1 + draw.below(0xFFFE):x}"
    return f"{draw.pick(('192.0.2', '198.51.100', '203.0.113'))}.{1 + draw.below(254)}"


def _mac(shape: str, draw: Draw, extra: int) -> str:
    """Locally administered: no maker has it."""
    return "02" + draw.letters("0123456789abcdef", 10)


def _write_mac(surrogate: str, occurrence: str) -> str:
    return as_cased(occurrence[2].join(surrogate[i : i + 2] for i in range(0, 12, 2)), occurrence)


def _date(shape: str, draw: Draw, extra: int) -> str:
    """Between two days (exclusive), as ordinals, where there is room; else any."""
    low, high = (int(part) for part in shape.split(":"))
    ordinal = low + 1 + draw.below(high - low - 1) if high - low > 1 else EPOCH.toordinal() + draw.below(DAYS)
    return datetime.date.fromordinal(ordinal).isoformat()


def date_norm(text: str) -> str:
    found = dates.read(text)
    return found[0].isoformat() if found else folded(text)


def _write_date(surrogate: str, occurrence: str) -> str:
    found = dates.read(occurrence)
    return dates.write(datetime.date.fromisoformat(surrogate), found[1]) if found else surrogate


# -- technical ---------------------------------------------------------------------------------------------------------


def secret_shape(text: str) -> str:
    """A prefix that names the issuer, the length, and whether it is hexadecimal."""
    prefix = _KNOWN_PREFIX.match(text)
    head = prefix[0] if prefix else ""
    rest = text[len(head) :]
    return f"{head}:{len(rest)}:{'hex' if re.fullmatch(r'[0-9a-f]+', rest) else ''}"


def _secret(shape: str, draw: Draw, extra: int) -> str:
    head, count, kind = shape.rsplit(":", 2)
    alphabet = "0123456789abcdef" if kind else tables.LETTERS + tables.LETTERS.upper() + tables.DIGITS
    return head + draw.letters(alphabet, int(count) + extra)


def url_shape(text: str) -> str:
    """Scheme, whether there are credentials, whether there is a path."""
    scheme, sep, rest = text.partition("://")
    if not sep:
        scheme, rest = "", text
    host = rest.partition("/")[0]
    return f"{scheme.lower()}|{'@' if '@' in host else ''}|{'/' if '/' in rest.rstrip('/') else ''}"


def _url(shape: str, draw: Draw, extra: int) -> str:
    scheme, credentials, path = shape.split("|")
    host = f"{coined(draw, extra=extra)}.example".lower()
    login = f"{coined(draw).lower()}:{draw.letters(tables.LETTERS + tables.DIGITS, 12)}@" if credentials else ""
    tail = f"/{coined(draw).lower()}" if path else ""
    return (f"{scheme}://" if scheme else "www.") + login + host + tail


def _plain(surrogate: str, occurrence: str) -> str:
    return surrogate


def _as_is(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _no_shape(text: str) -> str:
    return ""


def _by_parts(shape: str, draw: Draw, extra: int) -> str:
    raise NotImplementedError("conversation.py draws its local part and its domain")


def _word_count(text: str) -> str:
    return str(min(max(len(text.split()), 1), 3))


KINDS: dict[str, Kind] = {
    "first": Kind(folded, _no_shape, _first, as_cased),
    "last": Kind(folded, _no_shape, lambda shape, draw, extra: coined(draw, extra=extra), as_cased),
    "initial": Kind(folded, _no_shape, lambda shape, draw, extra: draw.pick(tables.LETTERS).upper() + ".", _plain),
    "place": Kind(folded, _no_shape, _place, as_cased),
    "org": Kind(folded, org_word, _org, as_cased),
    "term": Kind(folded, _no_shape, lambda shape, draw, extra: coined(draw, extra=extra), as_cased),
    "text": Kind(folded, _word_count, _text, as_cased),
    "handle": Kind(folded, _no_shape, lambda shape, draw, extra: coined(draw, extra=extra).lower(), _plain),
    "street": Kind(folded, street_type, _street, as_cased),
    "email": Kind(folded, _no_shape, _by_parts, _plain),
    "card": Kind(only_digits, lambda text: str(len(only_digits(text))), _card, into_template),
    "card_end": Kind(only_digits, number_shape, _number, into_template),
    "iban": Kind(lambda text: folded(text).replace(" ", ""), grouped, _iban, _write_iban),
    "ssn": Kind(only_digits, _no_shape, _ssn, into_template),
    "phone": Kind(only_digits, phone_shape, _phone, into_template),
    "number": Kind(only_digits, number_shape, _number, into_template),
    "zip": Kind(folded, template, fill, _plain),
    "code": Kind(folded, template, fill, _plain),
    "amount": Kind(_as_is, template, fill, _plain),
    "date": Kind(date_norm, _no_shape, _date, _write_date),
    "ip": Kind(folded, lambda text: "6" if ":" in text else "4", _ip, _plain),
    "mac": Kind(lambda text: re.sub("[:-]", "", folded(text)), _no_shape, _mac, _write_mac),
    "url": Kind(_as_is, url_shape, _url, _plain),
    "secret": Kind(_as_is, secret_shape, _secret, _plain),
}  # fmt: skip
# What a caller may name: "name" is written word by word as first, last and initial. What surrogates may be given for.
INNER = ("first", "last", "initial", "domain")
NAMED = ("name", *(kind for kind in KINDS if kind not in INNER))
DRAWN = ("first", "last", "domain", "place", "org", "term", "text", "handle", "phone", "url")
# Of the same value as a shorter number; drawn before what repeats a part of it.
ORDER = {"first": 0, "last": 0, "initial": 0, "card": 1, "domain": 2, "email": 3}
