"""``sgt-titan convert-trunk``: a checkpoint in pickles, a GGUF file, or a base with a LoRA adapter, as safetensors.

A file at a time is in memory, of a GGUF a shard. Pickles are opened by torch's ``weights_only``, which builds tensors
and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sgt_titan import disk
from sgt_titan.arguments import Parser
from sgt_titan.errors import UserError
from sgt_titan.transform.gguf_file import GGUF, SHARD_BYTES, SUFFIX
from sgt_titan.transform.shards import shard_name, write_index, write_shards
from sgt_titan.trunk.check import EMBEDDING, HEAD, check_checkpoint
from sgt_titan.trunk.families import check_config, is_tied
from sgt_titan.trunk.files import CONFIG, check_folder, read_json, weight_files
from sgt_titan.trunk.tokenizer_files import copy_accompanying

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER = "tokenizer.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
# Options of a LoRA adapter that change what is merged, with the values that mean nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and check that the result is what ``train`` reads.

    Raises:
        UserError: a folder of another kind, an adapter that is no plain LoRA, a pickle that holds more than tensors.
    """
    parser = Parser(
        prog="sgt-titan convert-trunk",
        description="Write a checkpoint as safetensors: from pickles (pytorch_model.bin), which are opened without "
        "running their code, from a GGUF file, dequantised, or with a LoRA adapter merged.",
    )
    parser.add_argument(
        "trunk", type=Path,
        help="directory with config.json, tokenizer and weights; or a GGUF file with the original's config.json and "
        "tokenizer beside it",
    )  # fmt: skip
    parser.add_argument("out", type=Path, help="the directory to write: missing or empty")
    parser.add_argument("--adapter", type=Path, help="directory of a LoRA adapter to merge into it")
    arguments = parser.parse_args(argv)
    convert(arguments.trunk, arguments.out, arguments.adapter)
    print(f"written to {arguments.out}")
    return 0


def convert(trunk: Path, out: Path, adapter: Path | None = None) -> None:
    """Write ``out``; it appears whole or not at all. Raises UserError as ``main``."""
    stored = trunk if trunk.suffix == SUFFIX and trunk.is_file() else None
    folder = check_folder(trunk.parent if stored else trunk, "TRUNK")
    config = read_json(folder / CONFIG)
    check_config(config)
    disk.check_target(out, "OUT")
    if stored:
        if adapter is not None:
            raise UserError("--adapter: convert the GGUF file first, then merge into the result")
        if not (folder / TOKENIZER).is_file():
            raise UserError(f"TRUNK: {folder} has no {TOKENIZER}; put the original's beside {stored.name}")
        planned = list(GGUF(stored, config).planned())
        disk.require_room(out, sum(tensor.bytes for tensor in planned))
        with _whole(out, folder) as work:
            write_shards(planned, work, SHARD_BYTES)
        return
    pickled = (folder / BIN).is_file() or (folder / BIN_INDEX).is_file()
    if not pickled and adapter is None:
        raise UserError(f"TRUNK: {folder} has no {BIN}, and no --adapter is given: there is nothing to convert")
    files = bin_files(folder) if pickled else weight_files(folder)
    lora = Lora(adapter) if adapter is not None else None
    disk.require_room(out, sum(file.stat().st_size for file in files))
    with _whole(out, folder) as work:
        write(files, work, tied=is_tied(config), lora=lora)
        if lora is not None and lora.left:
            raise UserError(f"--adapter: {adapter}: {sorted(lora.left)[0]} is of no tensor in {folder}: another base?")


@contextmanager
def _whole(out: Path, folder: Path) -> Iterator[Path]:
    """A directory to write weights to, which becomes ``out`` with all else of ``folder`` once it is a trunk."""
    with disk.whole(out) as work:
        yield work
        (work / CONFIG).write_text((folder / CONFIG).read_text(encoding="utf-8"), encoding="utf-8")
        copy_accompanying(folder, work)
        check_checkpoint(work)


def bin_files(folder: Path) -> list[Path]:
    """The pickles that are the model: one, or those of the index. Raises UserError if one is missing."""
    if (folder / BIN).is_file():
        return [folder / BIN]
    found = read_json(folder / BIN_INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(f, str) and Path(f).name == f for f in found.values()):
        raise UserError(f"{folder / BIN_INDEX}: not an index of weights; download it again")
    names = sorted(set(found.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"TRUNK: {folder} lacks {missing[0]} ({len(missing)} of {len(names)} files missing)")
    return [folder / name for name in names]


def read(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file. Raises UserError for a pickle that is damaged or holds anything but tensors."""
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"{file}: cannot be read without running its code, or is damaged ({reason})") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise UserError(f"{file}: is not a dictionary of tensors")
    return found


def write(files: Sequence[Path], out: Path, *, tied: bool, lora: Lora | None) -> None:
    """One safetensors file for each file, and the index of several."""
    where: dict[str, str] = {}
    total = 0
    for i, file in enumerate(files, start=1):
        name = shard_name(i, len(files))
        tensors = dict(_prepared(read(file), tied, lora))
        if twice := where.keys() & tensors.keys():
            raise UserError(f"{file}: {sorted(twice)[0]} stands in another file too")
        save_file(tensors, out / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(out, where, total)


def _prepared(found: dict[str, torch.Tensor], tied: bool, lora: Lora | None) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in found.items():
        if tied and name == HEAD and EMBEDDING in found and torch.equal(tensor, found[EMBEDDING]):
            continue  # torch saves a tied head beside the table
        merged = tensor if lora is None else lora.merged(name, tensor)
        yield name, merged.detach().clone().contiguous()  # two names may share their memory


class Lora:
    """A plain LoRA adapter (arXiv 2106.09685): W + alpha / r B A, or alpha / sqrt(r) with ``use_rslora``.

    Raises:
        UserError: another kind of adapter, or one that does more than that.
    """

    def __init__(self, folder: Path):
        if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER).is_file():
            raise UserError(f"--adapter: {folder} has no {ADAPTER_CONFIG} or no {ADAPTER}")
        config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        if config.get("peft_type") != "LORA":
            raise UserError(f"--adapter: {folder}: peft_type {config.get('peft_type')!r} is not LORA")
        for key, plain in _PLAIN.items():
            if config.get(key, plain[0]) not in plain:
                raise UserError(f"--adapter: {folder}: {key} is {config[key]!r}, merge it with peft instead")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise UserError(f"--adapter: {folder}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers")
        self.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.tensors = {name.removeprefix("base_model.model."): t for name, t in load_file(folder / ADAPTER).items()}
        self.left = set(self.tensors)

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with what the adapter adds to it, computed in float32."""
        module = name.removesuffix(".weight")
        pair = [f"{module}.lora_{letter}.weight" for letter in "AB"]
        if not all(part in self.tensors for part in pair):
            return weight
        self.left -= set(pair)
        a_RI, b_OR = (self.tensors[part].float() for part in pair)
        if (b_OR.shape[0], a_RI.shape[1]) != tuple(weight.shape) or not weight.is_floating_point():
            raise UserError(f"--adapter: {module}: does not fit the base's {name} {tuple(weight.shape)}; another base?")
        return (weight.float() + self.scale * b_OR @ a_RI).to(weight.dtype)
