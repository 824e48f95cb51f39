"""The schema in words: for ``sgt-titan train --help``, and as ``docs/CONFIG.md``.

``python -m sgt_titan.config.help > docs/CONFIG.md`` writes the latter; a test keeps it up to date.
"""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from sgt_titan.config.keys import Leaf, choices, inner, is_optional, keys, sections, takes_items
from sgt_titan.config.schema import Auto

_HEADER = """\
# Configuration

Every option of a training run, printed from `sgt_titan/config/schema.py` by
`python -m sgt_titan.config.help > docs/CONFIG.md`. Do not edit.

A file in `train_configs/` holds values of these keys and nothing else; `extends: other.yaml` at its top
starts from another file in the same folder (one level). On the command line a key is
`--section.key value` or `--section.key=value`; a boolean may stand alone (`--metrics.wandb`); an item of a
mapping is `--data.columns.text story`. `sgt-titan train NAME --dry-run` prints the values of a run.
"""


def help_text(width: int = 100) -> str:
    """Sections, keys, types, defaults and help of every option, wrapped to ``width`` columns."""
    lines = ["options of a run, as --section.key value:"]
    for section, text in sections().items():
        own = _own(section)
        if not own:
            continue
        lines += ["", *textwrap.wrap(f"{section}: {text}", width)]
        for key, leaf in own.items():
            lines.append(f"  --{key} {_kind(leaf)} (default: {_value(leaf.default)})")
            lines += textwrap.wrap(leaf.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """The same as Markdown, one table a section."""
    lines = [_HEADER]
    for section, text in sections().items():
        own = _own(section)
        if not own:
            continue
        about = textwrap.fill(_cell(text), 120, break_on_hyphens=False)
        lines += [f"## {section}", "", about, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, leaf in own.items():
            cells = (f"`{key}`", _kind(leaf), f"`{_value(leaf.default)}`", leaf.help)
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _own(section: str) -> dict[str, Leaf]:
    """The keys directly in a section, without those of its subsections."""
    return {key: leaf for key, leaf in keys().items() if key.rpartition(".")[0] == section}


def _kind(leaf: Leaf) -> str:
    return _type(leaf.hint) + (f", {leaf.must.words}" if leaf.must else "")


def _type(hint: Any) -> str:
    if choices(hint):
        return "|".join(choices(hint))
    if is_optional(hint):
        return f"{_type(inner(hint))}|none"
    if hint is Auto:
        return "true|false|auto"
    return "mapping" if takes_items(hint) else hint.__name__


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if value == "":
        return '""'
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(markdown(), end="")
