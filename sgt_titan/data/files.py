"""Which files a source means: a file, a folder, a glob, an address, or several of them.

Nothing is left out in silence: what a folder holds and nobody reads (other splits, other kinds) is said, and what could
be read in two ways (several kinds, a file named twice, a link to nothing, subsets of which none is chosen) is refused.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sgt_titan import disk
from sgt_titan.config import schema
from sgt_titan.config.paths import expand
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
# Words about the data, which nobody takes for rows.
_PROSE = re.compile(r".*\.(md|rst)|(LICEN[CS]E|NOTICE|CITATION)([._-].*)?|_SUCCESS", re.IGNORECASE)


def kind(name: str) -> str:
    """What a file holds by its name; "" if that is not known."""
    name = name.lower()
    stem, suffix = os.path.splitext(name)
    if suffix in COMPRESSED:
        found = KINDS.get(os.path.splitext(stem)[1], "")
        return found if found not in ("parquet", "arrow") else ""
    return KINDS.get(suffix, "")


def files_of(source: str, data: schema.Data, left: list[str]) -> list[Path]:
    """The files that a path, a folder, a glob, an address, or several of them on a line each, mean.

    Args:
        left: gets what is there and not read, in words.

    Raises:
        UserError: nothing there, nothing known, several kinds, a file named twice, a split or a subset that is not
            there.
    """
    parts = [part.strip() for part in source.split("\n") if part.strip()]
    if len(parts) > 1:
        found = [file for part in parts for file in files_of(part, data, left)]
        return _one_kind(found, source.replace("\n", ", "))
    source = parts[0].removeprefix("file://")
    if "://" in source:
        _no_split(data, "an address")
        return _one_kind(_fetch(source, data), source)
    if os.path.isfile(source):  # a name may hold what a glob would read otherwise
        _no_split(data, "a file")
        return _one_kind([Path(source)], source)
    if os.path.isdir(source):
        return _folder(source, data, left)
    if re.search(r"[*?\[]", source):
        _no_split(data, "a glob")
        return _one_kind(_glob(source, left), source)
    raise UserError(f"data.source: {source} {'is no regular file' if os.path.exists(source) else 'does not exist'}")


def _glob(pattern: str, left: list[str]) -> list[Path]:
    names = sorted(glob.glob(pattern, recursive=True))
    folders = [name for name in names if os.path.isdir(name)]
    if folders and "**" not in pattern:
        left.append(some("folders that the pattern matches", [os.path.basename(name) for name in folders]))
    if not (found := [Path(name) for name in names if not os.path.isdir(name)]):
        raise UserError(f"data.source: no file matches {pattern}")
    return found


def some(what: str, names: Sequence[str]) -> str:
    """How many there are, and the first three."""
    return f"{what}: {len(names)} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"


def _no_split(data: schema.Data, what: str) -> None:
    if data.split != "train":
        raise UserError(
            f"data.split: {data.split!r}, but {what} has no splits; name the file of that split, or leave it"
        )
    if data.subset:
        raise UserError(f"data.subset: {data.subset!r}, but {what} has no subsets; name its files")


def _one_kind(files: Sequence[Path], source: str) -> list[Path]:
    """``files``, which are there, of one kind, and each of them once."""
    seen: dict[str, Path] = {}
    for file in files:
        if not kind(file.name):
            ends = ", ".join(COMPRESSED)
            raise UserError(f"{file}: unknown kind of file; known are {', '.join(KINDS)}, also with {ends}")
        if not file.is_file():
            what = "a link to nothing" if file.is_symlink() and not file.exists() else "no regular file"
            raise UserError(f"{file}: is {what}")
        other = seen.setdefault(os.path.realpath(file), file)
        if other is not file:
            both = f"is named twice in {source}" if other == file else f"and {other} are one file"
            raise UserError(f"{file}: {both}; its rows would come twice")
    kinds = sorted({kind(file.name) for file in files})
    if len(kinds) > 1:
        raise UserError(f"{source}: mixes {' and '.join(kinds)} files; name one file or a folder with one kind")
    return list(files)


def _folder(path: str, data: schema.Data, left: list[str]) -> list[Path]:
    if (declared := _declared(Path(path), data, left)) is not None:
        return declared
    root = Path(path, data.subset) if data.subset else Path(path)
    if not root.is_dir():
        raise UserError(f"data.subset: {path} has no folder {data.subset!r}")
    there = [file for file in listing(root) if file.name not in _ABOUT and not _PROSE.fullmatch(file.name)]
    files = [file for file in there if kind(file.name)]
    if not files:
        ends = ", ".join(COMPRESSED)
        raise UserError(f"{path}: no data files in this folder; known are {', '.join(KINDS)}, also with {ends}")
    if other := [str(file.relative_to(root)) for file in there if not kind(file.name)]:
        left.append(some("files of unknown kinds", other))
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
        name = next(file for file, split in splits.items() if not split)
        raise UserError(
            f"{path}: holds files of the splits {', '.join(named)} and others ({name.relative_to(root)}); name files"
        )
    return _one_kind([file for file in files if splits[file] == _chosen(wanted, named, path, data, left)], path)


def _chosen(wanted: str, named: Sequence[str], path: str, data: schema.Data, left: list[str]) -> str:
    """``wanted``, which is one of the splits that there are; says which others are not read.

    Raises:
        UserError: it is none.
    """
    if wanted not in named:
        raise UserError(f"data.split: {path} has no split {data.split!r}; it has {', '.join(named)}")
    other = [split for split in named if split != wanted]
    if other and (line := some("other splits", other)) not in left:
        left.append(line)
    return wanted


def _declared(root: Path, data: schema.Data, left: list[str]) -> list[Path] | None:
    """The files that the folder's README.md declares for a subset and a split, as the hub's do; None: it declares none.

    Raises:
        UserError: several subsets and none chosen, a split or files that are not there.
    """
    configs = _configs(root / "README.md", left)
    named = {str(c["config_name"]): c for c in configs if c.get("config_name") is not None}
    if data.subset and data.subset not in named:
        return None  # a folder's name, or refused as none
    default = next((name for name, c in named.items() if c.get("default")), "default" if "default" in named else "")
    chosen = data.subset or default or (next(iter(named)) if len(named) == 1 else "")
    if named and not chosen:
        raise UserError(f"data.subset: {root} has the subsets {', '.join(named)} (README.md); choose one")
    found = named.get(chosen, {})
    if other := [name for name in named if name != chosen]:
        left.append(some("other subsets", other))
    if not (splits := _patterns(found.get("data_files"), root)):
        if found.get("data_dir"):  # with the rules of any other folder
            return _folder(str(root / str(found["data_dir"])), _without_subset(data), left)
        return None
    wanted = _chosen(SPLITS.get(data.split, data.split), list(splits), str(root), data, left)
    files = []
    for pattern in splits[wanted]:
        matched = sorted(glob.glob(str(Path(glob.escape(str(root)), pattern)), recursive=True))
        if not matched:
            raise UserError(f"{root}: README.md declares {pattern}, and no file matches it")
        files += [Path(name) for name in matched if not os.path.isdir(name)]
    return _one_kind(files, str(root))


def _configs(card: Path, left: list[str]) -> list[dict[str, Any]]:
    """What the metadata of a data set's card say of its subsets."""
    if not card.is_file():
        return []
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip("\ufeff \n"):
        return []
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        left.append("metadata of README.md, which are no YAML")
        return []
    configs = found.get("configs") if isinstance(found, dict) else None
    return [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []


def _patterns(declared: Any, root: Path) -> dict[str, list[str]]:
    """Split -> patterns of its files, relative to the folder."""
    listed = [declared] if isinstance(declared, str | dict) else declared or []
    found: dict[str, list[str]] = {}
    for item in listed:
        split, paths = (item.get("split", "train"), item.get("path")) if isinstance(item, dict) else ("train", item)
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise UserError(f"{root}: README.md: data_files must be names, or splits with a path")
        if any(os.path.isabs(path) or ".." in Path(path).parts for path in paths):
            raise UserError(f"{root}: README.md declares files outside of the folder")
        found.setdefault(SPLITS.get(str(split), str(split)), []).extend(paths)
    return found


def _without_subset(data: schema.Data) -> schema.Data:
    return replace(data, subset="")


def split_of(file: Path) -> str:
    """The split that a path names, by its file first: ``data/test-00000-of-00002.parquet``; "" if it names none."""
    for part in reversed(file.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def listing(root: Path) -> list[Path]:
    """Files below a folder by name, without hidden ones; links to folders are followed.

    Raises:
        UserError: a folder that links lead to twice.
    """
    found, seen = [], {os.path.realpath(root): root}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in folders):
            other = seen.setdefault(os.path.realpath(path), path)
            if other is not path:
                raise UserError(f"{path}: is {other} once more, through a link; its files would be read twice")
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def beside(data: schema.Data, name: str) -> Path:
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


# What a web server says of a file that another version of it would not have.
_OF_A_VERSION = ("ETag", "Last-Modified", "Content-MD5", "Digest")


def _fetch(address: str, data: schema.Data) -> list[Path]:
    """Copies of the files at an address (``s3://``, ``hf://``, ``https://``, ...; a glob): fetched once, as long as the
    store says that they are the same; anew each time where it says nothing of that (some web servers)."""
    import fsspec

    web = address.startswith(("http://", "https://"))
    try:
        store, path = fsspec.core.url_to_fs(address)
        store.invalidate_cache()  # listings of an earlier call in this process
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
            target = beside(data, "remote") / key / os.path.basename(name.partition("?")[0] if web else name)
            if not (version and target.exists()):
                target.parent.mkdir(exist_ok=True)
                with disk.replacing(target) as work:
                    store.get_file(name, str(work))
            found.append(target)
    except UserError:
        raise
    except ImportError as error:  # the outer one says what to install
        raise UserError(f"data.source: {without_query(address)} needs another package: {error}") from None
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
