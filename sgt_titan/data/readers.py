"""Files of rows: which belong to a source, and each as something with a length and rows by number.

Text stays text: nothing guesses that ``007`` is a number or an empty cell something else than a null. JSON lines are
read in place, by byte offset; what has no lines to jump to (compressed files, JSON arrays, CSV, plain text) is written
as JSON lines once, beside the token cache, under the hash of its bytes: a replaced file is another one, whatever
its date. Parquet is read in place, a batch at a time. Nothing is held in memory but offsets, 8 bytes a row.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import mmap
import os
import re
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sgt_titan import disk
from sgt_titan.config import schema
from sgt_titan.config.paths import expand
from sgt_titan.data.conversations import Written
from sgt_titan.errors import UserError

KINDS: dict[str, str] = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
SPLITS: dict[str, str] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# Left by the datasets library and the hub beside the data.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
_BATCH = 1000
_BAD = "\0"  # a key that no table has: why a row of one is none


def _constant(name: str) -> Written | None:
    """What Python and pandas write beyond JSON: NaN is a value that is missing."""
    return None if name == "NaN" else Written(name)


# json.loads would make one for every row.
_DECODER = json.JSONDecoder(parse_float=Written, parse_constant=_constant)
_MANY_MISSES = 1000


def kind(name: str) -> str:
    """What a file holds by its name; "" if that is not known."""
    name = name.lower()
    stem, suffix = os.path.splitext(name)
    if suffix in COMPRESSED:
        found = KINDS.get(os.path.splitext(stem)[1], "")
        return found if found not in ("parquet", "arrow") else ""
    return KINDS.get(suffix, "")


def files_of(source: str, data: schema.Data) -> list[Path]:
    """The files that a path, a folder, a glob, an address, or several of them on a line each, mean.

    Raises:
        UserError: nothing there, nothing known, several kinds, a split that is not there.
    """
    parts = [part.strip() for part in source.split("\n") if part.strip()]
    if len(parts) > 1:
        found = [file for part in parts for file in files_of(part, data)]
        return _one_kind(found, source.replace("\n", ", "))
    source = parts[0].removeprefix("file://")
    if "://" in source:
        _no_split(data, "an address")
        return _one_kind(_fetch(source, data), source)
    if os.path.isfile(source):  # a name may hold what a glob would read otherwise
        _no_split(data, "a file")
        if not kind(source):
            raise UserError(f"{source}: unknown kind of file; known are {', '.join(KINDS)}, also with {_ends()}")
        return [Path(source)]
    if os.path.isdir(source):
        return _folder(source, data)
    if found := sorted(Path(name) for name in glob.glob(source, recursive=True) if os.path.isfile(name)):
        _no_split(data, "a glob")
        return _one_kind(found, source)
    if re.search(r"[*?\[]", source):
        raise UserError(f"data.source: no file matches {source}")
    raise UserError(f"data.source: {source} does not exist")


def _ends() -> str:
    return ", ".join(COMPRESSED)


def _no_split(data: schema.Data, what: str) -> None:
    if data.split != "train":
        raise UserError(
            f"data.split: {data.split!r}, but {what} has no splits; name the file of that split, or leave it"
        )
    if data.subset:
        raise UserError(f"data.subset: {data.subset!r}, but {what} has no subsets; name its files")


def _one_kind(files: Sequence[Path], source: str) -> list[Path]:
    kinds = sorted({kind(file.name) for file in files})
    if "" in kinds:
        unknown = next(file for file in files if not kind(file.name))
        raise UserError(f"{unknown}: unknown kind of file; known are {', '.join(KINDS)}, also with {_ends()}")
    if len(kinds) > 1:
        raise UserError(f"{source}: mixes {' and '.join(kinds)} files; name one file or a folder with one kind")
    return list(files)


def _folder(path: str, data: schema.Data) -> list[Path]:
    root = Path(path, data.subset) if data.subset else Path(path)
    if not root.is_dir():
        raise UserError(f"data.subset: {path} has no folder {data.subset!r}")
    files = [file for file in listing(root) if kind(file.name) and file.name not in _ABOUT]
    if not files:
        raise UserError(f"{path}: no data files in this folder; known are {', '.join(KINDS)}, also with {_ends()}")
    splits = {file: split_of(file.relative_to(root)) for file in files}
    named = sorted({split for split in splits.values() if split})
    wanted = SPLITS.get(data.split, data.split)
    if not named and wanted != "train":
        raise UserError(
            f"data.split: {data.split!r}, but no file in {path} is named as a split (train, validation, test)"
        )
    if not named:
        return _one_kind(files, path)
    if "" in splits.values():
        other = next(file for file, split in splits.items() if not split)
        raise UserError(
            f"{path}: holds files of the splits {', '.join(named)} and others ({other.relative_to(root)}); name files"
        )
    if wanted not in named:
        raise UserError(f"data.split: {path} has no split {data.split!r}; it has {', '.join(named)}")
    return _one_kind([file for file in files if splits[file] == wanted], path)


def split_of(file: Path) -> str:
    """The split that a path names, by its file first: ``data/test-00000-of-00002.parquet``; "" if it names none."""
    for part in reversed(file.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def listing(root: Path) -> list[Path]:
    """Files below a folder by name, without hidden ones."""
    return sorted(
        f for f in root.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(root).parts)
    )


def digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(files: Sequence[Path], digests: Sequence[str] = ()) -> str:
    """sha256 over names (not folders: a moved data set is the same one) and bytes."""
    total = hashlib.sha256()
    for file, found in zip(files, digests or map(digest, files), strict=True):
        total.update(f"{file.name}\0{found}\0".encode())
    return total.hexdigest()


def open_files(files: Sequence[Path], data: schema.Data) -> tuple[Any, str, tuple[tuple[int, str], ...]]:
    """Rows, their fingerprint, and (first row, file name) of each file.

    Raises:
        UserError: a file that is not what its name says.
    """
    digests = [digest(file) for file in files]
    what = kind(files[0].name)
    if what == "parquet":
        rows: Any = ParquetRows(files)
    elif what == "arrow":
        rows = ArrowRows(files)
    else:
        rows = JsonLines([_as_lines(file, found, data) for file, found in zip(files, digests, strict=True)], files)
    starts = tuple((int(start), str(file)) for start, file in zip(rows.starts[:-1], files, strict=True))
    return rows, f"files:{hash_files(files, digests)}", starts


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
            why = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
            why = "nested too deeply" if isinstance(error, RecursionError) else why
            raise UserError(f"{self.shown[f]}: row {number + 1}: cannot be read as JSON ({why})") from None
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
        for i in range(min(len(self), 100)):
            try:
                found |= dict.fromkeys(self[i])
            except UserError as error:
                if i == 0:
                    raise UserError(f"{error}; rows are objects, one a line, or an array of them") from None
        return list(found)

    def has(self, column: str) -> bool:
        """Whether any row has this key, wherever it first appears."""
        needle = json.dumps(column, ensure_ascii=False).encode()
        for f, file in enumerate(self.files):
            if not len(self.offsets[f]):
                continue
            with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                at, misses = content.find(needle), 0
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
                    at = content.find(needle, int(following))
        return False


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
            if set(found.schema_arrow.names) != set(self.column_names):
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
    target = _beside(data, "rows") / f"{found}.{what}.jsonl"
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
    except Exception as error:
        raise UserError(f"{file}: cannot be read as {what}: {reason(error)}") from None
    return target


def _beside(data: schema.Data, name: str) -> Path:
    """A folder of copies: of the token cache, or of this user where there is none."""
    if data.cache_dir:
        root = Path(expand(data.cache_dir, "data.cache_dir"))
    else:
        root = Path(tempfile.gettempdir(), f"sgt-titan-{os.getuid()}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / name).mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {root}: {error.strerror or error}") from None
    return root / name


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
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
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
    for cells in filter(None, reader):
        row = dict(zip(header, cells, strict=False))
        if len(cells) > len(header):
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


# What a web server says of a file that another version of it would not have.
_OF_A_VERSION = ("ETag", "Last-Modified", "Content-MD5", "Digest")


def _fetch(address: str, data: schema.Data) -> list[Path]:
    """Copies of the files at an address (``s3://``, ``hf://``, ``https://``, ...; a glob): fetched once, as long as the
    store says that they are the same; anew each time where it says nothing of that (some web servers)."""
    import fsspec

    web = address.startswith(("http://", "https://"))
    try:
        store, path = fsspec.core.url_to_fs(address)
        is_glob = re.search(r"[*\[]" if web else r"[*?\[]", path)  # a question mark of the web begins a query
        names = sorted(name for name in store.glob(path) if web or store.isfile(name)) if is_glob else [path]
        if not names:
            raise UserError(f"data.source: no file matches {address}")
        if not (web or is_glob) and store.isdir(path):
            raise UserError(
                f"data.source: {address} is a folder; name its files, such as {address.rstrip('/')}/*.jsonl"
            )
        found = []
        for name in names:
            version = _version(store.info(name)) if web else store.ukey(name)
            key = hashlib.sha256(f"{store.protocol}\0{name}\0{version}".encode()).hexdigest()[:32]
            target = _beside(data, "remote") / key / os.path.basename(name.partition("?")[0] if web else name)
            if not (version and target.exists()):
                target.parent.mkdir(exist_ok=True)
                with disk.replacing(target) as work:
                    store.get_file(name, str(work))
            found.append(target)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data.source: {without_query(f'{address} cannot be fetched: {reason(error)}')}") from None
    return found


def without_query(text: str) -> str:
    """Addresses of the web without what may be a signature or a key."""
    return re.sub(r"(https?://[^\s?]+)\?[^\s,'\"]*", r"\1", text)


def _version(info: Mapping[str, Any]) -> str:
    """Which version of a file a web server has; "" if it does not say. fsspec takes such files for unchanging."""
    said = {key: info[key] for key in _OF_A_VERSION if info.get(key)}
    return json.dumps(said | {"size": info.get("size")}, sort_keys=True) if said else ""


def reason(error: BaseException) -> str:
    """The innermost cause, one short line: the outer ones only say that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:160]}" if line else type(error).__name__
