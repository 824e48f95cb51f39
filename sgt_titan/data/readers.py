"""Files of rows, each as something with a length and rows by number. Which files: ``files.py``.

Text stays text: nothing guesses that ``007`` is a number or an empty cell something else than a null. JSON lines are
read in place, by byte offset; what has no lines to jump to (compressed files, JSON arrays, CSV, plain text) is written
as JSON lines once, beside the token cache, under the hash of its bytes: a replaced file is another one, whatever
its date. Parquet is read in place, a batch at a time. Nothing is held in memory but offsets, 8 bytes a row.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import mmap
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sgt_titan import disk
from sgt_titan.config import schema
from sgt_titan.data.conversations import Written
from sgt_titan.data.files import COMPRESSED, beside, kind, reason, some
from sgt_titan.errors import UserError

_BATCH = 1000
_BAD = "\0why a row of a table is none"  # a key
_LFS = b"version https://git-lfs.github.com/spec/"
_COPIES_VERSION = 2  # 2: a row of too few cells is none
_LONGEST_INT = 300  # digits; Python refuses to read those of 4,300


class _Twice(ValueError):
    """An object with a key that stands in it twice."""


def _constant(name: str) -> Written | None:
    """What Python and pandas write beyond JSON: NaN is a value that is missing."""
    return None if name == "NaN" else Written(name)


def _integer(digits: str) -> int | Written:
    return Written(digits) if len(digits) > _LONGEST_INT or digits == "-0" else int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises _Twice: JSON readers disagree on which of the two values counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice("a key stands twice in one object")
    return found


# json.loads would make one for every row.
_DECODER = json.JSONDecoder(
    parse_float=Written, parse_constant=_constant, parse_int=_integer, object_pairs_hook=_object
)
WINDOW = 1 << 24  # bytes, a multiple of every page
_MANY_MISSES = 1000


def digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(files: Sequence[Path], digests: Sequence[str] = ()) -> str:
    """sha256 over names (not folders: a moved data set is the same one) and bytes."""
    total = hashlib.sha256()
    for file, found in zip(files, digests or map(digest, files), strict=True):
        total.update(f"{file.name}\0{found}\0".encode())
    return total.hexdigest()


def open_files(
    files: Sequence[Path], data: schema.Data, left: list[str]
) -> tuple[Any, str, tuple[tuple[int, str], ...]]:
    """Rows, their fingerprint, and (first row, file name) of each file.

    Args:
        left: gets what is there and not read, in words.

    Raises:
        UserError: a file that is not what its name says.
    """
    for file in files:
        _check_beginning(file)
    digests = [digest(file) for file in files]
    what = kind(files[0].name)
    if what == "parquet":
        rows: Any = ParquetRows(files)
    elif what == "arrow":
        rows = ArrowRows(files)
    else:
        rows = JsonLines([_as_lines(file, found, data) for file, found in zip(files, digests, strict=True)], files)
    starts = tuple((int(start), str(file)) for start, file in zip(rows.starts[:-1], files, strict=True))
    if empty := [file.name for file, count in zip(files, np.diff(rows.starts), strict=True) if not count]:
        left.append(some("files without a row", empty))
    return rows, f"files:{hash_files(files, digests)}", starts


def _check_beginning(file: Path) -> None:
    """Raises UserError for what is no file of rows whatever its name: a pointer, text in two bytes a character."""
    with open(file, "rb") as stream:
        head = stream.read(1024)
    if head.startswith(_LFS):
        raise UserError(f"{file}: is a pointer of Git LFS and not the data; fetch it (git lfs pull)")
    if os.path.splitext(file.name.lower())[1] in COMPRESSED or kind(file.name) in ("parquet", "arrow"):
        return
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        raise UserError(f"{file}: is no UTF-8 text (UTF-16, or binary); save it as UTF-8")


class JsonLines:
    """Rows of JSON-lines files, read one at a time by byte offset; blank lines are no rows.

    Args:
        shown: the files to name in errors, if these are copies.
    """

    def __init__(self, files: Sequence[Path], shown: Sequence[Path] = ()) -> None:
        self.files, self.shown = list(files), list(shown or files)
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
        number = i - int(self.starts[f])
        self._streams[f].seek(int(self.offsets[f][number]))
        line = self._streams[f].readline()
        try:
            row = _DECODER.decode(line.decode(json.detect_encoding(line), "surrogatepass"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.shown[f]}: row {number + 1}: cannot be read as JSON ({_why(error)})") from None
        if not isinstance(row, dict):
            raise UserError(f"{self.shown[f]}: row {number + 1}: must be a JSON object, is {type(row).__name__}")
        if _BAD in row:
            raise UserError(f"{self.shown[f]}: row {number + 1}: {row[_BAD]}")
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": {}}  # workers open their own

    @property
    def column_names(self) -> list[str]:
        """Keys of the first rows, in order of appearance: rows may leave keys out. See ``has``."""
        found: dict[str, None] = {}
        first: UserError | None = None
        for i in range(min(len(self), 100)):
            try:
                found |= dict.fromkeys(self[i])
            except UserError as error:
                first = first or error  # one bad row among others is told of when it is read
        if first and not found:
            raise UserError(f"{first}; rows are objects, one a line, or an array of them")
        return list(found)

    def has(self, column: str) -> bool:
        """Whether any row has this key, wherever it first appears."""
        needle = json.dumps(column, ensure_ascii=False).encode()
        for f, file in enumerate(self.files):
            if not len(self.offsets[f]):
                continue
            with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                at, misses = _find(content, needle, 0), 0
                while at >= 0:
                    row = int(np.searchsorted(self.offsets[f], at, side="right")) - 1
                    try:
                        if column in self[int(self.starts[f]) + row]:
                            return True
                    except UserError:
                        pass  # a bad row is told of when it is read
                    misses += 1
                    if misses >= _MANY_MISSES:
                        return True  # a word of every row; a column that nobody has costs nothing
                    following = self.offsets[f][row + 1] if row + 1 < len(self.offsets[f]) else len(content)
                    at = _find(content, needle, int(following))
        return False


def _find(content: mmap.mmap, needle: bytes, start: int) -> int:
    """``content.find``, window by window: pages that were looked through count as this process's memory no longer."""
    for begin in range(start - start % mmap.PAGESIZE, len(content), WINDOW):
        end = min(begin + WINDOW, len(content))
        at = content.find(needle, max(start, begin), min(end + len(needle) - 1, len(content)))
        if at >= 0:
            return at
        if hasattr(mmap, "MADV_DONTNEED"):
            content.madvise(mmap.MADV_DONTNEED, begin, end - begin)
    return -1


def _why(error: Exception) -> str:
    """Why a line is no JSON, without a word of it."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _line_offsets(file: Path) -> np.ndarray:
    """Byte offset of every line that is not blank."""
    offsets, at = array("q"), 0
    with open(file, "rb") as stream:
        for line in stream:
            if line.strip():
                offsets.append(at)
            at += len(line)
    return np.frombuffer(offsets, dtype=np.int64) if offsets else np.zeros(0, dtype=np.int64)


class ParquetRows:
    """Rows of Parquet files of the same columns, read in place; fast in ascending order."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        opened = [_parquet(file) for file in self.files]
        self.starts = np.cumsum([0, *(f.metadata.num_rows for f in opened)])
        self.groups = [
            np.cumsum([0, *(f.metadata.row_group(g).num_rows for g in range(f.metadata.num_row_groups))])
            for f in opened
        ]
        self.column_names = list(opened[0].schema_arrow.names)
        for file, found in zip(self.files, opened, strict=True):
            names = list(found.schema_arrow.names)
            if len(set(names)) < len(names):
                raise UserError(f"{file}: column {next(c for c in names if names.count(c) > 1)!r} stands in it twice")
            if set(names) != set(self.column_names):
                raise UserError(f"{file}: has other columns than {self.files[0].name}; name files of one kind")
        self._reset()

    def _reset(self) -> None:
        self._at: tuple[int, int, list[dict[str, Any]]] = (0, 0, [])  # rows [start, stop) that are in memory
        self._batches: Iterator[Any] | None = None  # what follows them in their file, which ends at
        self._end = 0

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        while not self._at[0] <= i < self._at[1]:
            f = int(np.searchsorted(self.starts, i, side="right")) - 1
            first = int(self.starts[f])
            group = int(np.searchsorted(self.groups[f], i - first, side="right")) - 1
            begin, stop = first + int(self.groups[f][group]), self._at[1]
            if self._batches is None or i < stop or i >= self._end or begin > stop:
                groups = range(group, len(self.groups[f]) - 1)
                self._batches = _parquet(self.files[f]).iter_batches(_BATCH, row_groups=list(groups))
                stop, self._end = begin, int(self.starts[f + 1])
            try:
                batch = next(self._batches)
            except Exception as error:
                raise UserError(f"{self.files[f]}: cannot be read as parquet: {reason(error)}") from None
            self._at = stop, stop + batch.num_rows, batch.to_pylist()
        return self._at[2][i - self._at[0]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at": (0, 0, []), "_batches": None}


def _parquet(file: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file, memory_map=True)
    except Exception as error:
        raise UserError(f"{file}: cannot be read as parquet: {reason(error)}") from None


class ArrowRows:
    """Rows of Arrow stream files, as the datasets library writes them, mapped into memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        import datasets

        parts = []
        for file in files:
            with open(file, "rb") as stream:
                if stream.read(6) == b"ARROW1":
                    raise UserError(f"{file}: is in Arrow's file format (Feather); write a stream, or Parquet")
            try:
                parts.append(datasets.Dataset.from_file(str(file)))
            except Exception as error:
                raise UserError(f"{file}: cannot be read as arrow: {reason(error)}") from None
        self.starts = np.cumsum([0, *map(len, parts)])
        try:
            self.data = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        except Exception as error:
            raise UserError(f"{files[0].parent}: its files have different columns: {reason(error)}") from None
        self.column_names = self.data.column_names

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.data[i]


def _as_lines(file: Path, found: str, data: schema.Data) -> Path:
    """The file itself if its rows are lines of JSON, else a copy in which they are."""
    what = kind(file.name)
    if what == "json" and os.path.splitext(file.name.lower())[1] not in COMPRESSED and not _is_array(file):
        return file
    target = beside(data, "rows") / f"{found}.{what}.{_COPIES_VERSION}.jsonl"
    if target.exists():
        return target
    try:
        with disk.replacing(target) as work, _decompressed(file) as stream, open(work, "w", encoding="utf-8") as out:
            for line in _LINES[what](stream):
                out.write(line)
                out.write("\n")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{file}: cannot be read as {what}: nested too deeply") from None
    except Exception as error:
        raise UserError(f"{file}: cannot be read as {what}: {reason(error)}") from None
    return target


def _decompressed(file: Path) -> IO[bytes]:
    import pyarrow as pa

    codec = COMPRESSED.get(os.path.splitext(file.name.lower())[1])
    return io.BufferedReader(pa.input_stream(str(file), compression=codec), 1 << 20)


def _is_array(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _json_lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines, or the elements of an array, as they are written."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    first = text.readline()
    while first and not first.strip():
        first = text.readline()
    if not first.lstrip().startswith("["):
        yield from (line.rstrip("\r\n") for line in (first,) if line.strip())
        yield from (line.rstrip("\r\n") for line in text if line.strip())
        return
    content = first + text.read()
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # only where an element ends is wanted
    space = re.compile(r"[\s,]*")
    at = content.index("[") + 1
    while True:
        between = space.match(content, at)
        assert between is not None  # it may be empty
        at = between.end()
        if content[at : at + 1] == "]":
            if content[at + 1 :].strip():
                raise UserError(
                    'holds more behind its first array; a row must be an object, such as {"messages": [...]}'
                )
            return
        _, end = decoder.raw_decode(content, at)
        yield re.sub(r"[\r\n]+", " ", content[at:end])
        at = end


def _csv_lines(stream: IO[bytes], delimiter: str) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    header = next(reader, None)
    if header is None:
        return
    if len(set(header)) < len(header):
        raise UserError(f"column {next(c for c in header if header.count(c) > 1)!r} stands twice in the first line")
    for cells in reader:
        if not cells or (len(cells) == 1 < len(header) and not cells[0].strip()):
            continue  # a blank line
        row = dict(zip(header, cells, strict=False))
        if len(cells) != len(header):
            row = {_BAD: f"has {len(cells)} cells, the first line has {len(header)}"}
        yield json.dumps(row, ensure_ascii=False)


def _text_lines(stream: IO[bytes]) -> Iterator[str]:
    for line in io.TextIOWrapper(stream, encoding="utf-8-sig"):
        if line.strip():
            yield json.dumps({"text": line.rstrip("\r\n")}, ensure_ascii=False)


_LINES = {
    "json": _json_lines,
    "csv": lambda stream: _csv_lines(stream, ","),
    "tsv": lambda stream: _csv_lines(stream, "\t"),
    "text": _text_lines,
}
