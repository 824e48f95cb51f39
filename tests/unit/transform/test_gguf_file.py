"""GGUF files, written by the `gguf` package as llama.cpp writes them, are the model they were made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sgt_titan.errors import UserError
from sgt_titan.transform.convert_trunk import convert, main
from sgt_titan.transform.gguf_file import GGUF, ROPE_FACTORS
from sgt_titan.transform.shards import write_shards
from sgt_titan.transform.trunk_files import TrunkFiles

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.fixture
def written(trunk_dir, tmp_path):
    """``written(name, kind)``: a trunk as a GGUF file beside its config.json and tokenizer."""

    def write(name: str, kind: str, *, architecture: str = "", more: tuple[str, ...] = (), **facts) -> Path:
        folder = shutil.copytree(trunk_dir(name), tmp_path / "original")
        config = json.loads((folder / "config.json").read_text())
        files, architecture = TrunkFiles(folder), architecture or config["model_type"]
        path = folder / "model.gguf"
        out = gguf.GGUFWriter(str(path), architecture)
        out.add_block_count(config["num_hidden_layers"])
        out.add_embedding_length(facts.get("width", config["hidden_size"]))
        out.add_head_count(config["num_attention_heads"])
        out.add_head_count_kv(config["num_key_value_heads"])
        arch = next((k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), gguf.MODEL_ARCH.LLAMA)
        names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
        for entry in files.entries:
            module, _, suffix = entry.rpartition(".")
            weight = files.read(entry).float().numpy()
            for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if architecture == "llama" and part in module:  # rows of a head: pairs of the interleaved RoPE
                    shape = (config[heads], 2, -1, weight.shape[1])
                    weight = weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)
            low = weight.ndim > 1 and kind != "F32"
            if low and kind.startswith("Q") and weight.shape[-1] % 32:  # no block: llama.cpp takes another type too
                quantised = gguf.GGMLQuantizationType.F16
            else:
                quantised = gguf.GGMLQuantizationType[kind if low else "F32"]
            data = gguf.quants.quantize(np.ascontiguousarray(weight), quantised)
            out.add_tensor(f"{names.get_name(module)}.{suffix}", data, raw_dtype=quantised)
        if parts := facts.get("parts"):
            out.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, parts)
        for tensor in more:
            out.add_tensor(tensor, np.ones(4, dtype=np.float32))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        return path

    return write


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [("llama", "F32", 0), ("llama", "F16", 5e-4), ("llama", "Q8_0", 1 / 120), ("qwen2", "Q4_0", 1 / 7),
     ("qwen3", "BF16", 4e-3)],
)  # fmt: skip
def test_the_weights_are_the_original_s(written, trunk_dir, tmp_path, name, kind, error):
    out = tmp_path / "out"
    file = written(name, kind)
    assert kind in {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors}
    assert main([str(file), str(out)]) == 0
    before, after = TrunkFiles(trunk_dir(name)), TrunkFiles(out)
    assert set(after.entries) == set(before.entries) and (out / "tokenizer.json").is_file()
    half = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert kind not in half or after.read("model.embed_tokens.weight").dtype == half[kind]
    for entry in before.entries:
        a, b = before.read(entry).float(), after.read(entry).float()
        assert (a - b).abs().max() <= error * a.abs().max() * 1.01, entry


def test_a_shard_at_a_time(written, tmp_path):
    file = written("llama-tied", "Q8_0")
    config = json.loads((file.parent / "config.json").read_text())
    out = tmp_path / "parts"
    out.mkdir()
    write_shards(list(GGUF(file, config).planned()), out, 20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(list(out.glob("model-*.safetensors"))) == len(set(index.values())) > 2
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(file.parent / name, out / name)
    assert "lm_head.weight" not in TrunkFiles(out).entries


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        ({"architecture": "gemma"}, {}, "GGUF of the architecture 'gemma' is not read here; llama, qwen2, qwen3 are"),
        ({}, {"model_type": "qwen3"}, "is of the architecture llama, and config.json beside it of model_type 'qwen3'"),
        ({"width": 128}, {}, "says embedding_length 128, and config.json beside it hidden_size"),
        ({"parts": 2}, {}, "is one of 2 parts; merge them (llama-gguf-split --merge)"),
        ({"more": (ROPE_FACTORS,)}, {}, "has a scaled RoPE, and config.json beside it none"),
        (
            {"more": ("blk.0.attn_q.bias",)},
            {},
            "holds blk.0.attn_q.bias, which config.json beside it does not describe",
        ),
        ({}, {"num_hidden_layers": 9}, "says block_count"),
    ],
)
def test_another_model_than_its_config_says_is_refused(written, tmp_path, options, change, says):
    file = written("llama", "F16", **options)
    config = json.loads((file.parent / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as caught:
        convert(file, tmp_path / "out")
    assert says in str(caught.value) and not (tmp_path / "out").exists()


def test_what_must_lie_beside_it(written, tmp_path):
    file = written("llama", "F16")
    (file.parent / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer.json; put the original's beside model.gguf"):
        convert(file, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:100])
    (file.parent / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        convert(file, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]
