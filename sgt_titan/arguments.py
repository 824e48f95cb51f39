"""Command lines that report a usage error as every other bad input is reported, and what several of them take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from math import inf
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlsplit

from sgt_titan.errors import UserError


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` that raises UserError where argparse exits, and takes no option's first letters."""

    def __init__(self, *positional: Any, **options: Any):
        super().__init__(*positional, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"argument (--[\w-]+)\S*: (must be .*)", message):  # of ``number``
            raise UserError(f"{found[1]} {found[2]}")
        raise UserError(f"{message} (see {self.prog} --help)")


def http_url(text: str) -> SplitResult | None:
    """The parts of a URL of http or https with a host, and a port that is one; None for anything else."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 (it is read here to be checked)
    except ValueError:  # a bracket that is not closed, a port that is none
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname else None


def number(
    kind: type[int] | type[float], least: float = -inf, most: float = inf, *, above: float = -inf
) -> Callable[[str], float]:
    """The ``type`` of an option that is a number of a range; never infinite. Its range stands beside it."""
    words = f"above {above}" if above > -inf else f"from {least} to {most}" if most < inf else f"at least {least}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            whole = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {whole}, got {text!r}") from None
        if not (least <= value <= most and value > above and abs(value) < inf):
            raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value

    return read


seed_number = number(int, 0, (1 << 31) - 1)  # what numpy and torch take


def seed_argument(found: argparse.ArgumentParser, of: str) -> None:
    """--seed, whatever it is of."""
    found.add_argument("--seed", type=seed_number, default=0, metavar="N", help=f"of {of} (default 0)")
