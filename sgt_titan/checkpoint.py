"""Checkpoint directories on disk: names, commit marker, damage. No torchtitan, no pickle.

    <output_dir>/checkpoints/step-00000500/
        *.safetensors    SGT weights, optimizer state and RNG, a file per rank, each with its place in the whole tensors
        state.json       step, data cursor, schedules, fingerprints, versions
        config.yaml      the resolved config
        COMMITTED        size and CRC-32 of every file above; written last

A directory counts only with its marker. ``sgt_titan/titan/checkpoint.py`` writes them from a running job; ``export``
reads them anywhere.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgt_titan import disk

if TYPE_CHECKING:
    import torch

FOLDER = "checkpoints"
MARKER = "COMMITTED"
STATE = "state.json"
CONFIG = "config.yaml"
_STEP = re.compile(r"step-(\d{8})")


def step_dir(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / FOLDER / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_steps(output_dir: str | Path) -> list[Path]:
    """Checkpoint directories, committed or not, newest first."""
    folder = Path(output_dir) / FOLDER
    found = [path for path in folder.iterdir() if step_of(path) is not None] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name, reverse=True)


def is_committed(path: Path) -> bool:
    return (path / MARKER).is_file()


def latest_committed(output_dir: str | Path) -> Path | None:
    """Newest committed directory; whether its files are intact is ``problems``' business."""
    return next((path for path in list_steps(output_dir) if is_committed(path)), None)


def crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def describe_files(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """The marker's entries for ``files``."""
    return {file.name: {"bytes": file.stat().st_size, "crc32": crc32(file)} for file in files}


def commit(path: Path, files: dict[str, dict[str, int]]) -> None:
    """Make a finished directory count."""
    disk.write(path / MARKER, json.dumps({"files": files}, indent=1))


def problems(path: Path, *, part: int = 0, parts: int = 1, checksums: bool = True) -> list[str]:
    """What is wrong with a committed directory: sizes of all files, checksums of every ``parts``-th from ``part``."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        committed = [(name, entry["bytes"], entry["crc32"]) for name, entry in sorted(files.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path / MARKER}: unreadable ({error})"]
    found = []
    for index, (name, size, checksum) in enumerate(committed):
        file = path / name
        if not file.is_file():
            found.append(f"{file}: missing")
        elif file.stat().st_size != size:
            found.append(f"{file}: {file.stat().st_size} bytes, committed with {size}")
        elif checksums and index % parts == part and crc32(file) != checksum:
            found.append(f"{file}: checksum differs from the one it was committed with")
    return found


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text())


def read_tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Whole tensors whose name starts with ``prefix`` (left out of the result), put together from all ranks' files."""
    # Here, because a launch script that asks for the newest step has no seconds to spare for torch.
    import torch
    from safetensors import safe_open
    from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

    pieces: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as reader:
            places = json.loads((reader.metadata() or {}).get(CUSTOM_METADATA_KEY, "{}"))
            for name in reader.keys():  # noqa: SIM118 - not a dict
                if name.startswith(prefix):
                    tensor = reader.get_tensor(name)
                    offset = places.get(name, {}).get(SAVED_OFFSETS_KEY, [0] * tensor.dim())
                    pieces.setdefault(name.removeprefix(prefix), []).append((offset, tensor))
    whole = {}
    for name, parts in pieces.items():
        shape = [max(o[d] + t.shape[d] for o, t in parts) for d in range(parts[0][1].dim())]
        whole[name] = torch.empty(shape, dtype=parts[0][1].dtype)
        for offset, tensor in parts:
            whole[name][tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))] = tensor
    return whole


def prune(output_dir: str | Path, keep_latest: int, *, damaged: Collection[Path] = ()) -> list[Path]:
    """Delete committed directories beyond the newest ``keep_latest`` (0: none), and abandoned ones before it.

    ``damaged`` ones are neither counted nor deleted: they must not push out what can be gone on from.
    """
    paths = [path for path in list_steps(output_dir) if path not in damaged]
    committed = [path for path in paths if is_committed(path)]
    surplus = committed[keep_latest:] if keep_latest else []
    abandoned = [path for path in paths if committed and not is_committed(path) and path.name < committed[0].name]
    for path in [*surplus, *abandoned]:
        (path / MARKER).unlink(missing_ok=True)  # from here on it does not count, however far the deletion gets
        shutil.rmtree(path, ignore_errors=True)
    return surplus
