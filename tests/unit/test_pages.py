"""The Markdown pages: lines that fit, links that lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))

import prose  # noqa: E402

PAGES = prose.pages()
LONG = "word " * 30


def test_prose_is_wrapped(capsys):
    assert prose.main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "kept",
    ["| " + LONG + "|", "    " + LONG, "```\n" + LONG + "\n```", "# " + LONG, "x" * 200, "short\nlines\nstay"],
)
def test_what_stays(kept):
    assert prose.reflowed(kept) == kept


def test_what_is_wrapped_means_the_same():
    item = prose.reflowed("- " + LONG + "1. word and `a b c d` - that " + LONG + "\n- next")
    lines = item.split("\n")
    assert all(len(line) <= 120 for line in lines) and lines[-1] == "- next"
    assert all(line.startswith("  ") for line in lines[1:-1])
    assert not any(re.match(r"\s*([-*+]|\d+\.) ", line) for line in lines[1:-1]), "a word became a list item"
    assert "`a b c d`" in item
    quote = prose.reflowed("> " + LONG + LONG).split("\n")
    assert len(quote) == 3 and all(line.startswith("> word") for line in quote)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_somewhere(page):
    """Files, and headings where one is named; addresses of the web are not asked."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (page.parent / file).resolve() if file else page
        if (REPO / "docs") in page.parents:  # what the site has: its own files
            assert found.is_file() and (REPO / "docs") in found.parents, f"{page.name}: {target} is not of docs/"
        assert found.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page.name}: {target}"


def test_files_that_contributing_names_exist():
    """In prose and in the newcomer's questions: relative to the checkout or to the package."""
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {name.split(":")[0] for name in re.findall(r"`([\w./]+\.(?:py|md|txt|yaml|toml|sh)(?:: \w+)?)`", text)}
    assert len(named) > 40
    missing = [name for name in sorted(named) if not any((root / name).exists() for root in (REPO, REPO / "sgt_titan"))]
    assert not missing


def test_the_version_is_one():
    import sgt_titan

    cited = re.search(r"^version: (.+)$", (REPO / "CITATION.cff").read_text(), re.MULTILINE)
    noted = re.search(r"^## (\d\S*)", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited and noted and cited[1] == noted[1] == sgt_titan.__version__
