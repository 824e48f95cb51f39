"""Reading a checkpoint directory: damage, regions, fp8 blocks, fingerprint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgt_titan.errors import UserError
from sgt_titan.transform.trunk_files import EMBEDDING, TrunkFiles

FP8 = json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})


def write(path, tensors, *, config="{}"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(config)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        EMBEDDING: torch.randn(20, 8, generator=generator),
        "model.norm.weight": torch.randn(8, generator=generator).bfloat16(),
        "big": torch.randn(300, 40, generator=generator),
    }


@pytest.fixture
def sharded(trunk_dir, tmp_path):
    return shutil.copytree(trunk_dir("llama", "20KB"), tmp_path / "sharded")


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        TrunkFiles(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_index_naming_a_missing_shard(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    total = len(list(sharded.glob("*.safetensors")))
    gone.unlink()
    assert refused(sharded) == f"trunk.path: {sharded} lacks {gone.name} (1 of {total} files missing)"


def test_damaged_index(sharded):
    index = sharded / "model.safetensors.index.json"
    for text in ("not json", "[]", "{}", '{"weight_map": {"big": 3}}', '{"weight_map": {"big": "../a.safetensors"}}'):
        index.write_text(text)
        assert refused(sharded) == f"{index}: not a safetensors index; download it again"


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1, -1000])
def test_truncated_file(tmp_path, tensors, keep):
    file = write(tmp_path, tensors) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    message = refused(tmp_path)
    assert message.startswith(f"{file}: ") and message.endswith("download it again")
    if keep < 0:
        assert message == (
            f"{file}: {len(content) + keep} bytes, its header says {len(content)}: truncated; download it again"
        )


def test_not_a_safetensors_file(tmp_path, tensors):
    file = write(tmp_path, tensors) / "model.safetensors"
    other_json = (2).to_bytes(8, "little") + b"[]"
    html, pointer = b"<html>not found</html>" * 50, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for content in (html, pointer, other_json):
        file.write_bytes(content)
        assert refused(tmp_path) == f"{file}: not a safetensors file (its header is unreadable); download it again"


def test_regions_are_slices_of_the_whole(tmp_path, tensors):
    files = TrunkFiles(write(tmp_path, tensors))
    for name, whole in tensors.items():
        read = files.read(name)
        assert read.dtype == whole.dtype and torch.equal(read, whole)
    for region in ((slice(0, 300), slice(0, 40)), (slice(17, 133), slice(3, 4)), (slice(299, 300), slice(0, 40))):
        assert torch.equal(files.read("big", region), tensors["big"][region])
    assert torch.equal(files.read("model.norm.weight", (slice(2, 5),)), tensors["model.norm.weight"][2:5])
    assert torch.equal(files.embedding_table(), tensors[EMBEDDING])


def test_sharded_checkpoint_reads_every_shard(sharded):
    stored = {}
    for file in sharded.glob("*.safetensors"):
        stored |= load_file(file)
    files = TrunkFiles(sharded)
    assert set(files.entries) == set(stored)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in stored.items())


def test_check_names_the_first_wrong_tensor(tmp_path, tensors):
    files = TrunkFiles(write(tmp_path, tensors))
    files.check({"big": (300, 40)})
    with pytest.raises(UserError, match=r"has no tensor lm_head\.weight; config\.json promises \(20, 8\)$"):
        files.check({"big": (300, 40), "lm_head.weight": (20, 8)})
    with pytest.raises(UserError, match=r": big is \(300, 40\), config\.json promises \(300, 41\)$"):
        files.check({"big": (300, 41)})


def test_no_embedding_table(tmp_path, tensors):
    tensors.pop(EMBEDDING)
    with pytest.raises(UserError, match=r"has no tensor model\.embed_tokens\.weight"):
        TrunkFiles(write(tmp_path, tensors)).embedding_table()


# -- DeepSeek's fp8 blocks ---------------------------------------------------------------------------------------------


def test_fp8_blocks_by_hand(tmp_path):
    rows, columns = 300, 200  # 3 x 2 blocks of 128, the last ones cut
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=generator) + 0.5
    files = TrunkFiles(write(tmp_path, {"w": stored, "w_scale_inv": scale}, config=FP8))

    expected = torch.empty(rows, columns)
    for i in range(rows):
        for block in range(2):
            part = slice(128 * block, min(128 * (block + 1), columns))
            expected[i, part] = stored[i, part].float() * scale[i // 128, block]
    whole = files.read("w")
    assert whole.dtype == torch.float32 and torch.equal(whole, expected)
    for region in (
        (slice(100, 290), slice(120, 140)),
        (slice(128, 256), slice(0, 200)),
        (slice(299, 300), slice(5, 6)),
    ):
        assert torch.equal(files.read("w", region), expected[region])


def test_fp8_experts_load_into_the_trunk(trunk_dir, tmp_path):
    """An fp8 copy of a DeepSeek checkpoint: every projection quantised, and loaded as its dequantised values."""
    from transformers import AutoConfig

    from sgt_titan.titan.load_trunk import load_trunk, named_weights
    from sgt_titan.titan.trunks import build, family_of, hf_name

    source = trunk_dir("deepseek")
    stored = load_file(source / "model.safetensors")
    quantised, expected = {}, dict(stored)
    for name, tensor in stored.items():
        if name.endswith("_proj.weight"):
            low = (tensor / 0.25).to(torch.float8_e4m3fn)
            quantised |= {name: low, f"{name}_scale_inv": torch.full((1, 1), 0.25)}
            expected[name] = low.float() * 0.25
        else:
            quantised[name] = tensor
    config = json.loads((source / "config.json").read_text()) | json.loads(FP8)
    path = write(tmp_path, quantised, config=json.dumps(config))
    hf = AutoConfig.from_pretrained(path)
    trunk = build(hf, "sdpa").build()
    load_trunk(trunk, family_of(hf), TrunkFiles(path))
    checked = 0
    for name, tensor in named_weights(trunk).items():
        target = hf_name(family_of(hf), name)
        rows = enumerate(tensor) if "{}" in target else [(0, tensor)]
        for expert, row in rows:
            assert torch.equal(row.detach(), expected[target.format(expert)])
            checked += 1
    assert checked == len(stored)


# -- fingerprint -------------------------------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_place_or_sharding(trunk_dir, tmp_path):
    whole = TrunkFiles(trunk_dir("llama")).fingerprint()
    assert TrunkFiles(trunk_dir("llama", "20KB")).fingerprint() == whole
    assert TrunkFiles(shutil.copytree(trunk_dir("llama"), tmp_path / "copy")).fingerprint() == whole
    assert len(whole) == 64 and int(whole, 16)


def test_fingerprint_sees_every_tensor_and_byte_of_small_ones(trunk_dir, tmp_path):
    source = trunk_dir("llama")
    tensors = load_file(source / "model.safetensors")
    before = TrunkFiles(source).fingerprint()
    for name in tensors:
        changed = {k: v.clone() for k, v in tensors.items()}
        flat = changed[name].view(-1)
        flat[flat.numel() // 2] += 1e-3  # tensors of up to 8 KiB are read whole
        if flat.numel() * 4 > 8192:
            flat[-1] += 1e-3  # a fine-tune changes more than one number
        assert TrunkFiles(write(tmp_path, changed)).fingerprint() != before, name
    renamed = {k.replace("norm", "norn"): v for k, v in tensors.items()}
    assert TrunkFiles(write(tmp_path, renamed)).fingerprint() != before
    half = {k: v.bfloat16() for k, v in tensors.items()}
    assert TrunkFiles(write(tmp_path, half)).fingerprint() != before
    del tensors["model.norm.weight"]
    assert TrunkFiles(write(tmp_path, tensors)).fingerprint() != before


def test_fingerprint_of_transposed_shape_differs(tmp_path):
    a = TrunkFiles(write(tmp_path / "a", {"w": torch.zeros(4, 6)})).fingerprint()
    assert TrunkFiles(write(tmp_path / "b", {"w": torch.zeros(6, 4)})).fingerprint() != a


def test_index_json_is_what_decides(sharded):
    """A stray file beside the shards is not part of the checkpoint."""
    before = TrunkFiles(sharded).fingerprint()
    save_file({"stray": torch.zeros(2)}, sharded / "adapter.safetensors")
    assert TrunkFiles(sharded).fingerprint() == before
    assert json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
