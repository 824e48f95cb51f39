"""The tokenized data set on disk: built once, named by a fingerprint, memory-mapped by every rank.

A directory ``<cache_dir>/<fingerprint>`` holds

    tokens.npy    (tokens,)      uint16 or uint32   all samples, one after the other
    roles.npy     (tokens,)      uint8              TEMPLATE, PROMPT, RESPONSE
    offsets.npy   (samples + 1,) int64              sample i is tokens[offsets[i]:offsets[i + 1]]
    counts.npy    (samples, 6)   int32              tokens of each kind, see tokenization.COUNTS
    hashes.npy    (samples,)     uint64             decides which samples are held out
    sources.npy   (samples,)     int64              number of the row in the source
    marks.npy     (marks, 5)     int32              private values: start, stop, lead, characters, kind (marks.Mark)
    mark_offsets.npy (samples + 1,) int64           sample i has marks[mark_offsets[i]:mark_offsets[i + 1]]
    meta.json                                       counts, options, sizes and sha256 of the arrays; of a mixture, its
                                                    sources, whose samples follow one another

It is built under another name and renamed when complete, so a directory that exists is whole unless someone
damaged it, and two builders cannot disturb each other: the first to rename wins. Of many rows what is done is kept
beside it until then (``begun.py``), so that a start that was killed is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from sgt_titan import disk
from sgt_titan.config import resolve, schema
from sgt_titan.config.paths import expand
from sgt_titan.data.begun import Begun
from sgt_titan.data.marks import MarkError
from sgt_titan.data.mixture import Part, parts
from sgt_titan.data.order import quotas
from sgt_titan.data.tokenization import (
    COUNTS,
    DROPS,
    FIRST_BAD,
    MARK_FIELDS,
    Chunk,
    load_tokenizer,
    many,
    private_tokens,
    take_note,
    tokenize_rows,
)
from sgt_titan.errors import UserError
from sgt_titan.trunk.tokenizer_files import tokenizer_files

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3  # of the arrays; another one is built again
TOKENS_VERSION = 4  # of what the arrays say: part of the fingerprint, which runs and exports record
ARRAYS = ("tokens", "roles", "offsets", "counts", "hashes", "sources", "marks", "mark_offsets")
# Small data sets keep at least nine tenths for training.
MAX_VALIDATION_SHARE = 0.1
# Said in the meta.json of a mixture, which runs of other weights share.
OF_WHOM = "of the last preparation: weights decide no token, so others share this; run.json has a run's own"
STALE_SECONDS = 7 * 24 * 3600
POLL_SECONDS = 0.5
MANY_ROWS = 2_000  # enough to judge the share of bad ones by
ERROR_SECONDS = 60.0


class DamagedCache(Exception):
    """A cache directory that is not what its meta.json says."""


@dataclass(frozen=True)
class View:
    """Some samples of a data set, numbered 0..len-1. ``index[i]`` is sample i's number in the whole data set."""

    dataset: TokenizedDataset = field(repr=False)
    index: np.ndarray
    weighted: bool = False  # the sources by their weights, not by their sizes

    def __len__(self) -> int:
        return len(self.index)

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of sample i, (T,), in the dtype of the file."""
        return self.dataset.tokens[self._slice(i)]

    def roles(self, i: int) -> np.ndarray:
        """Roles of sample i, uint8 (T,)."""
        return self.dataset.roles[self._slice(i)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 (len,)."""
        return self.dataset.lengths[self.index]

    def counts(self, kind: str) -> np.ndarray:
        """Tokens of one kind (see tokenization.COUNTS) in each sample, int64 (len,)."""
        return self.dataset.counts[self.index, COUNTS.index(kind)].astype(np.int64)

    def marks(self, i: int) -> np.ndarray:
        """Private values of sample i, int32 (M, 5): start, stop, lead, characters, index in ``kinds``."""
        at = self.index[i]
        offsets = self.dataset.mark_offsets
        return self.dataset.marks[int(offsets[at]) : int(offsets[at + 1])]

    def private(self, i: int) -> np.ndarray:
        """Which tokens of sample i carry a private value, bool (T,)."""
        return private_tokens(self.marks(i), len(self.tokens(i)))

    @property
    def kinds(self) -> list[str]:
        """Names of the kinds of private values, as the data call them; "" where they do not."""
        return self.dataset.meta["marks"]["kinds"]

    def source(self, i: int) -> int:
        """Number of sample i's row in the source."""
        return int(self.dataset.sources[self.index[i]])

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint

    @cached_property
    def blocks(self) -> dict[str, tuple[int, float]]:
        """Samples and weight of each source, in the order in which they lie here; one block where nothing is weighted.

        Raises:
            UserError: a source that has a weight and no samples.
        """
        if not self.weighted or not self.dataset.weights:
            return {"": (len(self), 1.0)}
        weights = self.dataset.weights
        found = {name: (samples, weights[name]) for name, samples in zip(weights, self._sizes, strict=False)}
        for name, (samples, _) in found.items():
            if not samples:
                raise UserError(f"data.sources.{name}: every sample is a copy of a held-out one; leave it out")
        return found

    def spread(self, count: int) -> list[int]:
        """The first ``count`` samples; of several sources, as many of each as its size is of all."""
        if count >= len(self) or len(self._sizes) == 1:
            return list(range(min(count, len(self))))
        starts, shares = np.cumsum([0, *self._sizes]), quotas(count, self._sizes)
        return [i for start, share in zip(starts, shares, strict=False) for i in range(int(start), int(start + share))]

    @cached_property
    def _sizes(self) -> list[int]:
        """Samples of each source, in order."""
        ends = [about["samples"] for about in self.dataset.meta.get("sources", {}).values()] or [len(self.dataset)]
        found = np.searchsorted(self.index, np.cumsum(ends))
        return np.diff(found, prepend=0).tolist()

    def _slice(self, i: int) -> slice:
        at = self.index[i]
        return slice(int(self.dataset.offsets[at]), int(self.dataset.offsets[at + 1]))


@dataclass(frozen=True)
class TokenizedDataset:
    """A tokenized data set. ``fingerprint`` covers its tokens and its split: equal on all ranks and across
    restarts, or the run is not the same run."""

    directory: Path
    meta: dict[str, Any] = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    roles: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)
    hashes: np.ndarray = field(repr=False)
    sources: np.ndarray = field(repr=False)
    marks: np.ndarray = field(repr=False)
    mark_offsets: np.ndarray = field(repr=False)
    validation_samples: int
    weights: dict[str, float] = field(default_factory=dict)  # of a mixture that has any, in the order of its sources

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 (samples,)."""
        return np.diff(self.offsets)

    @cached_property
    def train(self) -> View:
        return View(self, self._split[0], weighted=True)

    @cached_property
    def validation(self) -> View:
        return View(self, self._split[1])

    @property
    def fingerprint(self) -> str:
        weights = f":{json.dumps(self.weights)}" if self.weights else ""
        return hashlib.sha256(f"{self.meta['fingerprint']}:{self.validation_samples}{weights}".encode()).hexdigest()

    @property
    def template(self) -> Literal["chat", "plain"]:
        """How prompts of these data look: ``chat`` if any source's do."""
        found = [about["options"]["template"] for about in self.meta.get("sources", {"": self.meta}).values()]
        return "chat" if "chat" in found else "plain"

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        own = [about["samples"] for about in self.meta.get("sources", {}).values() if about["held_out"]]
        return split(self.hashes, self.validation_samples, sum(own))


def split(hashes: np.ndarray, validation_samples: int, own: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices (int64, ascending) of the training and of the held-out samples.

    Held out are the ``validation_samples`` smallest hashes, at most a tenth of all. Copies of a held-out sample
    are in neither part, or training would see it.

    Args:
        own: how many of the last samples are a validation source's: then the held-out ones are of these, and no copy of
            any of these is trained on.

    Raises:
        UserError: nothing is left to train on.
    """
    n = len(hashes)
    if own:
        first = n - own
        train = np.flatnonzero(~np.isin(hashes[:first], hashes[first:]))
        if not len(train):
            raise UserError("data.validation_source: every training sample is a copy of one of its rows")
        return train, np.sort(first + np.argsort(hashes[first:], kind="stable")[:validation_samples])
    count = max(0, min(validation_samples, int(n * MAX_VALIDATION_SHARE)))
    order = np.lexsort((np.arange(n), hashes))
    validation = np.sort(order[:count])
    train = np.sort(order[count:])
    if count:
        train = train[hashes[train] > hashes[order[count - 1]]]
    if not len(train):
        raise UserError(
            "data.validation_samples: every training sample is a copy of a held-out one; set data.validation_samples "
            "to 0 or use data with more than one distinct row"
        )
    return train, validation


def cache_dir(config: schema.Config) -> Path:
    """Where the caches of a configuration live, resolved or not."""
    return Path(resolve.cache_dir(config))


@contextmanager
def filled_once(path: Path, whose: str = "data.cache_dir") -> Iterator[None]:
    """A block that looks for ``path``, a file below ``whose`` folder, and makes it: one of several processes at a time.

    Raises:
        UserError: the cache cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.alone(path.with_suffix(".lock")):
            yield
    except OSError as error:
        raise UserError(f"{whose}: cannot write {path.parent}: {error.strerror or error}") from error


def fingerprint(found: list[Part], tokenizer_dir: str) -> str:
    """sha256 over the sources' content, the tokenizer's files, every option that changes tokens, and the format."""
    total = hashlib.sha256()
    about = [{"source": part.rows.fingerprint, "options": part.options.as_dict()} for part in found]
    if len(found) > 1:
        names = [{"name": part.name, "held_out": part.held_out} for part in found]
        said: dict[str, Any] = {"parts": [a | b for a, b in zip(names, about, strict=True)]}
    else:
        said = about[0]
    total.update(json.dumps({"version": TOKENS_VERSION, **said}, sort_keys=True).encode())
    for file in tokenizer_files(expand(tokenizer_dir, "trunk.path")):
        total.update(f"\0{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return total.hexdigest()


def prepare(
    config: schema.Config, tokenizer_dir: str, *, progress: bool = True, workers: int | None = None
) -> TokenizedDataset:
    """Tokenize the configured data once; later calls open what the first one built.

    ``data.max_samples`` takes the first usable rows of the source. A damaged cache is rebuilt.

    Raises:
        UserError: anything wrong with the source, the tokenizer or single rows; no usable rows.
    """
    tokenizer = load_tokenizer(tokenizer_dir)  # first: the rows may have to be fetched
    found = parts(config, tokenizer)
    name = fingerprint(found, tokenizer_dir)
    root = cache_dir(config)
    final = root / name
    if final.exists():
        try:
            found_whole = _open(final, config.data.validation_samples, verify=False)
            return _shown(_weighted(_as_it_lies(found_whole, found), config.data))
        except DamagedCache as error:
            logger.warning("%s is damaged (%s); building it again", final, error)
            disk.discard(final)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        _build(found, tokenizer, tokenizer_dir, name, final, config.data, progress=progress, workers=workers)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {root}: {error.strerror or error}") from error
    return _shown(_weighted(open_cache(final, config.data.validation_samples), config.data))


def _as_it_lies(dataset: TokenizedDataset, found: list[Part]) -> TokenizedDataset:
    """With what lies beside the files today and is not read: no part of what the cache is named by."""
    about = dataset.meta.get("sources") or {found[0].name: dataset.meta}
    about = {part.name: about[part.name] | {"not_read": list(part.rows.left)} for part in found}
    meta = dataset.meta | {"sources": about} if "sources" in dataset.meta else about[found[0].name]
    return replace(dataset, meta=meta)


def _weighted(dataset: TokenizedDataset, data: schema.Data) -> TokenizedDataset:
    """With the weights of a configuration, which decide the order of samples and no token."""
    return replace(dataset, weights={name: t["weight"] for name, t in data.sources.items() if "weight" in t})


def _shown(dataset: TokenizedDataset) -> TokenizedDataset:
    """With the mixture in its meta.json, if it is one. A folder that cannot be written keeps the one of another
    preparation, and that is said."""
    if "sources" not in dataset.meta:
        return dataset
    meta = dataset.meta | {"mixture": mixture(dataset), "mixture_is": OF_WHOM}
    if meta != dataset.meta:
        try:
            _publish(dataset.directory / "meta.json", meta)
        except UserError as error:
            logger.warning("%s: meta.json shows the mixture of another preparation (%s)", dataset.directory, error)
    return replace(dataset, meta=meta)


def mixture(dataset: TokenizedDataset) -> dict[str, dict[str, Any]]:
    """Of each source that is trained on: samples, weight if it has one, and its share of an epoch's rows."""
    samples = {name: about["samples"] for name, about in dataset.meta["sources"].items() if not about["held_out"]}
    sizes: Mapping[str, float] = dataset.weights or samples
    return {
        name: {"samples": samples[name], "weight": dataset.weights.get(name), "share": size / sum(sizes.values())}
        for name, size in sizes.items()
    }


def wait_or_prepare(
    config: schema.Config,
    tokenizer_dir: str,
    rank: int,
    *,
    progress: bool = True,
    session: str | None = None,
    timeout_seconds: float = 4 * 3600,
) -> TokenizedDataset:
    """Rank 0 builds or finds the cache; the others wait for its word and open the same directory.

    Only the file system is used, so that it works before any process group exists and however long it takes;
    the other ranks neither hash the source nor ask the hub. Rank 0's answer, a directory or an error, is a
    file named by ``session``, which all ranks of one start share and no other start has; by default made of
    what torchrun and Slurm put in the environment. With no such thing every rank prepares for itself, which
    is correct but does the work more than once.

    Raises:
        UserError: as ``prepare`` on every rank; no word from rank 0 within ``timeout_seconds``.
    """
    session = _session() if session is None else session
    if not session:
        return prepare(config, tokenizer_dir, progress=progress and rank == 0)
    asked = json.dumps([session, str(tokenizer_dir), config.training.seq_len, vars(config.data)], sort_keys=True)
    answer = cache_dir(config) / "sessions" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    if rank == 0:
        try:
            dataset = prepare(config, tokenizer_dir, progress=progress)
        except UserError as error:
            _publish(answer, {"error": str(error)})
            raise
        _publish(answer, {"directory": dataset.directory.name})
        return dataset
    arrived, deadline = time.time(), time.monotonic() + timeout_seconds
    while True:
        try:
            said = json.loads(answer.read_text())
            if "directory" in said:
                dataset = _open(cache_dir(config) / said["directory"], config.data.validation_samples, verify=False)
                return _weighted(dataset, config.data)
            # An error that was there long before this rank was is an earlier start's, on the same port.
            if answer.stat().st_mtime > arrived - ERROR_SECONDS:
                raise UserError(said["error"])
        except (OSError, ValueError, DamagedCache):
            pass  # not there yet, or not any more: rank 0 builds it again
        if time.monotonic() > deadline:
            raise UserError(
                f"data.cache_dir: rank {rank} waited {timeout_seconds:g} s for rank 0 to prepare the data in "
                f"{answer.parent.parent}; is that folder shared by all nodes? `sgt-titan prepare` builds it beforehand"
            )
        time.sleep(POLL_SECONDS)


def _session() -> str:
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT",
             "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    alone = os.environ.get("WORLD_SIZE") == "1"  # nobody to tell
    return json.dumps(found, sort_keys=True) if {"MASTER_PORT", "SLURM_JOB_ID"} & set(found) and not alone else ""


def _publish(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {path.parent}: {error.strerror or error}") from error


def open_cache(directory: Path, validation_samples: int, *, verify: bool = False) -> TokenizedDataset:
    """Memory-map a finished cache. Sizes are always checked, with ``verify`` also the sha256 of every array.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return _open(directory, validation_samples, verify=verify)
    except DamagedCache as error:
        raise UserError(f"{directory}: damaged cache ({error}); delete it, it will be built again") from error


def _open(directory: Path, validation_samples: int, *, verify: bool) -> TokenizedDataset:
    try:
        meta = json.loads((directory / "meta.json").read_text())
        expected = meta["arrays"]
        arrays = {}
        for name in ARRAYS:
            path = directory / f"{name}.npy"
            if path.stat().st_size != expected[name]["bytes"]:
                raise DamagedCache(f"{path.name} has {path.stat().st_size} bytes, not {expected[name]['bytes']}")
            if verify:
                with open(path, "rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != expected[name]["sha256"]:
                        raise DamagedCache(f"{path.name} has changed: its sha256 is not the one in meta.json")
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCache(f"{type(error).__name__}: {error}") from error
    if meta.get("version") != FORMAT_VERSION:
        raise DamagedCache(f"format {meta.get('version')}, not {FORMAT_VERSION}")
    samples, total = len(arrays["offsets"]) - 1, len(arrays["tokens"])
    shapes_agree = (
        len(arrays["roles"]) == total
        and arrays["counts"].shape == (samples, len(COUNTS))
        and len(arrays["hashes"]) == len(arrays["sources"]) == samples
        and int(arrays["offsets"][-1]) == total
        and arrays["marks"].shape == (int(arrays["mark_offsets"][-1]), MARK_FIELDS)
        and len(arrays["mark_offsets"]) == samples + 1
    )
    if not shapes_agree:
        raise DamagedCache("its arrays do not belong together")
    return TokenizedDataset(directory=directory, meta=meta, validation_samples=validation_samples, **arrays)


def _build(
    found: list[Part],
    tokenizer: Any,
    tokenizer_dir: str,
    name: str,
    final: Path,
    data: schema.Data,
    *,
    progress: bool,
    workers: int | None,
) -> None:
    largest = max(tokenizer.get_vocab().values(), default=0)
    kind = np.uint16 if largest < 2**16 else np.uint32
    begun = final.parent / "begun" / name

    def chunks_of(number: int, part: Part) -> Iterator[Chunk]:
        kept = Begun(begun, number) if many(part.rows, part.options) else None
        return tokenize_rows(part.rows, tokenizer, tokenizer_dir, part.options, workers=workers, kept=kept)

    chunks = ((part, chunks_of(number, part)) for number, part in enumerate(found))
    try:
        with disk.whole(final) as work:
            meta = _write(work, chunks, name, kind, progress, 0.0 if data.on_bad_row == "stop" else data.max_bad_share)
            if progress:
                for line in remarks(meta):
                    logger.warning("%s: %s", meta["source"], line)
            (work / "meta.json").write_text(json.dumps(meta, indent=1))
    except OSError:
        if not final.is_dir():
            raise
        # Another builder was first; its arrays are the same.
    disk.discard(begun)


class Arrays:
    """The arrays in the making: chunks are appended, one source after the other."""

    def __init__(self, directory: Path, token_type: type, files: ExitStack) -> None:
        widths = {"counts": len(COUNTS), "marks": MARK_FIELDS}
        types = {"tokens": token_type, "roles": np.uint8, "counts": np.int32, "hashes": np.uint64, "marks": np.int32}
        self.append = {
            name: files.enter_context(
                _appender(directory / f"{name}.npy", types.get(name, np.int64), widths.get(name, 0))
            )
            for name in ARRAYS
        }
        self.tokens = self.marks = 0
        self.kinds: dict[str, int] = {}
        for name in ("offsets", "mark_offsets"):
            self.append[name](np.zeros(1, dtype=np.int64))

    def add(self, chunk: Chunk, take: int) -> None:
        """The first ``take`` samples of a chunk."""
        stop = int(chunk.lengths[:take].sum())
        marks_M5 = chunk.marks[: int(chunk.mark_counts[:take].sum())]
        names = np.array([self.kinds.setdefault(kind, len(self.kinds)) for kind in chunk.kinds], dtype=np.int32)
        if len(marks_M5):
            marks_M5[:, -1] = names[marks_M5[:, -1]]
        arrays = {
            "tokens": chunk.tokens[:stop],
            "roles": chunk.roles[:stop],
            "offsets": self.tokens + np.cumsum(chunk.lengths[:take]),
            "counts": chunk.counts[:take],
            "hashes": chunk.hashes[:take],
            "sources": chunk.sources[:take],
            "marks": marks_M5,
            "mark_offsets": self.marks + np.cumsum(chunk.mark_counts[:take]),
        }
        for name, array in arrays.items():
            self.append[name](array)
        self.tokens, self.marks = self.tokens + stop, self.marks + len(marks_M5)


def _write(
    directory: Path,
    chunks: Iterable[tuple[Part, Iterator[Chunk]]],
    name: str,
    token_type: type,
    progress: bool,
    max_bad_share: float,
) -> dict[str, Any]:
    """Append the chunks of every source to the arrays; returns the content of meta.json.

    Raises:
        UserError: too many rows that cannot be used; none that can.
    """
    about = {}
    with ExitStack() as files:
        arrays = Arrays(directory, token_type, files)
        for part, of_part in chunks:
            about[part.name] = _write_part(arrays, part, of_part, progress, max_bad_share)
    meta = {
        "version": FORMAT_VERSION,
        "fingerprint": name,
        **(next(iter(about.values())) if len(about) == 1 else _together(about)),
        "arrays": {a: _describe(directory / f"{a}.npy") for a in ARRAYS},
    }
    meta["marks"]["kinds"] = list(arrays.kinds)
    return meta


def _write_part(
    arrays: Arrays, part: Part, chunks: Iterator[Chunk], progress: bool, max_bad_share: float
) -> dict[str, Any]:
    """Append a source; what is to be known of it.

    Raises:
        UserError: as ``_write``.
    """
    from tqdm import tqdm

    rows, options = part.rows, part.options
    read, used, truncated, marks_before, tokens_before = 0, 0, 0, arrays.marks, arrays.tokens
    bad: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    first_bad: list[str] = []
    values, with_response = {"values": 0, "not_found": 0}, 0
    dropped = dict.fromkeys(DROPS, 0)
    sums = np.zeros(len(COUNTS), dtype=np.int64)
    title = f"tokenizing {part.name}".strip()
    with tqdm(total=len(rows), unit=" rows", desc=title, disable=not progress, mininterval=1.0) as bar:
        for chunk in chunks:
            take = len(chunk.lengths)
            if options.max_samples:
                take = min(take, options.max_samples - used)
            arrays.add(chunk, take)
            values["values"] += chunk.marked_values
            values["not_found"] += chunk.values_not_found
            sums += chunk.counts[:take].sum(0, dtype=np.int64)
            with_response += int((chunk.counts[:take, COUNTS.index("response_targets")] > 0).sum())
            read, used, truncated = read + chunk.read, used + take, truncated + chunk.truncated
            for reason, count in chunk.dropped.items():
                dropped[reason] += count
            bad += chunk.bad
            for note, count in chunk.notes.items():
                take_note(notes, note, count)
            first_bad = [*first_bad, *chunk.first_bad][:FIRST_BAD]
            if bad and (not max_bad_share or read >= MANY_ROWS):
                _check_bad(bad, first_bad, read, max_bad_share)
            bar.update(chunk.read)
            if options.max_samples and used >= options.max_samples:
                break
    if bad:
        _check_bad(bad, first_bad, read, max_bad_share)
    if not used:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise UserError(
            f"{rows.name}: no usable rows: {read} read, dropped {why} (too_long: more than training.seq_len "
            f"{options.seq_len} tokens; short_prompt: fewer prompt tokens than data.min_prompt_tokens "
            f"{options.min_prompt_tokens}; response_cut: training.seq_len leaves nothing of it; no_response: and "
            "objective.utility_positions is response)"
        )
    if values["values"] and arrays.marks == marks_before:
        raise MarkError(
            f"{rows.name}: none of its {values['values']} marked private values ({rows.columns['private']!r}) is in "
            "its prompts; is the column of another text? (data.columns.private; empty: no marks)"
        )
    return {
        "source": os.path.basename(rows.name),
        "options": options.as_dict(),
        "rows_read": read,
        "samples": used,
        "dropped": dropped,
        "bad_rows": {"count": bad.total(), "reasons": dict(bad.most_common()), "first": first_bad},
        "not_read": list(rows.left),
        "not_used": {"columns": list(rows.unused), **dict(notes.most_common())},
        "with_response": with_response,
        "truncated": truncated,
        "tokens": arrays.tokens - tokens_before,
        "marks": values,
        **{f"{kind}_tokens": int(n) for kind, n in zip(COUNTS, sums, strict=True)},
        "held_out": part.held_out,
    }


def _together(about: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known of a mixture: sums, and of each source all."""
    first = next(iter(about.values()))
    sums = {k: sum(a[k] for a in about.values()) for k, v in first.items() if type(v) is int}
    values = {k: sum(a["marks"][k] for a in about.values()) for k in ("values", "not_found")}
    return {"source": ", ".join(about), **sums, "marks": values, "sources": about}


def _check_bad(bad: Counter[str], first: list[str], read: int, most: float) -> None:
    """Raise UserError for too many rows that cannot be used: the first, and how many there are."""
    if (count := bad.total()) > most * read:
        share = f"; {count} of {read} rows cannot be used, at most {most:.0%} may (data.max_bad_share)" if most else ""
        raise UserError(f"{first[0]}{share}")


def remarks(meta: dict[str, Any]) -> list[str]:
    """What a user should know of how his rows were used, a line each; no text of theirs."""
    if "sources" in meta:
        said = {name: ["held out", *remarks(a)] if a["held_out"] else remarks(a) for name, a in meta["sources"].items()}
        return [f"{name}: {line}" for name, lines in said.items() for line in lines]
    read, bad = meta["rows_read"], meta["bad_rows"]
    lines = []
    if bad["count"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in bad["reasons"].items())
        lines.append(f"{bad['count']} of {read} rows cannot be used and were skipped: {reasons}")
        lines.append(f"the first of them: {' | '.join(bad['first'])}")
    if dropped := {reason: count for reason, count in meta["dropped"].items() if count}:
        lines.append("samples left out: " + ", ".join(f"{count} {reason}" for reason, count in dropped.items()))
    if meta["truncated"]:
        how = f"training.seq_len {meta['options']['seq_len']}, data.truncation {meta['options']['truncation']}"
        lines.append(f"{meta['truncated']} of {meta['samples']} samples were cut ({how})")
    if meta.get("not_read"):
        lines.append(f"not read: {'; '.join(meta['not_read'])}")
    columns, *rest = meta["not_used"].items()
    if columns[1]:
        lines.append(f"columns not used: {', '.join(column or 'one without a name' for column in columns[1])}")
    if rest:
        lines.append("not used, or not as it is: " + "; ".join(f"{what} ({count} samples)" for what, count in rest))
    lines.append(f"{meta['with_response'] / meta['samples']:.1%} of {meta['samples']} samples have a response")
    if marks := meta["marks"]["values"]:
        found = marks - meta["marks"]["not_found"]
        lines.append(f"{found} of {marks} marked private values are in the prompts ({meta['private_tokens']} tokens)")
    return lines


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


@contextmanager
def _appender(path: Path, dtype: type, width: int = 0) -> Iterator[Any]:
    """A function that appends arrays to a .npy file along the first axis."""
    rows = 0
    stored = np.dtype(dtype).newbyteorder("<")

    def append(array: np.ndarray) -> None:
        nonlocal rows
        rows += len(array)
        stream.write(np.ascontiguousarray(array, dtype=stored).tobytes())

    with open(path, "wb") as stream:
        length = _header(stream, stored, rows, width)
        yield append
        stream.seek(0)
        # numpy pads headers so that the first axis may grow without moving the data.
        assert _header(stream, stored, rows, width) == length


def _header(stream: IO[bytes], dtype: np.dtype, rows: int, width: int) -> int:
    shape = (rows, width) if width else (rows,)
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.tell()


def _sweep(root: Path) -> None:
    """Delete what builders that were killed left behind a week ago or earlier."""
    old = time.time() - STALE_SECONDS
    for path in [
        *root.glob(".*.tmp"),
        *root.glob("sessions/*"),
        *root.glob("rows/*"),
        *root.glob("begun/*"),
        *root.glob("remote/*"),
    ]:
        try:
            if path.stat().st_mtime < old:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # not ours, or gone
