"""The files of a tokenizer: one list for what is fingerprinted, cached by, copied and replaced."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgt_titan.errors import UserError

from .files import read_json

# What makes ids; the others change how they are made, or what is rendered before.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
# An embedding table is a part of the trunk, and most licences ask that their text travels with the parts.
LICENCES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([._-].*)?", re.IGNORECASE)


def require_tokenizer(folder: Path) -> Path:
    """Its tokenizer.json.

    Raises:
        UserError: there is none.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: has no tokenizer.json (a fast tokenizer); write one with "
            "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return file


def check_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """That a folder's tokenizer is the model's, as far as tokenizer.json alone can say.

    Raises:
        UserError: there is none, it is no JSON, or it gives an id that the embedding table has no row for.
    """
    file, rows = require_tokenizer(folder), config.get("vocab_size")
    found = read_json(file)
    try:
        vocabulary = found["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((t, i) for i, (t, _) in enumerate(vocabulary))
        ids = {**dict(pairs), **{token["content"]: token["id"] for token in found.get("added_tokens") or []}}
        largest = max(ids, key=ids.__getitem__, default="")
    except (KeyError, TypeError, ValueError, AttributeError):
        return  # of a form that is not known here; loading it says more
    if isinstance(rows, int) and ids and ids[largest] >= rows:
        raise UserError(
            f"{file}: token {largest!r} has id {ids[largest]}, but config.json's vocab_size is {rows}; the tokenizer "
            "belongs to another model, or the table was not grown with it"
        )


def tokenizer_files(folder: str | Path) -> list[Path]:
    """Those that are in ``folder``, sorted by name; of a folder of templates, the files in it."""
    root = Path(folder)
    found: list[Path] = []
    for name in sorted(TOKENIZER_FILES):
        path = root / name
        found += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
        found += [path] if path.is_file() else []
    return found


def licence_files(folder: str | Path) -> list[Path]:
    """Those that are in ``folder``, sorted by name."""
    return sorted(path for path in Path(folder).iterdir() if path.is_file() and LICENCES.fullmatch(path.name))


def accompanying_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files and the licences: what travels with any part of a trunk."""
    return [*tokenizer_files(folder), *licence_files(folder)]


def is_accompanying(name: str) -> bool:
    """Whether an entry of a folder is one of these."""
    return name in TOKENIZER_FILES or LICENCES.fullmatch(name) is not None


def copy_accompanying(source: str | Path, out: Path, *, tokenizer: bool = True) -> None:
    """Copy them into the folder ``out``; without the tokenizer's, for whom is not to read tokens."""
    for file in accompanying_files(source) if tokenizer else licence_files(source):
        target = out / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
