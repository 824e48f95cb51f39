"""Whose an output directory is, and with which config: asked before anything expensive, and without torch.

<output_dir>/run.json       versions and fingerprints of the run that made it
<output_dir>/config.yaml    its resolved config
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sgt_titan import checkpoint, disk
from sgt_titan.cluster import attempts, ownership, preflight, progress, status
from sgt_titan.config.load import HOW_IT_RUNS, RECORDED, difference, load
from sgt_titan.config.schema import SOURCE_KEYS, Config, Data
from sgt_titan.errors import UserError

RUN_FILE = "run.json"

# Sections and keys in which a resumed run may differ from the one that wrote its checkpoint. Everything else decides
# what is learned.
MAY_DIFFER = (
    *HOW_IT_RUNS,
    "trunk.architecture",
    "data.source",
    "data.sources",  # their fingerprint is compared instead, and `mixture_difference` names keys
    "data.validation_source",
    "teacher_cache.dir",
    "training.steps",
    "training.epochs",
    "training.local_batch_size",
    "training.loss_chunk_tokens",
    "training.max_nonfinite_steps",
)

# What a weight is of. Whoever changes how a term is counted changes this, and a run of before is not continued as
# if the same number meant the same.
UNITS = {"objective.rate.weight": "nats a hidden token"}

# What may lie in an output directory before a run begins: a scheduler's logs, our own caches, an interrupted start.
_HARMLESS = {
    attempts.FILE,
    preflight.EXCLUDED,
    preflight.REPORTS,
    progress.FILE,
    ownership.FILE,
    status.FOLDER,
    "logs",
    ".cache",
    "tb",
    "wandb",
    "wandb_id.txt",
    "comm_traces",
    "structured_logs",
    RECORDED,
}


def _is_of(key: str, names: Collection[str]) -> bool:
    """Whether a key is one of these, or in one of these sections (with a dot at its end)."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def mixture_difference(old: Config, new: Config) -> list[str]:
    """The keys in which two mixtures differ, as ``data.sources.text.weight: 1.0 -> 2.0``; none unless both are one.

    Where a source lies may differ; what it holds, its fingerprint says.
    """
    a, b = old.data.sources, new.data.sources
    if not a or not b:
        return []
    if list(a) != list(b):
        return [f"data.sources: {', '.join(a)} -> {', '.join(b)}"]

    def value(table: Mapping[str, Any], key: str) -> Any:
        return table.get(key, getattr(Data(), key, "not set"))

    return [
        f"data.sources.{name}.{key}: {value(a[name], key)} -> {value(b[name], key)}"
        for name in a
        for key in ("weight", *SOURCE_KEYS)
        if key != "source" and value(a[name], key) != value(b[name], key)
    ]


def check(config: Config, fingerprints: Mapping[str, str] | None = None, *, unknown: Collection[str] = ()) -> int:
    """Step of the newest checkpoint of this run whose files are all there with their sizes, 0 if there is none.

    Checksums are the loading ranks' business: they share that work, and here every rank is on its own.

    Args:
        config: resolved.
        fingerprints: of trunk and data; None: not known yet, so not compared.
        unknown: keys that are not known yet either, as what the data decide.

    Raises:
        UserError: it is no place to write to, or holds something else, or a run that differs in what is learned.
    """
    folder = Path(config.run.output_dir)
    run_file = folder / RUN_FILE
    disk.writable(folder, "run.output_dir")
    if not run_file.is_file():
        foreign = [p.name for p in folder.iterdir() if p.name not in _HARMLESS] if folder.is_dir() else []
        if foreign:
            raise UserError(
                f"run.output_dir: {folder} holds {sorted(foreign)[0]!r} and is not a run of ours; "
                "choose another directory"
            )
        return 0
    recorded = json.loads(run_file.read_text())
    found = [
        f"{name} fingerprint {recorded['fingerprints'].get(name, '?')[:12]} -> {value[:12]}"
        for name, value in (fingerprints or {}).items()
        if recorded["fingerprints"].get(name, value) != value  # runs before there was one have none to compare
    ]
    found += [
        f"{key} was in {was}, is in {UNITS[key]} now"
        for key, was in recorded.get("units", {}).items()
        if was != UNITS.get(key, was)
    ]
    old = load(str(folder / RECORDED))
    found += mixture_difference(old, config)
    teachers = {"finetune.teacher"} if old.finetune.teacher and config.finetune.teacher else set()  # by fingerprint
    excused = (*MAY_DIFFER, *unknown, *teachers)
    found += [line for line in difference(old, config) if not _is_of(line.partition(":")[0], excused)]
    if found and not config.checkpoint.accept_changes:
        raise UserError(
            f"run.output_dir: {folder} belongs to a run that differs: {'; '.join(found)}. Choose another directory, or "
            "continue it on purpose with --checkpoint.accept_changes true"
        )
    paths = (path for path in checkpoint.list_steps(folder) if checkpoint.is_committed(path))
    whole = (checkpoint.step_of(path) for path in paths if not checkpoint.problems(path, checksums=False))
    return next(whole, None) or 0
