"""What a long preparation has done so far: chunks of rows that whoever starts it again need not tokenize again.

A file a chunk, ``<cache_dir>/begun/<fingerprint>/<source>-<first row>-<row behind>.npz``, gone when the data set is
complete. A chunk is a function of its rows and of what the fingerprint covers, so several builders may share them. A
file that is not whole (zip archives carry checksums) is as good as none.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np

from sgt_titan import disk
from sgt_titan.data.tokenization import Chunk

ARRAYS = tuple(f.name for f in fields(Chunk) if f.type == "np.ndarray")
COUNTERS = tuple(f.name for f in fields(Chunk) if str(f.type).startswith("Counter"))


class Begun:
    """Chunks of one source in a folder, by their rows."""

    def __init__(self, folder: Path, source: int) -> None:
        self.folder, self.source = folder, source
        folder.mkdir(parents=True, exist_ok=True)
        # Listed once: what another builder adds meanwhile is done twice, at worst.
        self.names = {path.name for path in folder.glob(f"{source}-*.npz")}

    def has(self, start: int, stop: int) -> bool:
        return self._name(start, stop) in self.names

    def read(self, start: int, stop: int) -> Chunk | None:
        """None: not there, or not whole."""
        try:
            with np.load(self.folder / self._name(start, stop), allow_pickle=False) as found:
                arrays = {name: found[name] for name in ARRAYS}
                rest = json.loads(found["rest"].tobytes())
            return Chunk(**arrays, **rest | {name: Counter(rest[name]) for name in COUNTERS})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, start: int, stop: int, chunk: Chunk) -> None:
        """Raises OSError: it cannot be written."""
        rest = {f.name: getattr(chunk, f.name) for f in fields(Chunk) if f.name not in ARRAYS}
        arrays = {name: getattr(chunk, name) for name in ARRAYS}
        with disk.replacing(self.folder / self._name(start, stop), sync=False) as work, work.open("wb") as stream:
            np.savez(stream, rest=np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8), **arrays)

    def _name(self, start: int, stop: int) -> str:
        return f"{self.source}-{start}-{stop}.npz"
