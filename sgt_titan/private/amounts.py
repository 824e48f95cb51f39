"""Amounts that add up: read a written amount, find which are sums of others, write a sum in the same form.

A sum is two amounts of a conversation that make a third, or the two and more that stand directly before or after their
total, in one currency. Who sees the surrogates learns that they add up, and nothing else of the amounts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import combinations
from typing import NamedTuple

_NUMBER = re.compile(r"\d[\d.,' ]*\d|\d")
MOST = 200  # amounts of a conversation that are tried in pairs


class Amount(NamedTuple):
    """before, after: what stands around the number, the currency. group, point: signs between thousands and before the
    decimals; empty where there are none."""

    before: str
    value: Decimal
    after: str
    group: str
    point: str


def read(text: str) -> Amount | None:
    """An amount as people write it; None if it is none. A last group of one or two digits is of decimals."""
    match = _NUMBER.search(text)
    if match is None:
        return None
    parts = re.fullmatch(r"(.*?)(?:([.,])(\d{1,2}))?", match[0])
    assert parts is not None  # whatever a number is, it is whole and perhaps decimals
    whole, point, decimals = parts.groups()
    group = re.search(r"\D", whole)
    digits = re.sub(r"\D", "", whole) + (f".{decimals}" if point else "")
    before, after = text[: match.start()].strip().casefold(), text[match.end() :].strip().casefold()
    return Amount(before, Decimal(digits), after, group[0] if group else "", point or "")


def write(value: Decimal, like: str) -> str:
    """``value`` in the form of another amount; with decimals also where that has none, if it needs them."""
    form, match = read(like), _NUMBER.search(like)
    assert form is not None and match is not None
    cents = value != value.to_integral_value() or bool(form.point)
    whole, _, decimals = f"{value:.2f}".partition(".")
    if form.group:
        whole = re.sub(r"\B(?=(\d{3})+$)", form.group, whole)
    number = whole + (f"{form.point or '.'}{decimals}" if cents else "")
    return like[: match.start()] + number + like[match.end() :]


def sums(amounts: Sequence[Amount]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(total, parts), by position: which amounts, in the order in which they stand, are the sum of others."""
    where: dict[tuple[str, str, Decimal], list[int]] = {}
    for i, amount in enumerate(amounts):
        where.setdefault((amount.before, amount.after, amount.value), []).append(i)

    def alike(i: int, j: int) -> bool:
        return amounts[i][0] == amounts[j][0] and amounts[i][2] == amounts[j][2]

    for i, j in combinations(range(min(len(amounts), MOST)), 2):
        if alike(i, j) and amounts[i].value > 0 and amounts[j].value > 0:
            for total in where.get((amounts[i].before, amounts[i].after, amounts[i].value + amounts[j].value), ()):
                yield total, (i, j)
    for total, amount in enumerate(amounts):
        for step in (-1, 1):
            rest, parts, i = amount.value, [], total + step
            while 0 <= i < len(amounts) and alike(i, total) and 0 < amounts[i].value <= rest:
                rest -= amounts[i].value
                parts.append(i)
                if rest == 0 and len(parts) > 2:
                    yield total, tuple(sorted(parts))
                i += step


def completed(
    wanted: str, found: Sequence[tuple[str, tuple[str, ...]]], known: Mapping[str, Decimal]
) -> Decimal | None:
    """The value that an amount must have, where all others of a sum are ``known``; None if it is free."""
    for total, parts in found:
        if wanted == total and all(part in known for part in parts):
            return sum((known[part] for part in parts), Decimal(0))
        if wanted in parts and total in known and all(part in known for part in parts if part != wanted):
            rest = known[total] - sum((known[part] for part in parts if part != wanted), Decimal(0))
            if rest > 0:
                return rest
    return None
