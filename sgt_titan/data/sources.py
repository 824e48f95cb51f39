"""Rows of a data set, wherever it is, as chat turns.

``load_rows`` finds the rows (a preset, a hub name, local files) without reading them into memory;
``conversations`` makes a row into messages. Text is one user turn: a document is all prompt until ``prompt_tokens``
says otherwise.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sgt_titan.config import schema
from sgt_titan.config.fields import FIELDS, TURN_FIELDS, USUAL_COLUMNS
from sgt_titan.config.paths import expand
from sgt_titan.data.conversations import Conversation, Messages, conversation
from sgt_titan.data.files import files_of, kind, listing, reason, some, without_query
from sgt_titan.data.presets import DEMO_ROWS, DEMO_SEED, PRESETS
from sgt_titan.data.readers import hash_files, open_files
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
    left: tuple[str, ...] = ()  # files and splits that are not read, in words
    first: frozenset[str] = frozenset()  # keys of the first rows, where later ones may have others

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
        if self.first and not row.keys() <= self.first:
            late = [key for key in row if key not in self.first and row[key] not in (None, "", [], {})]
            late = [f"column {key[:40]}, which no early row has" for key in late if key not in self.columns.values()]
            found = replace(found, ignored=(*found.ignored, *late))
        messages = found.messages
        if self.strip_suffix and messages[-1]["role"] == "assistant":
            messages[-1]["content"] = messages[-1]["content"].removesuffix(self.strip_suffix)
        return found


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
    if preset and (data.source == "demo" or preset.path.startswith("${")) and (data.subset or data.split != "train"):
        key = "subset" if data.subset else "split"
        raise UserError(f"data.{key}: {getattr(data, key)!r}, but the preset {data.source} has none; leave it out")
    left: list[str] = []
    if data.source == "demo":
        found, name, fingerprint, files = _open_demo(data)
    else:
        path = expand(preset.path if preset else data.source, "data.source")
        if preset and not preset.path.startswith("${"):
            found, name, fingerprint, files = _open_hub(data, path)
        elif os.path.exists(path) or "\n" in path or "://" in path or re.search(r"[*?\[]", path):
            found, name, fingerprint, files = _open_local(path, data, left)
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
    late = getattr(found, "has", lambda column: False)
    preset_columns = dict(preset.columns) if preset else {}
    fmt, columns = _fields(data, preset.format if preset else None, preset_columns, present, name, late)
    unused = tuple(column for column in present if column not in columns.values())
    first = frozenset(present) if hasattr(found, "has") else frozenset()
    roles = tuple(sorted(data.roles.items()))
    suffix = preset.strip_suffix if preset else ""
    return Rows(found, name, fmt, columns, fingerprint, suffix, files, roles, unused, tuple(left), first)


def _fields(
    data: schema.Data,
    preset_format: str | None,
    preset_columns: dict[str, str],
    present: list[str],
    name: str,
    late: Callable[[str], bool],
) -> tuple[str, dict[str, str]]:
    """The format and the column of each of its fields.

    Args:
        present: columns of the first rows. late: whether a later row has a column.
    """
    given = {**preset_columns, **data.columns}
    for key, column in data.columns.items():
        if key in TURN_FIELDS:
            continue
        if key not in USUAL_COLUMNS:
            near = difflib.get_close_matches(key, USUAL_COLUMNS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; fields are {', '.join(USUAL_COLUMNS)}"
            raise UserError(f"data.columns: unknown field {key!r}{hint}")
        if column and column not in present and not late(column):
            raise UserError(
                f"data.columns.{key}: {name} has no column {column!r}; its columns are {', '.join(present)}"
            )
    columns: dict[str, str] = {}
    for key, usual in USUAL_COLUMNS.items():
        wanted = given[key] if key in given else next((c for c in usual if c in present), "")
        if wanted and (wanted in present or key in data.columns):
            columns[key] = wanted
    complete = [f for f in ("chat", "instruction", "text") if all(k in columns for k in FIELDS[f][0])]
    fmt = data.format if data.format != "auto" else preset_format or next(iter(complete), "")
    if not fmt:
        raise UserError(
            f"data.format: cannot tell the format of {name} from its columns ({', '.join(present)}); set data.format "
            "and data.columns"
        )
    required, optional = FIELDS[fmt]
    for key in optional:  # rows may leave them out, the first hundred too
        if key not in columns and key not in given and (later := next(filter(late, USUAL_COLUMNS[key]), "")):
            columns[key] = later
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
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None and not kind(path)


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
            f"not deliver {name!r} (split {data.split!r}): {reason(error)}"
            if data.source not in PRESETS
            else f"data.source: the hub did not deliver {name!r} (split {data.split!r}): {reason(error)}"
        ) from error
    return found, name, f"hub:{name}:{data.subset}:{data.split}:{found._fingerprint}:{len(found)}", ()


def _open_local(path: str, data: schema.Data, left: list[str]) -> tuple[Any, str, str, tuple]:
    root = Path(path, data.subset) if data.subset else Path(path)
    if (root / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in root.iterdir() if (folder / "state.json").is_file())
        if data.split not in splits:
            raise UserError(f"data.split: {root} has no split {data.split!r}; it has {', '.join(splits)}")
        if splits[1:]:
            left.append(some("other splits", [split for split in splits if split != data.split]))
        return _open_saved(root / data.split)
    if (root / "state.json").is_file():
        if data.split != "train":
            raise UserError(f"data.split: {data.split!r}, but {root} is one saved data set without splits")
        return _open_saved(root)
    found, fingerprint, starts = open_files(files_of(path, data, left), data, left)
    return found, without_query(path.replace("\n", ", ")), fingerprint, starts


def _open_saved(root: Path) -> tuple[Any, str, str, tuple]:
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(root))
    except Exception as error:
        raise UserError(f"{root}: cannot be read as a saved data set: {reason(error)}") from error
    return found, str(root), f"disk:{hash_files(listing(root))}", ()


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
