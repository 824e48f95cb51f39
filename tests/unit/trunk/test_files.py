"""Which files are the model: one answer, or a line that says why there are two or none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgt_titan.errors import UserError
from sgt_titan.trunk.files import check_folder, read_entries, weight_files


def refused(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def sharded(trunk_dir, tmp_path):
    return shutil.copytree(trunk_dir("llama", "20KB"), tmp_path / "sharded")


def test_not_a_checkpoint_folder(tmp_path):
    """Each is told what it is and what to give instead."""
    (tmp_path / "snapshot" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "snapshot" / "snapshots" / "abc" / "config.json").touch()
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    (tmp_path / "blobs" / "blobs").mkdir(parents=True)
    for name, file in (
        ("adapter", "adapter_config.json"),
        ("gguf", "m.gguf"),
        ("meta", "consolidated.00.pth"),
        ("empty", "x"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    (tmp_path / "meta" / "params.json").touch()
    for what, expected in {
        "https://hub.co/a/b": "is a URL; download",
        "s3://bucket/a": "is a URL; download",
        f"{tmp_path}/gg*": "patterns are not expanded",
        f"{tmp_path}/gguf/m.gguf": "sgt-titan convert-trunk FILE.gguf OUT",
        f"{tmp_path}/meta/params.json": f"give its folder, {tmp_path}/meta",
        "meta-llama/Llama-3.2-1B": "hf download meta-llama/Llama-3.2-1B --local-dir DIR",
        f"{tmp_path}/none": f"no directory {tmp_path}/none",
        f"{tmp_path}/snapshot": f"give {tmp_path}/snapshot/snapshots/abc",
        f"{tmp_path}/hub": "give a folder below models--a--b/snapshots",
        f"{tmp_path}/blobs": "without a snapshot",
        f"{tmp_path}/adapter": "LoRA adapter alone: merge it into its base first",
        f"{tmp_path}/gguf": "GGUF files: sgt-titan convert-trunk",
        f"{tmp_path}/meta": "in its maker's own format",
        f"{tmp_path}/empty": "it must be a Hugging Face checkpoint directory",
    }.items():
        assert expected in refused(check_folder, what), what


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "its weights are a pickle (.bin), which can run code and is not read"),
        ("m.gguf", "it holds GGUF files: sgt-titan convert-trunk"),
        ("adapter_config.json", "a LoRA adapter without its base"),
        ("model-00001-of-00002.safetensors", "there is model-00001-of-00002.safetensors: download the index"),
        ("config.json", "download the weights"),
    ],
)
def test_no_weights_that_are_read(tmp_path, name, expected):
    (tmp_path / name).write_bytes(b"never unpickled")
    assert expected in refused(weight_files, tmp_path)


def test_a_single_file_beside_an_index_is_two_models(sharded):
    save_file({"model.norm.weight": torch.ones(2)}, sharded / "model.safetensors")
    assert "which are two models" in refused(weight_files, sharded)


def test_a_tensor_in_two_shards(sharded):
    one, two = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(one).items()))
    save_file({**load_file(two), name: tensor + 1}, two)
    assert refused(read_entries, sharded) == (
        f"trunk.path: {sharded}: {name} is in {one.name} and {two.name}; one of the two is stale"
    )


def test_an_index_that_says_another_shard(sharded):
    index = sharded / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    name, file = next(iter(found["weight_map"].items()))
    found["weight_map"][name] = next(other for other in found["weight_map"].values() if other != file)
    index.write_text(json.dumps(found))
    assert f"says {name} is in" in refused(read_entries, sharded)
    found["weight_map"] |= {name: file, "model.gone.weight": file}
    index.write_text(json.dumps(found))
    assert "says model.gone.weight is in" in refused(read_entries, sharded)


def test_bytes_that_do_not_fit_a_shape(bare_trunk, tmp_path):
    bare_trunk(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape": [10, 8]', b'"shape": [10, 9]', 1))
    assert "has not the bytes of its shape and type" in refused(read_entries, tmp_path)
