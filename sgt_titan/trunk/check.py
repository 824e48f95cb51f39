"""Everything that config.json and the headers of the weights say about a trunk, before anything expensive."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgt_titan.errors import UserError

from .families import check_config, is_tied, shapes, unexpected
from .files import CONFIG, Entry, check_folder, read_entries, read_json
from .quantisation import scheme_of, weights_of
from .tokenizer_files import check_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WINDOW, WINDOWS = 4096, 256  # bytes of a window, and how many of a tensor are compared: 1 MiB, whole where smaller


def check_checkpoint(path: str | Path, *, any_family: bool = False) -> dict[str, Any]:
    """The config.json of a folder whose files are exactly the model that it describes, with a tokenizer.

    Reads headers, and a mebibyte where two tensors may be one.

    Args:
        any_family: a model of transformers' own is trained, so names and shapes are checked where it is built.

    Raises:
        UserError: the first thing that is wrong.
    """
    folder = check_folder(path)
    config = read_json(folder / CONFIG)
    if not any_family:
        check_config(config)  # first: of another family, nothing else matters
    entries = weights_of(read_entries(folder), scheme_of(config))
    if not any_family:
        check_entries(folder, config, entries)
    check_tokenizer(folder, config)
    return config


def check_entries(folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Raises UserError unless ``entries`` are the tensors that a family's config.json promises, no more, no less."""
    check_shapes(folder, shapes(config), entries)
    check_tie(folder, is_tied(config), entries)
    if extra := [name for name in unexpected(entries, config) if name != HEAD]:
        raise UserError(
            f"trunk.path: {folder} holds {extra[0]}{f' and {len(extra) - 1} more tensors' if extra[1:] else ''}, which "
            "config.json does not describe: its numbers are of another model"
        )


def check_shapes(folder: Path, expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]) -> None:
    """Raises UserError, naming the first expected tensor that is missing or of another shape."""
    for name, shape in expected.items():
        if name not in entries:
            raise UserError(f"trunk.path: {folder} has no tensor {name}; config.json promises {tuple(shape)}")
        if entries[name].shape != tuple(shape):
            raise UserError(
                f"trunk.path: {folder}: {name} is {entries[name].shape}, config.json promises {tuple(shape)}"
            )


def check_tie(folder: Path, tied: bool, entries: Mapping[str, Entry]) -> None:
    """Raises UserError for an lm_head of its own where config.json says that the embedding table is it.

    transformers would use the one in the files, and vLLM the table.
    """
    if not tied or HEAD not in entries or EMBEDDING not in entries:
        return
    if not same_bytes(entries[EMBEDDING], entries[HEAD]):
        raise UserError(
            f"trunk.path: {folder}: config.json has tie_word_embeddings true, and the files an lm_head.weight that is "
            "not the embedding table; set it to false if lm_head was trained, or remove the tensor"
        )


def same_bytes(a: Entry, b: Entry) -> bool:
    """Whether two tensors are equal, by evenly spaced windows of their bytes; both whole up to a mebibyte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    size = a.end - a.begin
    step = max(WINDOW, size // WINDOWS)
    with a.file.open("rb") as one, b.file.open("rb") as other:
        for offset in range(0, size, step):
            one.seek(a.begin + offset)
            other.seek(b.begin + offset)
            count = min(WINDOW, size - offset)
            if one.read(count) != other.read(count):
                return False
    return True
