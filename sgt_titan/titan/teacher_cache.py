"""What the teacher said of each sample, on disk: written when a sample is first met, read whenever it is met again.

The teacher's distributions depend on the trunk and the sample alone, so from the second epoch on its forward pass (2N
of 6N) can be read instead. A directory holds

    meta.json    trunk and data fingerprints, k, vocabulary, positions: what the numbers depend on
    teacher.bin  a slot for each sample at a place that its number decides: 8 bytes of header, then for each position
                 with utility k token ids (2 bytes, 4 above 65,536 words), k probabilities and the tail's mass (4 each)

Every rank writes and reads the samples it meets, with plain positioned reads and writes: any number of ranks, any
restart. A slot's header holds a CRC-32 over its bytes, its sample and meta.json; a slot that does not fit it counts as
not written, and its sample is asked of the teacher again. Unwritten slots are holes in a sparse file.

Token ids and probabilities say what was in the data: the directory is as confidential as the data set.

Legend: N positions with utility, K stored tokens.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger

from sgt_titan import disk
from sgt_titan.data.batch import Document
from sgt_titan.errors import UserError
from sgt_titan.objectives.top_k import Targets

from .startup import Prepared

HEADER = struct.Struct("<II")  # CRC-32, positions
FORMAT = 1


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Disk bytes of a position with utility."""
    return _record(k, vocabulary).itemsize


def _record(k: int, vocabulary: int) -> np.dtype:
    ids = "<u2" if vocabulary <= 2**16 else "<u4"
    return np.dtype([("ids", ids, (k,)), ("probabilities", "<f4", (k,)), ("tail", "<f4")])


def open_teacher_cache(prepared: Prepared, dtype: torch.dtype, *, writer: bool) -> TeacherCache | None:
    """The cache that a run's config asks for, or None. ``dtype`` is the trunk's.

    Raises:
        UserError: see ``TeacherCache``.
    """
    config, source = prepared.config, prepared.train_source
    options = config.teacher_cache
    if not options.top_k:
        return None
    folder = options.dir or Path(config.data.cache_dir) / f"teacher-{prepared.fingerprints['trunk'][:16]}"
    identity = {
        "fingerprints": prepared.fingerprints,
        "utility_positions": config.objective.utility_positions,
        "trunk_dtype": str(dtype),
        "trunk_float8": config.trunk.float8,
    }
    vocabulary = prepared.hf.vocab_size
    cache = TeacherCache(
        folder, identity, k=options.top_k, vocabulary=vocabulary, lengths=source.view.dataset.lengths, writer=writer
    )
    if int(os.environ.get("RANK", "0")) == 0:
        each, tokens = bytes_per_token(cache.k, vocabulary), int(source.view.lengths.sum())
        logger.info(f"Teacher cache: {folder}, {each} bytes a token, {each * tokens / 1e9:,.2f} GB when full")
    return cache


class TeacherCache:
    """Slots for all samples of a data set.

    Args:
        folder: made if it does not exist; on storage that all ranks share.
        identity: what the teacher's output depends on, JSON values.
        k, vocabulary: tokens stored of each distribution, and tokens there are.
        lengths: tokens of every sample of the data set, by sample number.
        writer: whether this rank writes (one of those that hold the same rows).

    Raises:
        UserError: the folder holds the cache of another trunk, data set or k, or cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: dict[str, Any],
        *,
        k: int,
        vocabulary: int,
        lengths: np.ndarray,
        writer: bool = True,
    ):
        self.folder, self.k, self.writer = Path(folder), min(k, vocabulary), writer
        self.record = _record(self.k, vocabulary)
        meta = {"format": FORMAT, "k": self.k, "vocabulary": vocabulary, "samples": len(lengths), **identity}
        file = self.folder / "meta.json"
        wanted = json.dumps(meta, indent=1, sort_keys=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                disk.write(file, wanted)  # every rank writes the same
            _require_same(file, meta)
            self.file = os.open(self.folder / "teacher.bin", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(f"teacher_cache.dir: cannot write {folder}: {error.strerror}") from None
        self.salt = zlib.crc32(wanted.encode())
        slots = HEADER.size + lengths.astype(np.int64) * self.record.itemsize
        self.offsets = np.concatenate(([0], np.cumsum(slots)))

    def close(self) -> None:
        os.close(self.file)

    def read(self, sample: int, positions: int) -> np.ndarray | None:
        """Records (N,) of a sample; None if they were not written, or not as they are."""
        size = HEADER.size + positions * self.record.itemsize
        raw = os.pread(self.file, size, int(self.offsets[sample]))
        if len(raw) < size:
            return None
        crc, count = HEADER.unpack_from(raw)
        body = raw[HEADER.size :]
        if count != positions or crc != self._crc(sample, count, body):
            return None
        return np.frombuffer(body, self.record)

    def write(self, sample: int, records: np.ndarray) -> None:
        """Records (N,) of a sample, at most as many as it has tokens."""
        body = records.tobytes()
        raw = HEADER.pack(self._crc(sample, len(records), body), len(records)) + body
        if len(raw) > self.offsets[sample + 1] - self.offsets[sample]:
            raise ValueError(f"{len(records)} positions do not fit the slot of sample {sample}")
        os.pwrite(self.file, raw, int(self.offsets[sample]))

    def lookup(
        self,
        documents: Sequence[Sequence[Document]],
        utility_BT: torch.Tensor,
        *,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> Targets | None:
        """Targets at the positions of ``utility_BT`` in order, or None if a sample is missing on any rank of ``group``.

        Collective over ``group``, the ranks that hold the same rows.
        """
        found = []
        for sample, count in _samples(documents, utility_BT):
            records = self.read(sample, count)
            if records is None:
                break
            found.append(records)
        complete = len(found) == sum(len(row) for row in documents)
        if group is not None:
            agreed = torch.tensor(int(complete), device=device)
            dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
            complete = bool(agreed)
        if not complete or not found:
            return None
        records = np.concatenate(found)
        return Targets(
            torch.from_numpy(records["ids"].astype(np.int64)).to(device),
            torch.from_numpy(records["probabilities"].copy()).to(device),
            torch.from_numpy(records["tail"].copy()).to(device),
        )

    def store(self, documents: Sequence[Sequence[Document]], utility_BT: torch.Tensor, targets: Targets) -> None:
        """The inverse of ``lookup``. Where the disk is full the teacher goes on being asked: nothing more is stored."""
        if not self.writer:
            return
        records = np.empty(len(targets.tail_N), self.record)
        for name, tensor in zip(("ids", "probabilities", "tail"), targets, strict=True):
            records[name] = tensor.cpu().numpy()
        start = 0
        try:
            for sample, count in _samples(documents, utility_BT):
                self.write(sample, records[start : start + count])
                start += count
        except OSError as error:
            self.writer = False
            logger.warning(f"Teacher cache: {self.folder}: {error.strerror}; nothing more is stored in this attempt")

    def _crc(self, sample: int, count: int, body: bytes) -> int:
        return zlib.crc32(body, zlib.crc32(struct.pack("<QQ", sample, count), self.salt))


def _require_same(file: Path, meta: dict[str, Any]) -> None:
    """Raises UserError unless ``file`` says ``meta``."""
    try:
        found = json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file}: not JSON; delete {file.parent} to store the teacher's output again") from None
    differing = [key for key in sorted({*meta, *found}) if meta.get(key) != found.get(key)]
    if differing:
        old, new = (str(values.get(differing[0]))[:16] for values in (found, meta))
        raise UserError(
            f"teacher_cache.dir: {file.parent} was made with another {differing[0]} ({old}, now {new}); choose another "
            "directory or delete it"
        )


def _samples(documents: Sequence[Sequence[Document]], utility_BT: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(sample, positions with utility) in the order in which a mask picks the positions."""
    for row, mask_T in zip(documents, utility_BT.cpu(), strict=True):
        for doc in row:
            yield doc.sample_id, int(mask_T[doc.start : doc.start + doc.length].sum())
