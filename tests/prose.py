"""Prose of the Markdown pages in lines of at most 120 columns: ``python tests/prose.py [--write] [FILE ...]``.

A paragraph or list item with a longer line is wrapped anew; tables, code, headings and what has no place to break stay.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
WIDTH = 120
GLUE = "\x00"  # stands for a space at which no line may end
_ITEM = re.compile(r"(\s*(?:> ?)*\s*)((?:[-*+]|\d{1,2}[.)])\s+)?")  # "674. And" ends a sentence
_FENCE = re.compile(r"\s*(```|~~~)")
_CODE_SPAN = re.compile(r"`[^`]+`")
# At the start of a line these words would mean something.
_MEANS = re.compile(r" (?=(?:[-*+]|\d+[.)]|#{1,6}|>|\||=+|:::?|!!!)( |$))")


def pages() -> list[Path]:
    found = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=REPO, text=True, capture_output=True, check=True)
    return [REPO / name for name in found.stdout.split("\0") if name]


def blocks(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Runs of lines: whether they are one paragraph or list item, and the lines."""
    paragraph: list[str] = []
    fenced, blank = False, True
    for line in text.split("\n"):
        stripped = line.strip()
        bare = stripped.lstrip("> ")
        fence = bool(_FENCE.match(line))
        item = _ITEM.match(line)
        code = line.startswith("    ") and blank and not paragraph
        fixed = fenced or fence or code or not bare or bare.startswith(("|", "#", "<", "!!!", "???", "[^", "---"))
        if paragraph and (fixed or (item and item[2])):
            yield True, paragraph
            paragraph = []
        if fixed:
            yield False, [line]
        else:
            paragraph.append(line)
        fenced ^= fence
        blank = not stripped or code
    if paragraph:
        yield True, paragraph


def wrapped(lines: list[str]) -> list[str]:
    """A paragraph in lines that fit, if one does not."""
    if all(len(line) <= WIDTH for line in lines):
        return lines
    quote, marker = _ITEM.match(lines[0]).groups()
    first, rest = quote + (marker or ""), quote + " " * len(marker or "")
    text = " ".join([lines[0][len(first) :].strip(), *(line.lstrip("> ").strip() for line in lines[1:])])
    text = _CODE_SPAN.sub(lambda span: span[0].replace(" ", GLUE) if len(span[0]) < 70 else span[0], text)
    text = _MEANS.sub(GLUE, text)
    found = textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(GLUE, " ") for line in found]


def reflowed(text: str) -> str:
    return "\n".join(line for is_prose, lines in blocks(text) for line in (wrapped(lines) if is_prose else lines))


def main(words: list[str]) -> int:
    write = "--write" in words
    files = [Path(word) for word in words if not word.startswith("--")] or pages()
    wrong = [file for file in files if reflowed(file.read_text(encoding="utf-8")) != file.read_text(encoding="utf-8")]
    for file in wrong:
        print(f"{file}: {'wrapped' if write else f'has prose beyond {WIDTH} columns: python tests/prose.py --write'}")
        if write:
            file.write_text(reflowed(file.read_text(encoding="utf-8")), encoding="utf-8")
    return int(bool(wrong) and not write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
