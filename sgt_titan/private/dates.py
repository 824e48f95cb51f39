"""Dates as people write them: read a date and its form, write another date in the same form.

A form is a string like ``{d} {B} {Y}``; everything of a written date but the day itself. Which of two numbers is the
day is undecided in 03/04/2021: both readings are the same form, month first, unless a number above 12 decides.
"""

from __future__ import annotations

import datetime
import re

MONTHS = tuple(
    "january february march april may june july august september october november december".split()  # noqa: SIM905
)
_PIECE = re.compile(r"\d+|[A-Za-z]+|[^A-Za-z0-9]+")
FORMS = (
    "{Y}-{0m}-{0d}", "{d} {B} {Y}", "{B} {d}, {Y}", "{B} {d} {Y}", "{d} {b} {Y}", "{b} {d}, {Y}",
    "{0d}/{0m}/{Y}", "{0m}/{0d}/{Y}", "{0d}.{0m}.{Y}", "{d}.{m}.{Y}", "{d}/{m}/{Y}", "{m}/{d}/{Y}",
    "{Y}/{0m}/{0d}", "{d}{th} {B} {Y}", "{B} {d}{th}, {Y}", "{d}{th} of {B} {Y}", "{d} of {B} {Y}",
    "{0d}-{0m}-{Y}", "{0d} {B} {Y}", "{B} {0d}, {Y}",
)  # fmt: skip


def is_date(text: str) -> bool:
    return read(text) is not None


def read(text: str) -> tuple[datetime.date, str] | None:
    """The day, and the form that ``write`` takes; None if it is no date of the calendar between 1000 and 2999."""
    form: list[str] = []
    numbers: list[tuple[int, str]] = []
    month = None
    for piece in _PIECE.findall(text):
        low = piece.lower()
        if piece.isdigit():
            numbers.append((len(form), piece))
            form.append("?")
        elif low in ("st", "nd", "rd", "th") and form and form[-1] == "?":
            form.append("{th}")
        elif (name := _month(low)) and month is None:
            month = name
            sign = "B" if low == MONTHS[name - 1] else "b"
            form.append("{" + sign + ("!}" if piece.isupper() else "~}" if piece.islower() else "}"))
        else:
            form.append(piece)
    parts = _roles([number for _, number in numbers], month)
    if parts is None:
        return None
    values = {role: int(number) for role, (_, number) in zip(parts, numbers, strict=True)}
    year = values.get("Y", values.get("y", 0))
    if "y" in values:
        year += 2000 if year < 50 else 1900
    try:
        day = datetime.date(year, month or values["m"], values["d"])
    except (ValueError, KeyError):
        return None
    for role, (at, number) in zip(parts, numbers, strict=True):
        padded = role in "dm" and len(number) == 2 and (month is None or number[0] == "0")
        form[at] = "{" + ("0" if padded else "") + role + "}"
    return (day, "".join(form)) if 1000 <= year < 3000 else None


def write(day: datetime.date, form: str) -> str:
    """``day`` in ``form``."""
    name = MONTHS[day.month - 1].capitalize()
    th = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    for sign, text in {
        "B": name, "B!": name.upper(), "B~": name.lower(),
        "b": name[:3], "b!": name[:3].upper(), "b~": name[:3].lower(),
        "Y": f"{day.year:04d}", "y": f"{day.year % 100:02d}", "th": th,
        "0d": f"{day.day:02d}", "d": str(day.day), "0m": f"{day.month:02d}", "m": str(day.month),
    }.items():  # fmt: skip
        form = form.replace("{" + sign + "}", text)
    return form


def _month(word: str) -> int | None:
    return next((i + 1 for i, m in enumerate(MONTHS) if len(word) >= 3 and m.startswith(word)), None) or (
        9 if word == "sept" else None
    )


def _roles(numbers: list[str], month: int | None) -> str | None:
    """One of d, m, Y, y for every number."""
    years = [len(n) == 4 for n in numbers]
    if month is not None:
        found = "dY" if years == [False, True] else "Yd" if years == [True, False] else None
        return found or ("dy" if len(numbers) == 2 and len(numbers[1]) == 2 else None)
    if len(numbers) != 3:
        return None
    if years[0]:
        return "Ymd" if not any(years[1:]) else None
    first, second = int(numbers[0]), int(numbers[1])
    last = "Y" if years[2] else "y" if len(numbers[2]) == 2 else ""
    return ("dm" if first > 12 >= second else "md") + last if last else None
