"""Directories on disk: the server's checkpoint in shards, the client's half. Each appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sgt_titan import disk
from sgt_titan.conjformer.convert import Conversion
from sgt_titan.transform.shards import write_shards
from sgt_titan.trunk.tokenizer_files import copy_accompanying

CLIENT_FILE, CLIENT_WEIGHTS, CLIENT_FORMAT = "client.json", "client.safetensors", 1


def write_server(
    conversion: Conversion, out: Path, *, shard_bytes: int, say: Callable[[str], None] | None = None
) -> None:
    """The converted checkpoint; no more than a shard and the tensor at hand is in memory."""
    planned = list(conversion.planned())
    disk.require_room(out, sum(tensor.bytes for tensor in planned))

    def done(number: int, count: int, file: str) -> None:
        conversion.files.close()
        if say:
            say(f"[{number}/{count}] {file}")

    with disk.whole(out) as work:
        write_shards(planned, work, shard_bytes, done)
        _write_json(work / "config.json", conversion.server_config())
        copy_accompanying(conversion.files.path, work, tokenizer=conversion.basis is None)


def write_client(conversion: Conversion, out: Path) -> None:
    """What a client needs beside the secret: embeddings, head, tokenizer. Of the secret it holds the name, a hash."""
    tensors = {name: tensor.contiguous() for name, tensor in conversion.client_tensors().items()}
    disk.require_room(out, sum(tensor.nbytes for tensor in tensors.values()))
    about: dict[str, Any] = {
        "format": CLIENT_FORMAT,
        "model_type": conversion.config["model_type"],
        "secret": conversion.secret.name if conversion.secret else None,
        "norms": conversion.norms,
        "hidden_size": conversion.sizes.width,
        "vocab_size": conversion.sizes.vocab,
        "centred": conversion.family.centred,
        "bos_token_id": conversion.config.get("bos_token_id"),
        "eos_token_id": conversion.config.get("eos_token_id"),
    }
    with disk.whole(out) as work:
        save_file(tensors, work / CLIENT_WEIGHTS, metadata={"format": "pt"})
        _write_json(work / CLIENT_FILE, about)
        copy_accompanying(conversion.files.path, work)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
