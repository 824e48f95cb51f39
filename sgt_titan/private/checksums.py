"""Check digits: whether a number has the right ones, and which would be right."""

from __future__ import annotations


def luhn(digits: str) -> bool:
    """Payment cards, IMEI: ISO/IEC 7812-1, annex B. ``digits``: nothing but digits."""
    return len(digits) > 1 and luhn_digit(digits[:-1]) == digits[-1]


def luhn_digit(digits: str) -> str:
    """The digit that, appended, makes ``digits`` pass ``luhn``."""
    doubled = [int(d) * (1 + (i % 2 == 0)) for i, d in enumerate(reversed(digits))]
    return str(-sum(n - 9 * (n > 9) for n in doubled) % 10)


def iban(text: str) -> bool:
    """ISO 13616: without spaces, the number whose letters are 10 to 35 and whose first four signs stand last is 1
    modulo 97."""
    return len(text) > 4 and text.isalnum() and text.isascii() and _iban_number(text[4:] + text[:4]) % 97 == 1


def iban_digits(country: str, account: str) -> str:
    """The two check digits of an IBAN."""
    return f"{98 - _iban_number(account + country + '00') % 97:02d}"


def _iban_number(text: str) -> int:
    return int("".join(str(int(c, 36)) for c in text))


def ssn(digits: str) -> bool:
    """A United States social security number that could have been issued: area, group and serial are not zero, the area
    neither 666 nor from 900."""
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"
