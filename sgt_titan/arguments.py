"""Command lines that report a usage error as every other bad input is reported, and what several of them check."""

from __future__ import annotations

import argparse
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

from sgt_titan.errors import UserError


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` that raises UserError where argparse exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def http_url(text: str) -> SplitResult | None:
    """The parts of a URL of http or https with a host, and a port that is one; None for anything else."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 (it is read here to be checked)
    except ValueError:  # a bracket that is not closed, a port that is none
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname else None


def check_seed(seed: int) -> None:
    """Raises UserError for a --seed that numpy or torch would not take."""
    if not 0 <= seed < 1 << 31:
        raise UserError(f"--seed must be from 0 to {(1 << 31) - 1}, got {seed}")
