"""Private values with a form of their own: one row of ``PATTERNS`` each.

A row has a kind, an expression, and a check of what the expression matched (a checksum, a calendar). Group ``v``, where
there is one, is the value; the rest is context. The expressions have bounded repetitions and no nested ones, so they
take linear time (``tests/unit/private/test_patterns.py`` feeds them long hostile text).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sgt_titan.private import checksums, dates
from sgt_titan.private.spans import Span


@dataclass(frozen=True)
class Pattern:
    kind: str
    expression: str
    check: Callable[[str], bool] = field(default=lambda text: True)
    flags: int = 0


def digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _card(text: str) -> bool:
    return 13 <= len(digits(text)) <= 19 and checksums.luhn(digits(text))


def _ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _phone(text: str) -> bool:
    return 7 <= len(digits(text)) <= 15


def _number(text: str) -> bool:
    """Six digits or more that are neither years nor a day with an hour."""
    years = re.fullmatch(r"(?:(?:19|20)\d\d[ -]?)+", text)
    return len(digits(text)) >= 6 and not years and not re.match(r"\d{4}-\d\d-\d\d(?!\d)", text)


def _secret(text: str) -> bool:
    """Long, of letters and digits mixed: no word and no number."""
    return any(c.isdigit() for c in text) and any(c.isalpha() for c in text)


_MONTH = r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\.?"
_STREET = r"(?:Street|St|Road|Rd|Lane|Ln|Avenue|Ave|Court|Ct|Drive|Dr|Square|Sq|Terrace|Way|Wy|Place|Pl|Boulevard|Blvd|Close|Crescent|Alley)"
_MONEY = r"\d{1,3}(?:[,.' ]\d{3}){1,4}(?:[.,]\d{1,2})?(?!\d)|\d{1,12}(?:[.,]\d{1,2})?(?!\d)"
_KEYS = r"(?:api[_-]?key|access[_-]?token|refresh[_-]?token|auth[_-]?token|client[_-]?(?:secret|id)|secret|password|passwd|pwd|token|code)"

PATTERNS = (
    Pattern("secret", r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[A-Za-z0-9+/=\s]{16,8192}-----END [A-Z ]{0,30}PRIVATE KEY-----"),
    Pattern("secret", r"\beyJ[\w-]{8,2048}\.[\w-]{8,4096}(?:\.[\w-]{8,2048})?"),  # JSON web token
    Pattern("secret", r"\b(?:sk-|pk-|gh[pousr]_|xox[abprs]-|AKIA|ASIA|AIza|glpat-|hf_|rk_live_|sk_live_)[\w-]{12,200}"),
    Pattern("secret", r"(?i:\b" + _KEYS + r")[\"']{0,2}\s{0,3}[=:]\s{0,3}[\"'`]?(?P<v>[^\s\"'`,;&<>]{6,512})", _secret),
    Pattern("secret", r"\b(?=[A-Za-z]{0,64}\d)(?=\d{0,64}[A-Za-z])[A-Za-z0-9_-]{32,512}\b", _secret),
    Pattern("url", r"\b[a-z][a-z0-9+.-]{1,15}://[^\s<>\"'`|]{1,2000}[^\s<>\"'`|.,;:!?)\]}]", flags=re.I),
    Pattern("url", r"\bwww\.[^\s<>\"'`|]{1,2000}[^\s<>\"'`|.,;:!?)\]}]", flags=re.I),
    Pattern("email", r"[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,6}[A-Za-z]{2,24}\b"),
    Pattern("handle", r"(?<![\w@./])@(?P<v>[A-Za-z_][\w.]{2,30})(?![\w@])"),
    Pattern("handle", r"(?i:\b[a-z]:\\users\\|/home/|/users/)(?P<v>[^\\/\s\"'<>]{1,40}(?: [^\\/\s\"'<>]{1,40}){0,3}(?=[\\/])|[^\\/\s\"'<>]{1,40})"),
    Pattern("iban", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", lambda t: checksums.iban(t.replace(" ", ""))),
    Pattern("card", r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])", _card),
    Pattern("card", r"(?i:\bcards? (?:number )?(?:is |no\.? ?|ending in )?:? ?)(?P<v>\d{4}(?:[ -]?\d{4}){3})\b"),
    Pattern("card_end", r"(?i:\b(?:ending|ends) (?:in|with) |\blast (?:four|4)(?: digits)?(?: are| is|:)? )(?P<v>\d{4})(?![\d-])"),
    Pattern("ssn", r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", lambda t: checksums.ssn(digits(t))),
    Pattern("ip", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)", _ip),
    Pattern("ip", r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])", _ip),
    Pattern("mac", r"(?<![\w:-])(?:[0-9A-Fa-f]{2}([:-]))(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}(?![\w:-])"),
    Pattern("date", r"\b\d{4}[-/.]\d{1,2}[-/.]\d{1,2}\b", dates.is_date),
    Pattern("date", r"\b\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d{2})\b", dates.is_date),
    Pattern("date", r"\b\d{1,2}(?:st|nd|rd|th)? (?:of )?" + _MONTH + r",? \d{4}\b", dates.is_date, re.I),
    Pattern("date", r"\b" + _MONTH + r" \d{1,2}(?:st|nd|rd|th)?,? \d{4}\b", dates.is_date, re.I),
    Pattern("amount", r"(?:[$€£¥₹]|\b(?:USD|EUR|GBP|CHF|INR|JPY|Rs\.?)) ?(?:" + _MONEY + ")"),
    Pattern("amount", r"(?<![\w.,])(?:" + _MONEY + r") ?(?:[€£¥₹]|(?:USD|EUR|GBP|CHF|INR|JPY|dollars|euros|pounds)\b)"),
    Pattern("phone", r"(?<![\w.+-])\+\d{1,3}(?:[ .-]?\(?\d{1,5}\)?){2,6}(?![\w-])", _phone),
    Pattern("phone", r"(?<![\w.-])\(?\d{3}\)?[ .-]\d{3,4}[ .-]\d{4}(?![\w-])", _phone),
    Pattern("phone", r"(?<![\w.-])0\d{1,4}[ -/]\d{3,4}[ -]?\d{3,5}(?![\w-])", _phone),
    Pattern("phone", r"(?i:\b(?:phone|mobile|tel|cell|call|fax|whatsapp)[a-z.]{0,10}[ :]{1,3}(?:number |no\.? |is |me (?:on|at) ){0,2})(?P<v>\+?\d(?:[ .()-]{0,2}\d){6,14})(?!\d)", _phone),
    Pattern("street", r"\b\d{1,5}[A-Za-z]? (?:[A-Z][\w'’-]{1,25} ){1,3}" + _STREET + r"\b"),
    Pattern("zip", r"\b(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|T[NX]|UT|V[AT]|W[AIVY]),? (?P<v>\d{5}(?:-\d{4})?)\b"),
    Pattern("zip", r"\b[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2}\b"),
    Pattern("code", r"\b[A-Z]{1,4}[-_]?\d{5,12}\b"),
    Pattern("code", r"\b[a-z]{1,4}\d{6,12}\b"),
    Pattern("number", r"(?<![\w.,/-])\d{2,24}(?:[ -]\d{2,8}){0,6}(?![\w/-]|[.,]\d)", _number),
)  # fmt: skip

_COMPILED = [(row, re.compile(row.expression, row.flags)) for row in PATTERNS]


def find_patterns(text: str) -> Iterator[Span]:
    """Every match of every row whose check passes; they may overlap."""
    for row, expression in _COMPILED:
        for match in expression.finditer(text):
            group = "v" if "v" in expression.groupindex else 0
            start, stop = match.span(group)
            if start < stop and row.check(match[group]):
                yield Span(start, stop, row.kind)
