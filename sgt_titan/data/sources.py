"""Rows of a data set, wherever it is, as chat turns.

``load_rows`` finds the rows (a preset, a hub name, local files) without reading them into memory;
``conversations`` makes a row into messages. Text is one user turn: a document is all prompt until ``prompt_tokens``
says otherwise.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from sgt_titan.config import schema
from sgt_titan.config.paths import expand
from sgt_titan.data.conversations import Conversation, Messages, Written, conversation
from sgt_titan.data.presets import DEMO_ROWS, DEMO_SEED, FIELDS, PRESETS, SUFFIXES, TURN_FIELDS, USUAL_COLUMNS
from sgt_titan.errors import UserError


@dataclass(frozen=True)
class Rows:
    """A sized, indexable source. ``fingerprint`` changes when its content does."""

    data: Any  # datasets.Dataset, JsonLines or GeneratedRows: __len__, __getitem__ -> dict
    name: str
    format: str
    columns: dict[str, str]
    fingerprint: str
    strip_suffix: str = ""
    files: tuple[tuple[int, str], ...] = field(default=())  # (first row, file name), ascending
    roles: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()  # columns

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.data[i]

    def where(self, i: int) -> str:
        """The row as a person finds it: its file and its number in the file, from 1 as editors count lines."""
        at = max((f for f in self.files if f[0] <= i), default=(0, self.name))
        return f"{at[1]}: row {i - at[0] + 1}"

    def messages(self, i: int) -> Messages:
        """Row i as turns; see ``conversation``."""
        return self.conversation(i).messages

    def conversation(self, i: int) -> Conversation:
        """Row i as turns, with its tools and the private values that it marks.

        Raises:
            UserError: the row cannot be used; MarkError: a mark that is not in the text. Both name the row.
        """
        row = self.data[i]
        try:
            found = conversation(row, self.format, self.columns, dict(self.roles))
        except UserError as error:
            raise type(error)(f"{self.where(i)}: {error}") from None
        messages = found.messages
        if self.strip_suffix and messages[-1]["role"] == "assistant":
            messages[-1]["content"] = messages[-1]["content"].removesuffix(self.strip_suffix)
        return found


class JsonLines:
    """Rows of JSON-lines files, read one at a time by byte offset.

    Not through the datasets library, which guesses types for whole columns and fails on rows without a key.
    Only offsets are held in memory, 8 bytes a row; blank lines are no rows.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.offsets = [_line_offsets(file) for file in self.files]
        self.starts = np.cumsum([0, *(len(o) for o in self.offsets)])
        self._streams: dict[int, IO[bytes]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        f = int(np.searchsorted(self.starts, i, side="right")) - 1
        if f not in self._streams:
            self._streams[f] = open(self.files[f], "rb")  # noqa: SIM115 (kept open; closed with the object)
        row_in_file = i - int(self.starts[f])
        self._streams[f].seek(int(self.offsets[f][row_in_file]))
        try:
            row = json.loads(self._streams[f].readline(), parse_float=Written)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
            why = "nested too deeply" if isinstance(error, RecursionError) else why
            raise UserError(f"{self.files[f]}: row {row_in_file + 1}: cannot be read as JSON ({why})") from None
        if not isinstance(row, dict):
            raise UserError(f"{self.files[f]}: row {row_in_file + 1}: must be a JSON object, is {type(row).__name__}")
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": {}}  # workers open their own

    @property
    def column_names(self) -> list[str]:
        """Keys of the first rows, in order of appearance: rows may leave keys out."""
        return list(dict.fromkeys(key for i in range(min(len(self), 100)) for key in self[i]))


def _line_offsets(file: Path) -> np.ndarray:
    """Byte offset of every line that is not blank."""
    offsets, at = array("q"), 0
    with open(file, "rb") as stream:
        for line in stream:
            if line.strip():
                offsets.append(at)
            at += len(line)
    return np.frombuffer(offsets, dtype=np.int64) if offsets else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class GeneratedRows:
    """The demo corpus: row i is made when asked for.

    The shipped trunk was trained on rows of seed 0 and evaluated on rows of seed 1: these are new to it.
    """

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        from sgt_titan.demo.corpus import conversations

        if not 0 <= i < self.count:
            raise IndexError(i)
        return next(iter(conversations(1, seed=DEMO_SEED, start=i)))


def load_rows(data: schema.Data) -> Rows:
    """Open the source named in the configuration. Rows stay on disk.

    Raises:
        UserError: unknown preset, missing file, unreadable content, no rows, no usable columns.
    """
    if not data.source:
        raise UserError(f"data.source: is empty; name a preset ({', '.join(PRESETS)}), a hub data set or a file")
    preset = PRESETS.get(data.source)
    if data.source == "demo":
        found, name, fingerprint, files = _open_demo(data)
    else:
        path = expand(preset.path if preset else data.source, "data.source")
        if preset and not preset.path.startswith("${"):
            found, name, fingerprint, files = _open_hub(data, path)
        elif os.path.exists(path):
            found, name, fingerprint, files = _open_local(path)
        elif not preset and "/" not in path and (near := difflib.get_close_matches(path, PRESETS, n=1, cutoff=0.7)):
            raise UserError(
                f"data.source: unknown preset {path!r}; did you mean {near[0]}? (a hub data set is owner/name)"
            )
        elif not preset and _is_hub_name(path):
            found, name, fingerprint, files = _open_hub(data, path)
        else:
            raise UserError(_missing(data.source, path, is_preset=preset is not None))
    if len(found) == 0:
        raise UserError(f"{name}: no usable rows: the source is empty")
    present = list(found[0]) if isinstance(found, GeneratedRows) else list(found.column_names)
    fmt, columns = _fields(data, preset and preset.format, dict(preset.columns) if preset else {}, present, name)
    unused = tuple(column for column in present if column not in columns.values())
    roles = tuple(sorted(data.roles.items()))
    suffix = preset.strip_suffix if preset else ""
    return Rows(found, name, fmt, columns, fingerprint, suffix, files, roles, unused)


def _fields(
    data: schema.Data, preset_format: str | None, preset_columns: dict[str, str], present: list[str], name: str
) -> tuple[str, dict[str, str]]:
    """The format and the column of each of its fields."""
    given = {**preset_columns, **data.columns}
    for key, column in data.columns.items():
        if key in TURN_FIELDS:
            continue
        if key not in USUAL_COLUMNS:
            near = difflib.get_close_matches(key, USUAL_COLUMNS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; fields are {', '.join(USUAL_COLUMNS)}"
            raise UserError(f"data.columns: unknown field {key!r}{hint}")
        if column and column not in present:
            raise UserError(
                f"data.columns.{key}: {name} has no column {column!r}; its columns are {', '.join(present)}"
            )
    columns = {}
    for key, usual in USUAL_COLUMNS.items():
        column = given[key] if key in given else next((c for c in usual if c in present), None)
        if column in present:
            columns[key] = column
    complete = [f for f in ("chat", "instruction", "text") if all(k in columns for k in FIELDS[f][0])]
    if data.format != "auto":
        fmt = data.format
    elif preset_format:
        fmt = preset_format
    elif complete:
        fmt = complete[0]
    else:
        raise UserError(
            f"data.format: cannot tell the format of {name} from its columns ({', '.join(present)}); set data.format "
            "and data.columns"
        )
    required, optional = FIELDS[fmt]
    for key in required:
        if key not in columns:
            raise UserError(
                f"{name}: row 1: has no {given.get(key, key)!r} (field {key!r} of format {fmt}); its columns are "
                f"{', '.join(present)}; set data.columns.{key}"
            )
    turns = {k: v for k, v in data.columns.items() if k in TURN_FIELDS and v}
    if turns and fmt != "chat":
        raise UserError(f"data.columns.{next(iter(turns))}: is a key of turns, which format {fmt} has none of")
    return fmt, {k: columns[k] for k in (*required, *optional) if k in columns} | turns


def _is_hub_name(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None and not _kind(path)


def _missing(source: str, path: str, *, is_preset: bool) -> str:
    if is_preset:
        return f"data.source: preset {source!r} needs {path}, which does not exist; check SGT_TITAN_ASSETS"
    return f"data.source: {path} does not exist"


def _open_demo(data: schema.Data) -> tuple[Any, str, str, tuple]:
    from sgt_titan.demo import corpus

    count = data.max_samples or DEMO_ROWS
    code = hashlib.sha256(Path(corpus.__file__).read_bytes()).hexdigest()
    return GeneratedRows(count), "demo", f"demo:{DEMO_SEED}:{count}:{code}", ()


def _open_hub(data: schema.Data, name: str) -> tuple[Any, str, str, tuple]:
    datasets = _datasets()
    try:
        with _quiet(datasets):
            found = datasets.load_dataset(name, data.subset or None, split=data.split)
    except Exception as error:
        raise UserError(
            f"data.source: {data.source!r} is no preset ({', '.join(PRESETS)}) and no existing file, and the hub did "
            f"not deliver {name!r} (split {data.split!r}): {_reason(error)}"
            if data.source not in PRESETS
            else f"data.source: the hub did not deliver {name!r} (split {data.split!r}): {_reason(error)}"
        ) from error
    return found, name, f"hub:{name}:{data.subset}:{data.split}:{found._fingerprint}:{len(found)}", ()


def _open_local(path: str) -> tuple[Any, str, str, tuple]:
    if os.path.isdir(path) and os.path.exists(os.path.join(path, "state.json")):
        datasets = _datasets()
        try:
            found = datasets.load_from_disk(path)
        except Exception as error:
            raise UserError(f"{path}: cannot be read as a saved data set: {_reason(error)}") from error
        if not hasattr(found, "column_names") or isinstance(found, dict):
            raise UserError(f"{path}: holds several splits; name one of its folders")
        return found, path, f"disk:{_hash_files(_listing(path))}", ()
    files = _data_files(path)
    if all(_is_json_lines(file) for file in files):
        lines = JsonLines(files)
        starts = [(int(s), str(f)) for s, f in zip(lines.starts[:-1], files, strict=True)]
        return lines, path, f"files:{_hash_files(files)}", tuple(starts)
    datasets = _datasets()
    parts, starts, row = [], [], 0
    for file in files:
        part = _read_file(datasets, file)
        starts.append((row, str(file)))
        parts.append(part)
        row += len(part)
    parts = [p for p in parts if len(p)] or parts[:1]
    try:
        found = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except Exception as error:
        raise UserError(f"{path}: its files have different columns: {_reason(error)}") from error
    return found, path, f"files:{_hash_files(files)}", tuple(starts)


def _data_files(path: str) -> list[Path]:
    if os.path.isfile(path):
        if not _kind(path):
            raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        return [Path(path)]
    # Left by the datasets library and the hub beside the data.
    about = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
    files = [f for f in _listing(path) if _kind(f.name) and f.name not in about]
    kinds = sorted({_kind(f.name) for f in files})
    if not files:
        raise UserError(f"{path}: no data files in this folder; known are {', '.join(SUFFIXES)}")
    if len(kinds) > 1:
        raise UserError(f"{path}: mixes {' and '.join(kinds)} files; name one file or a folder with one kind")
    return files


def _listing(path: str) -> list[Path]:
    root = Path(path)
    return sorted(f for f in root.rglob("*") if f.is_file() and not any(p.startswith(".") for p in
                                                                        f.relative_to(root).parts))  # fmt: skip


def _kind(name: str) -> str:
    return next((SUFFIXES[s] for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")


def _is_json_lines(file: Path) -> bool:
    """Uncompressed JSON, not one big array."""
    if not file.name.lower().endswith((".json", ".jsonl")):
        return False
    with open(file, "rb") as stream:
        return not stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _read_file(datasets: Any, file: Path) -> Any:
    kind = _kind(file.name)
    if file.stat().st_size == 0:
        return datasets.Dataset.from_dict({})
    # Text that reads "NA" or "null" is text.
    options = {"keep_default_na": False} if kind == "csv" else {}
    try:
        with _quiet(datasets):
            return datasets.load_dataset(kind, data_files=str(file), split="train", **options)
    except Exception as error:
        raise UserError(f"{file}: cannot be read as {kind}: {_reason(error)}") from error


def _hash_files(files: Sequence[Path]) -> str:
    """sha256 over names (not folders: a moved data set is the same one) and bytes."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            total.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return total.hexdigest()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data: the datasets library is missing; pip install 'sgt-titan[train]'") from error
    return datasets


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the library's own progress bars: ours is one line."""
    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """The innermost cause, one short line: the outer ones only say that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:160]}" if line else type(error).__name__
