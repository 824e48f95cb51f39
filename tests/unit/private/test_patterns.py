"""Every row of the table finds its own, checks it, and is not slow on hostile text."""

from itertools import pairwise

import pytest
import regex

from sgt_titan.private import checksums, dates
from sgt_titan.private.patterns import PATTERNS, find_patterns
from sgt_titan.private.spans import Span, find

FOUND = [
    ("card", "4111 1111 1111 1111"),
    ("card", "378282246310005"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB29NWBK60161331926819"),
    ("email", "ada.lovelace+x@mail.example.co.uk"),
    ("phone", "+44 20 7946 0958"),
    ("phone", "(212) 940-8830"),
    ("phone", "030 1234567"),
    ("ip", "10.17.22.102"),
    ("ip", "2001:db8:85a3::8a2e:370:7334"),
    ("mac", "00:1a:2b:3c:4d:5e"),
    ("url", "https://bob:hunter2@db.internal:5432/x?q=1"),
    ("url", "www.polarisagency.com/seo"),
    ("secret", "sk-abcdefghijklmnop1234"),
    ("secret", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"),
    ("date", "1985-03-12"),
    ("date", "12/21/1997"),
    ("date", "3rd of March 2021"),
    ("date", "March 12, 1985"),
    ("amount", "$1,694.33"),
    ("amount", "250 euros"),
    ("ssn", "123-12-1234"),
    ("street", "123 Chicago Way"),
    ("zip", "SW1A 2AA"),
    ("code", "XS-863504"),
    ("number", "73921 44"),
    ("handle", "@xtension11"),
]


@pytest.mark.parametrize(("kind", "text"), FOUND, ids=lambda value: value[:20])
def test_a_row_finds_its_value(kind, text):
    around = f"Please note {text}, thanks."
    covered = [span for span in find(around, [find_patterns]) if span.kind == kind]
    start = 12 + (1 if kind == "handle" else 0)
    assert covered == [Span(start, 12 + len(text), kind)]


def test_values_named_by_what_stands_before_them():
    text = (
        'client_secret="fb0196010f2b70df", last four digits are 5812, /home/ada/notes, TX 75001, my cell is 555 9408830'
    )
    values = {(span.kind, text[span.start : span.stop]) for span in find(text, [find_patterns])}
    assert {("secret", "fb0196010f2b70df"), ("card_end", "5812"), ("handle", "ada"), ("zip", "75001")} <= values
    assert ("phone", "555 9408830") in values


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # fails Luhn
        "DE88 3704 0044 0532 0130 02",
        "999.1.1.1",
        "31/31/2020",
        "February 30, 2021",
        "000-12-1234",
        "2019-2022",
        "version 2.35.2",
        "costs 5 apples",
    ],
)
def test_what_fails_its_check_is_not_of_its_kind(text):
    kinds = {span.kind for span in find(text, [find_patterns])}
    assert not kinds & {"card", "iban", "ip", "date", "ssn", "amount"} and ("2019" not in text or not kinds)


def test_unicode_forms():
    full_width = "card ４１１１ １１１１ １１１１ １１１１!"
    assert [full_width[s.start : s.stop] for s in find(full_width, [find_patterns])] == [
        "４１１１ １１１１ １１１１ １１１１"
    ]
    hidden = "mail ada@exam\u200bple.com now"  # a zero-width space inside
    assert [hidden[s.start : s.stop] for s in find(hidden, [find_patterns])] == ["ada@exam\u200bple.com"]


@pytest.mark.parametrize(
    "unit", ["1", "1 ", "a", "a.", "a@", "-", "0-", "A1", "1,000", "::", "http://", "March ", "Ab "]
)
def test_no_row_takes_exponential_time(unit):
    """A row that did would need longer than the age of the universe over these."""
    text = unit * (5_000 // len(unit))
    for row in PATTERNS:
        for _ in regex.finditer(row.expression, text, row.flags, timeout=20):
            pass
    for _ in find_patterns(text):
        pass


def test_overlaps_leave_nothing_found_in_clear():
    text = "see https://ada@10.1.2.3/x 12 Kings Road"
    spans = find(text, [find_patterns, lambda t: [Span(22, 34, "name")]])
    assert all(a.stop <= b.start for a, b in pairwise(spans))
    covered = {i for span in spans for i in range(span.start, span.stop)}
    assert set(range(4, len(text))) - covered <= {text.index(" ", 5)}


def test_checksums():
    assert checksums.luhn("79927398713") and not checksums.luhn("79927398710")
    assert checksums.luhn_digit("7992739871") == "3"
    assert checksums.iban("GB82WEST12345698765432") and not checksums.iban("GB82WEST12345698765431")
    assert checksums.iban_digits("GB", "WEST12345698765432") == "82"


@pytest.mark.parametrize(
    "text",
    ["12 March 1985", "1985-03-01", "MARCH 3rd, 2001", "03/12/85", "3rd of march 1999", "5 May 2020", "31.12.1999"],
)
def test_a_date_is_written_as_it_was_read(text):
    day, form = dates.read(text)
    assert dates.write(day, form) == text


def test_every_kind_of_the_table_has_a_surrogate():
    from sgt_titan.private.surrogates import KINDS

    assert {row.kind for row in PATTERNS} <= set(KINDS)
