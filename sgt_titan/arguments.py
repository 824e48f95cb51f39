"""Command lines that report a usage error as every other bad input is reported."""

from __future__ import annotations

import argparse
from typing import NoReturn

from sgt_titan.errors import UserError


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` that raises UserError where argparse exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
