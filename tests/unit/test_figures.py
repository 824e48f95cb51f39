"""The figures of the pages are those of the files they come from."""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks import tables
from tests import figures

PARTS = [(page, part) for page, parts in figures.quotes().items() for part in parts]
FILES = sorted(figures.RESULTS.glob("*.json"))


@pytest.mark.parametrize(("page", "part"), PARTS, ids=[f"{page}: {part['section']}" for page, part in PARTS])
def test_a_page_says_what_its_files_say(page, part):
    found = list(figures.wrong(page, part))
    assert not found, "\n".join(found)


def test_what_every_report_says_of_an_attacker_that_still_learns():
    from sgt_titan.evaluation.report.words import LEARNING

    said = "quick suite's read {demo-rate-0.05-seed0-quick/attacks.sequence.top1:%0}, the standard suite's "
    assert figures.filled(said + "{demo-rate-0.05-seed1-standard/attacks.sequence.top1:%0}") in LEARNING


def test_every_file_is_quoted():
    quoted = figures.RESULTS.joinpath("quotes.yaml").read_text(encoding="utf-8")
    assert FILES and [file.stem for file in FILES if file.stem not in quoted] == []


@pytest.mark.parametrize("page", ["docs/PERFORMANCE.md", "docs/RESULTS.md"])
def test_no_table_of_measurements_is_left_out(page):
    titles = re.findall(r"^## (.*)$", figures.REPO.joinpath(page).read_text(encoding="utf-8"), re.M)
    with_tables = {title for title in titles if "\n|" in figures.section(page, title)}
    assert with_tables and with_tables <= {part["section"] for part in figures.quotes()[page]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_hold_no_text_and_no_path(file):
    text = file.read_text(encoding="utf-8")
    found = json.loads(text)
    assert figures.cut(found) == found
    assert not re.search(r'"(examples|prompt|guesses_text|pieces|answer\w*": ["[])', text)
    assert not re.search(r"[ \"=]/\w", text)
    assert {"command", "date"} <= found["about"].keys()
    if "mechanisms" in found and "finding" not in found:
        assert {"versions", "export_fingerprint"} <= found["about"].keys()


RESULTS = {
    "about": {
        "rows": 7,
        "command": "sgt-titan evaluate /home/me/run/export --out=/tmp/x",
        "export": "/home/me/run/export",
    },
    "no_prompt": {"rows": {"clean": [1.0]}, "stake": {"value": 2.0, "low": 1.0, "high": 3.0, "n": 7}},
    "mechanisms": {
        "sgt": {
            "examples": [{"prompt": "secret"}],
            "utility": {"kept": {"value": 0.8948, "low": 0.876, "high": 0.912, "n": 4758}},
            "attacks": {"a": {"curve": {"top1": [{"value": 0.5}]}, "counts": {"top1": [[1], [2]]}}},
        }
    },
}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page and a folder of results of its own."""
    monkeypatch.setattr(figures, "REPO", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert figures.main([str(tmp_path / "results.json"), str(tmp_path / "one.json")]) == 0
    text = (
        "# Page\n\nno figure\n\n## Figures\n\nIt keeps\n89.5% [88, 91], N = 4,758; wanted were 90%.\n\n## After\n\n7%\n"
    )
    (tmp_path / "page.md").write_text(text)
    return tmp_path / "page.md"


PART = {
    "section": "Figures",
    "file": "one",
    "quotes": ["It keeps {utility.kept:%1[0]}, N = {utility.kept.n:n}"],
    "own": {"wanted were 90%": "an aim"},
}


def test_what_is_kept_of_an_evaluation(page):
    assert json.loads(page.with_name("one.json").read_text()) == {
        "about": {"rows": 7, "command": "sgt-titan evaluate export --out=x", "export": "export"},
        "no_prompt": {"stake": RESULTS["no_prompt"]["stake"]},
        "mechanisms": {
            "sgt": {
                "utility": RESULTS["mechanisms"]["sgt"]["utility"],
                "attacks": {"a": {"curve": {"top1": [{"value": 0.5}]}}},
            }
        },
    }


def test_a_section_is_held_to_its_file(page):
    assert list(figures.wrong("page.md", PART)) == []
    for changed, said in (
        (("89.5%", "89.6%"), "its files say: It keeps 89.5% [88, 91], N = 4,758"),
        (("4,758", "4,759"), "its files say: It keeps"),
        (("no figure", "no figure, 5%"), None),
        (("wanted were 90%", "wanted were 91%"), "'wanted were 90%' is not there any more"),
        (("## After", "and 12% more\n\n## After"), "12% is of no file"),
    ):
        before = page.read_text()
        page.write_text(before.replace(*changed))
        found = list(figures.wrong("page.md", PART))
        assert any(said in line for line in found) if said else not found
        page.write_text(before)
    with pytest.raises(LookupError, match="no heading 'Gone'"):
        list(figures.wrong("page.md", {"section": "Gone", "quotes": []}))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("{utility.kept:%0}", "89%"),
        ("{utility.kept:x1[]}", "89.5 [87.6, 91.2]"),
        ("{utility.kept:I1}", "[87.6, 91.2]"),
        ("{no_prompt.stake:f1} {no_prompt.stake:i0}", "2.0 [1, 3]"),
        ("{one/attacks.a.curve.top1.0:%1}", "50.0%"),
        ("{about.rows:n}", "7"),
    ],
)
def test_forms(page, form, text):
    assert figures.filled(form, "one") == text


def test_a_figure_of_a_cell(page):
    cells = [["ours", [0.5, 0.4, 0.62]], ["theirs", "97.1% [96.1, 98.0]"], ["clean", "1,024"]]
    page.with_name("cells.json").write_text(json.dumps({"about": {}, "tables": [{"cells": cells}]}))
    for form, text in (
        ("{tables.0.cells.0.1:f1[]}", "0.5 [0.4, 0.6]"),
        ("{tables.0.cells.1.1:%0}, {tables.0.cells.1.1:I0}", "97%, [96, 98]"),
        ("{tables.0.cells.2.1:n}", "1,024"),
    ):
        assert figures.filled(form, "cells") == text
    with pytest.raises(ValueError, match="no figure: 'ours'"):
        figures.filled("{tables.0.cells.0.0:f1}", "cells")


@pytest.fixture
def benchmark(page, monkeypatch, capsys):
    """A page with the table that a benchmark has printed, and the benchmark's file."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/steps.py", "--out", "steps.json"])
    out = page.with_name("steps.json")
    with tables.written(out, "2 x CPU") as found:
        found.start("ignored", {"way": "", "s (spread)": ".2f", "share": ".0%"})
        found.row("ours", (0.5, 0.4, 0.625), 0.65)
        found.row("naive", 1.25, None)
    assert figures.main([str(out), str(out)]) == 0
    printed = capsys.readouterr().out
    page.write_text("# Page\n\n## Speed\n" + printed[printed.index("\n|") :] + "\n## After\n")
    return page


def test_a_table_is_what_the_benchmark_printed(benchmark):
    part = {"section": "Speed", "tables": ["steps"], "quotes": []}
    rows = "| way | s (spread) | share |\n|---|---:|---:|\n| ours | 0.50 (0.40 to 0.62) | 65% |\n| naive | 1.25 | |"
    assert rows in figures.section("page.md", "Speed")
    assert list(figures.wrong("page.md", part)) == []
    benchmark.write_text(benchmark.read_text().replace("1.25", "1.2"))
    assert list(figures.wrong("page.md", part)) == [
        "page.md, Speed: a table is not as its file has it; --write puts it right"
    ]


def test_tables_are_put_into_the_page(benchmark, monkeypatch):
    parts = {"page.md": [{"section": "Speed", "tables": ["steps"]}]}
    monkeypatch.setattr(figures, "quotes", lambda: parts)
    whole = benchmark.read_text()
    benchmark.write_text(whole.replace("| ours | 0.50 (0.40 to 0.62) | 65% |", "| ours | 9 | 9% |\n| old | 9 | 9% |"))
    assert figures.main([]) == 1 and figures.main(["--write"]) == 0
    assert benchmark.read_text() == whole


def test_a_table_of_no_file_needs_a_reason(benchmark):
    head = "| way | s (spread) | share |"
    (found,) = figures.wrong("page.md", {"section": "Speed", "tables": []})
    assert "of no file" in found and head in found
    assert list(figures.wrong("page.md", {"section": "Speed", "tables": [], "own": {head: "by hand"}})) == []
    (found,) = figures.wrong("page.md", {"section": "After", "tables": ["steps"]})
    assert "no table of steps" in found


def test_what_was_written_down_from_a_page_says_so(benchmark):
    file, part = benchmark.with_name("steps.json"), {"section": "Speed", "tables": ["steps"]}
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"about": found["about"] | {"transcribed": "2026-11-26"}}))
    (said,) = figures.wrong("page.md", part)
    assert "steps was transcribed; the section has to say so" in said
    benchmark.write_text(benchmark.read_text().replace("## Speed\n", "## Speed\n\nOf May, transcribed.\n"))
    assert list(figures.wrong("page.md", part)) == []
