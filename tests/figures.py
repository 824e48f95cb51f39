"""The figures of the pages, and the files they come from.

    python tests/figures.py DIR/results.json docs/results/NAME.json   # keeps what a page may quote of an evaluation,
                                                                      # of private.json, of a benchmark's --out FILE
    python tests/figures.py                                           # says which page does not say what its file says
    python tests/figures.py --write                                   # puts the files' tables into the pages

``docs/results/quotes.yaml`` lists, by page and section, sentences with places for figures: ``{path:form}`` of the
section's ``file``, ``{NAME/path:form}`` of another. A test fills them in and looks for the sentence in the section, so
a figure cannot change on one side alone. Every percentage of a section with ``quotes`` is in a sentence, or among its
``own`` with the reason why there is no file.

``tables`` names files whose tables stand in the section as the command prints them: those with the same first line, in
the same order. A section that has this key has no table but those, and those whose first line is among its ``own``.
Where a measurement costs hours and was made before there were files, its file was written down from the page: its
``about`` has ``transcribed``, and the section says so.

Forms: ``%1`` is a share in percent with one decimal, ``x1`` the same without the sign, ``f3`` a number, ``n`` a count;
``[]`` behind a form adds the 95% interval, ``[0]`` with so many decimals; ``i1`` is an interval alone, ``I1`` that of a
share. Paths start at the top of the file or at its ``mechanisms.sgt``; ``tables.0.cells.2.5`` is a cell.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from benchmarks.tables import markdown  # noqa: E402

RESULTS = REPO / "docs" / "results"
PERCENT = re.compile(r"-?\d[\d,]*(?:\.\d+)?%")
_PLACE = re.compile(r"\{(?:([\w.-]+)/)?([^:/{}]+):([%xfniI])(\d?)(\[(\d?)\])?\}")
_PRINTED = re.compile(r"([-+]?[\d,.]+(?:e[-+]\d+)?)(%?)(?: \[(\S+), (\S+)\])?")
# Texts, and what only a program reads.
_LEFT_OUT = {"examples", "histogram", "classes", "counts", "rows", "scores", "sees", "source", "extra", "extra_label"}


def cut(results: Any) -> Any:
    """What is left of an evaluation's results: numbers and where they come from; no text of a prompt, no path."""
    if isinstance(results, Mapping):
        return {key: cut(value) for key, value in results.items() if key not in _LEFT_OUT or isinstance(value, int)}
    if isinstance(results, list):
        return [cut(value) for value in results]
    if isinstance(results, str):
        return re.sub(r"(?<![\w.])(?:/[\w.-]+)+/(?=[\w.-])", "", results)
    return results


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def look_up(name: str, path: str) -> Any:
    """A value of ``docs/results/NAME.json``."""
    file = _read(name)
    keys = path.split(".")
    found = file if keys[0] in file else file["mechanisms"]["sgt"]
    for key in keys:
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def printed(cell: str) -> dict[str, float]:
    """The figure of a cell that is text, ``5.3% [4.9, 5.8]``: shares are those of 1."""
    if (found := _PRINTED.match(cell)) is None:
        raise ValueError(f"no figure: {cell!r}")
    unit = 100 if found[2] else 1
    numbers = zip(("value", "low", "high"), found.group(1, 3, 4), strict=True)
    return {key: float(number.replace(",", "")) / unit for key, number in numbers if number}


def filled(sentence: str, file: str = "") -> str:
    """A sentence of ``quotes.yaml`` with its figures; ``file``: of those that name none."""

    def figure(place: re.Match[str]) -> str:
        name, path, form, digits, interval, bounds = place.groups()
        found = look_up(name or file, path)
        if isinstance(found, str):
            found = printed(found)
        if isinstance(found, list):
            found = dict(zip(("value", "low", "high"), found, strict=True))
        values = [found.get(key) for key in ("value", "low", "high")] if isinstance(found, Mapping) else [found]
        if form == "n":
            return f"{round(values[0]):,}"
        values = [100 * value if form in "%xI" else value for value in values if value is not None]
        if form in "iI":
            return f"[{values[1]:.{digits}f}, {values[2]:.{digits}f}]"
        text = f"{values[0]:.{digits}f}" + ("%" if form == "%" else "")
        if interval:
            low, high = (f"{value:.{bounds or digits}f}" for value in values[1:])
            text += f" [{low}, {high}]"
        return text

    return _PLACE.sub(figure, sentence)


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next one of its level or above; without a title what stands before ``##``."""
    lines = (REPO / page).read_text(encoding="utf-8").split("\n")
    if not title:
        return "\n".join(lines[: next((i for i, line in enumerate(lines) if line.startswith("## ")), len(lines))])
    at = next((i for i, line in enumerate(lines) if line.lstrip("#").strip() == title and line.startswith("#")), None)
    if at is None:
        raise LookupError(f"{page}: no heading {title!r}")
    level = len(lines[at]) - len(lines[at].lstrip("#"))
    end = (i for i in range(at + 1, len(lines)) if re.match(rf"#{{1,{level}}} ", lines[i]))
    return "\n".join(lines[at : next(end, len(lines))])


_TABLE = re.compile(r"^\|.*\n\|[-:| ]+\|(?:\n\|.*)*", re.M)


def first_line(table: str) -> str:
    return table.split("\n")[0]


def tables_of(name: str) -> list[str]:
    """Those of ``docs/results/NAME.json``, as the command that wrote it prints them."""
    file = _read(name)
    if "tables" in file:
        return [markdown(table) for table in file["tables"]]
    from sgt_titan.evaluation.measure.private_values import table

    return _TABLE.findall(table(file))


def with_tables(text: str, names: list[str]) -> tuple[str, list[str]]:
    """A text with the files' tables in place of those with the same first line, and the first lines of all others."""
    wanted = [table for name in names for table in tables_of(name)]
    others = []

    def new(old: re.Match[str]) -> str:
        head = first_line(old.group())
        if (table := next((table for table in wanted if first_line(table) == head), None)) is None:
            others.append(head)
            return old.group()
        wanted.remove(table)
        return table

    return _TABLE.sub(new, text), others


def flat(text: str) -> str:
    """Without line breaks, which are no part of a sentence."""
    return " ".join(text.split())


def wrong(page: str, part: Mapping[str, Any]) -> Iterator[str]:
    """What a section does not say that its files do, and the percentages it says of no file."""
    bare = section(page, part["section"])
    if (names := part.get("tables")) is not None:
        meant, others = with_tables(bare, names)
        if meant != bare:
            yield f"{page}, {part['section']}: a table is not as its file has it; --write puts it right"
        for head in others:
            if head not in part.get("own", {}):
                yield f"{page}, {part['section']}: of no file; list one in tables, or give the reason in own: {head}"
        for name in names:
            if not any(table in meant for table in tables_of(name)):
                yield f"{page}, {part['section']}: has no table of {name}"
            if _read(name)["about"].get("transcribed") and "transcribed" not in bare:
                yield f"{page}, {part['section']}: {name} was transcribed; the section has to say so"
        bare = _TABLE.sub(lambda table: first_line(table.group()), meant)
    left = text = flat(bare)
    for sentence in part.get("quotes", []):
        wanted = flat(filled(sentence, part.get("file", "")))
        if wanted not in text:
            yield f"{page}, {part['section']}: its files say: {wanted}"
        left = left.replace(wanted, " ")
    for own in part.get("own", {}):
        if flat(own) not in text:
            yield f"{page}, {part['section']}: {own!r} is not there any more; take it out of quotes.yaml"
        left = left.replace(flat(own), " ")
    for figure in PERCENT.findall(left) if "quotes" in part else []:
        yield f"{page}, {part['section']}: {figure} is of no file; quote it in quotes.yaml, or give the reason in own"


def quotes() -> dict[str, list[dict[str, Any]]]:
    return yaml.safe_load((RESULTS / "quotes.yaml").read_text(encoding="utf-8"))


def main(argv: list[str]) -> int:
    if argv == ["--write"]:
        for page, parts in quotes().items():
            text = (REPO / page).read_text(encoding="utf-8")
            for part in parts:
                old = section(page, part["section"])
                text = text.replace(old, with_tables(old, part.get("tables", []))[0])
            (REPO / page).write_text(text, encoding="utf-8")
    elif argv:
        source, target = map(Path, argv)
        text = json.dumps(cut(json.loads(source.read_text(encoding="utf-8"))), indent=1)
        # A figure with its interval on one line.
        text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: " ".join(found.group().split()), text)
        target.write_text(text + "\n", encoding="utf-8")
        return 0
    found = [line for page, parts in quotes().items() for part in parts for line in wrong(page, part)]
    print("\n".join(found) or "every figure is its file's")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
