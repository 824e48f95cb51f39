"""The directory of an evaluation: a JSON file per finished part, so that an interruption costs one part.

``evaluation.json`` says what is being measured; parts of another evaluation are never mixed in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgt_titan import disk
from sgt_titan.errors import UserError

ABOUT = "evaluation.json"


def open_parts(directory: Path, identity: Mapping[str, Any]) -> Parts:
    """Begin or go on in ``directory``; ``identity`` is everything that decides the numbers (JSON values).

    Raises:
        UserError: the directory belongs to something else, holds an evaluation of another identity, or cannot be
            written.
    """
    identity = json.loads(json.dumps(identity))
    about = directory / ABOUT
    if about.is_file():
        try:
            found = json.loads(about.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{about}: damaged; delete {directory} or choose another --out")
        differing = sorted(key for key in identity.keys() | found.keys() if identity.get(key) != found.get(key))
        if differing:
            key = differing[0]
            raise UserError(
                f"--out {directory}: holds an evaluation of another configuration ({key} is {_short(found.get(key))} "
                f"there, {_short(identity.get(key))} here); choose another --out, or delete it"
            )
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"--out {directory}: exists and is no evaluation of ours; choose another --out")
    try:
        (directory / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {directory}: cannot be written: {error.strerror}") from error
    if not about.is_file():
        write(about, json.dumps(identity, indent=1) + "\n")
    return Parts(directory)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def write(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old one or the new one. Raises UserError where it cannot be written."""
    try:
        disk.write(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


class Parts:
    """Finished parts by name (``sgt/attacks/nearest_l2``); without a directory they live as long as this object."""

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._held: dict[str, dict[str, Any]] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """The part, or None where it is not there or was damaged."""
        if self.directory is None:
            return self._held.get(name)
        try:
            return json.loads(self._path(self.directory, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, name: str, part: Mapping[str, Any]) -> None:
        text = json.dumps(part, ensure_ascii=False, allow_nan=False) + "\n"
        if self.directory is None:
            self._held[name] = json.loads(text)  # as a file would give it back
        else:
            write(self._path(self.directory, name), text)

    @staticmethod
    def _path(directory: Path, name: str) -> Path:
        return directory / "parts" / (name.replace("/", "--") + ".json")
