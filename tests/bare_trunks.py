"""Trunks of zeros, whose headers alone are looked at, and what becomes of each kind: the table in docs/TRAINING.md.

python -m tests.bare_trunks
"""

from __future__ import annotations

import json
import math
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from sgt_titan.errors import UserError
from sgt_titan.trunk.check import check_checkpoint
from sgt_titan.trunk.families import TRAINED, WITHOUT_ROW, shapes
from sgt_titan.trunk.files import INDEX, ITEMSIZE, SINGLE

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 10,
    "max_position_embeddings": 256,
}
FAMILY_FIELDS = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 4, "num_experts_per_tok": 1},
    "deepseek_v3": {
        "q_lora_rank": 4,
        "kv_lora_rank": 4,
        "qk_nope_head_dim": 2,
        "qk_rope_head_dim": 2,
        "v_head_dim": 2,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 4,
        "first_k_dense_replace": 1,
    },
}
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> safetensors' name of its type, shape


def write_file(file: Path, tensors: Tensors) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = ITEMSIZE[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_bare_trunk(path: Path, **changes) -> dict:
    """A config.json with ``changes``, the weights it promises, and a file in the tokenizer's place; the config."""
    config = CONFIG | FAMILY_FIELDS.get(changes.get("model_type", ""), {}) | changes
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    write_file(path / SINGLE, {name: ("F32", shape) for name, shape in shapes(config).items()})
    return config


def stored(path: Path, dtype: str, scales: str = "", block: int = 0, **quantization) -> None:
    """The projections in another type, with scales of that name: by blocks, or by rows."""
    config = write_bare_trunk(path, **({"quantization_config": quantization} if quantization else {}))
    tensors: Tensors = {}
    for name, shape in shapes(config).items():
        low = name.endswith("_proj.weight")
        tensors[name] = (dtype if low else "F32", shape)
        if low and scales:
            rows, columns = (-(-n // block) for n in shape) if block else (shape[0], 1)
            tensors[name + scales] = ("F32", (rows, columns))
    write_file(path / SINGLE, tensors)


def compressed(form: str, **weights) -> dict:
    group = {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": True} | weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def renamed(path: Path, name: str) -> None:
    write_bare_trunk(path)
    (path / SINGLE).rename(path / name)


def adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").touch()


def with_adapter(path: Path) -> None:
    write_bare_trunk(path)
    (path / "adapter_config.json").write_text("{}")


def hub_cache(path: Path) -> None:
    write_bare_trunk(path / "snapshots" / "0123abc")


def sharded(path: Path, second: Callable[[Tensors], Tensors] | None) -> None:
    """Two shards and an index; ``second`` changes the tensors of the second, None leaves it out."""
    config = write_bare_trunk(path)
    whole = {name: ("F32", shape) for name, shape in shapes(config).items()}
    names = list(whole)
    half = len(names) // 2
    parts = [{name: whole[name] for name in names[:half]}, {name: whole[name] for name in names[half:]}]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (path / SINGLE).unlink()
    write_file(path / files[0], parts[0])
    if second is not None:
        write_file(path / files[1], second(parts[1]))
    index = {name: files[name in parts[1]] for name in names}
    (path / INDEX).write_text(json.dumps({"weight_map": index}))


def with_index(path: Path) -> None:
    write_bare_trunk(path)
    (path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "old.safetensors"}}))


def own_head(path: Path) -> None:
    config = write_bare_trunk(path, tie_word_embeddings=True)
    tensors: Tensors = {name: ("F32", shape) for name, shape in shapes(config).items()}
    write_file(path / SINGLE, tensors | {"lm_head.weight": ("BF16", (10, 8))})


def extra(path: Path) -> None:
    config = write_bare_trunk(path)
    tensors: Tensors = {name: ("F32", shape) for name, shape in shapes(config).items()}
    write_file(path / SINGLE, tensors | {"model.layers.0.self_attn.q_proj.bias": ("F32", (8,))})


# What a user has -> how its folder is made.
CASES: dict[str, Callable[[Path], object]] = {
    **{kind: lambda path, kind=kind: write_bare_trunk(path, model_type=kind) for kind in TRAINED},
    "mistral with a window": lambda path: write_bare_trunk(path, model_type="mistral", sliding_window=128),
    **{
        kind: lambda path, kind=kind: (write_bare_trunk(path), rewrite(path, model_type=kind))[1]
        for kind in (*WITHOUT_ROW, "bloom")
    },
    "fp8 by blocks (DeepSeek-V3)": lambda path: stored(
        path, "F8_E4M3", "_scale_inv", 4, quant_method="fp8", weight_block_size=[4, 4]
    ),
    "fp8 by rows (FBGEMM)": lambda path: stored(path, "F8_E4M3", "_scale", quant_method="fbgemm_fp8"),
    "compressed-tensors float8": lambda path: stored(path, "F8_E4M3", "_scale", **compressed("float-quantized")),
    "compressed-tensors int8": lambda path: stored(path, "I8", "_scale", **compressed("int-quantized")),
    "compressed-tensors int4": lambda path: stored(path, "I32", **compressed("pack-quantized", num_bits=4)),
    "float8 without its config": lambda path: stored(path, "F8_E4M3", "_scale_inv", 4),
    **{
        kind: lambda path, kind=kind: stored(path, "I8", quant_method=kind)
        for kind in ("awq", "gptq", "bitsandbytes", "hqq", "mxfp4")
    },
    "two shards": lambda path: sharded(path, lambda tensors: tensors),
    "a shard missing": lambda path: sharded(path, None),
    "a tensor in two shards": lambda path: sharded(path, lambda tensors: tensors | {"lm_head.weight": ("F32", (10, 8))}
    | {"model.embed_tokens.weight": ("F32", (10, 8))}),
    "a single file beside an index": with_index,
    "tied, with an lm_head of its own": own_head,
    "a bias that config.json does not say": extra,
    "pytorch_model.bin": lambda path: renamed(path, "pytorch_model.bin"),
    "GGUF": lambda path: renamed(path, "model-Q8_0.gguf"),
    "a LoRA adapter alone": adapter,
    "a LoRA adapter beside weights": with_adapter,
    "a folder of the hub's cache": hub_cache,
    "a file instead of a folder": lambda path: path.touch(),
    "no tokenizer.json": lambda path: (write_bare_trunk(path), (path / "tokenizer.json").unlink()),
}  # fmt: skip


def rewrite(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def outcomes() -> Iterator[tuple[str, str]]:
    """(what a user has, what becomes of it)."""
    for name, make in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trunk"
            make(path)
            try:
                config = check_checkpoint(path)
                read = "quantization_config" in config
                yield name, "read, dequantised" if read else "read"
            except UserError as error:
                yield name, f"refused: {_short(str(error), path)}"


def _short(line: str, path: Path) -> str:
    """What is wrong, without where, what would be right, and the reader's own paths."""
    for start in ("trunk.path: ", "trunk: ", "config.json: ", "config.json has "):
        line = line.removeprefix(start)
    line = line.replace(str(path), "DIR").split("; ")[0].split(" (fp8 (by")[0].split(" (float-quantized")[0]
    return textwrap.shorten(line, 100, placeholder=" ...")


def table() -> str:
    rows = [f"| {name} | {outcome} |" for name, outcome in outcomes()]
    return "\n".join(["| trunk | outcome |", "|---|---|", *rows])


if __name__ == "__main__":
    print(table())
