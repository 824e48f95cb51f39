"""The tables that a benchmark prints, and with ``--out FILE`` the file that a page's tables come from.

A file holds numbers, and a column says how they are shown, so that what is printed and what a page must say
(``tests/figures.py``) are made by the same function. No torch: the test has no need of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def cell(value: Any, form: str) -> str:
    """A number as ``form`` (that of ``format``), a median with its lowest and highest as ``m (l to h)``; text stays."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        median, low, high = (format(v, form) for v in value)
        return f"{median} ({low} to {high})"
    return format(value, form)


def head(columns: Mapping[str, str]) -> str:
    """Two lines; columns of numbers, those with a form, are set to the right."""
    return _line(columns) + "\n|" + "|".join("---:" if form else "---" for form in columns.values()) + "|"


def row(columns: Mapping[str, str], values: Sequence[Any]) -> str:
    return _line(cell(value, form) for value, form in zip(values, columns.values(), strict=True))


def markdown(table: Mapping[str, Any]) -> str:
    """A table of a file, without its title."""
    columns = table["columns"]
    return "\n".join([head(columns), *(row(columns, values) for values in table["cells"])])


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


class Tables:
    """What one run of a benchmark says: printed as it comes, kept as ``about`` and ``tables``."""

    def __init__(self, machine: str):
        script = os.path.relpath(os.path.realpath(sys.argv[0]), ROOT)
        threads = os.environ.get("OMP_NUM_THREADS")
        self.about = {
            "command": f"OMP_NUM_THREADS={threads} " * bool(threads) + shlex.join(["python", script, *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": machine,
        }
        self.tables: list[dict[str, Any]] = []
        print(f"{machine}; {self.about['date']}", flush=True)

    def start(self, title: str, columns: Mapping[str, str]) -> None:
        """The rows that follow are of this table; columns: name -> form of its numbers, "" for text."""
        self.tables.append({"title": title, "columns": dict(columns), "cells": []})
        print("\n" + f"{title}\n\n" * bool(title) + head(columns), flush=True)

    def row(self, *values: Any) -> None:
        """Of the table begun last: text, numbers, (median, lowest, highest), None."""
        table = self.tables[-1]
        print(row(table["columns"], values), flush=True)
        table["cells"].append([list(value) if isinstance(value, tuple) else value for value in values])


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the tables here too")


@contextmanager
def written(out: Path | None, machine: str) -> Iterator[Tables]:
    """Tables that are in ``out``, if it is given, when the block has ended well."""
    tables = Tables(machine)
    yield tables
    if out:
        text = json.dumps({"about": tables.about, "tables": tables.tables}, indent=1, ensure_ascii=False)
        out.write_text(text + "\n", encoding="utf-8")
