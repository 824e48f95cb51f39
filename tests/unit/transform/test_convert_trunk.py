"""Pickles and adapters become checkpoints that are read; nothing is run, nothing is left out."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgt_titan import disk
from sgt_titan.errors import UserError
from sgt_titan.transform.convert_trunk import convert, main
from sgt_titan.transform.trunk_files import TrunkFiles

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pickled(trunk_dir, tmp_path):
    """``pickled(name, files)``: a copy of a trunk whose weights are so many pickles, as torch saves them."""

    def make(name: str, files: int = 1):
        path = shutil.copytree(trunk_dir(name), tmp_path / "pickled")
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        if name.endswith("tied"):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        names = sorted(tensors)
        parts = [names[i::files] for i in range(files)]
        where = {}
        for i, part in enumerate(parts):
            file = f"pytorch_model-{i}.bin" if files > 1 else "pytorch_model.bin"
            torch.save({key: tensors[key] for key in part}, path / file)
            where |= dict.fromkeys(part, file)
        if files > 1:
            (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        return path

    return make


@pytest.mark.parametrize(("name", "files"), [("llama", 1), ("llama-tied", 1), ("qwen2", 3)])
def test_pickles(pickled, trunk_dir, tmp_path, name, files):
    out = tmp_path / "out"
    assert main([str(pickled(name, files)), str(out)]) == 0
    before, after = TrunkFiles(trunk_dir(name)), TrunkFiles(out)
    assert after.fingerprint() == before.fingerprint() and len(list(out.glob("*.safetensors"))) == files
    assert (out / "tokenizer.json").is_file()


def test_a_disk_without_room_is_told_before_anything_is_written(pickled, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free", lambda path: 1000)
    with pytest.raises(UserError, match=r"0\.000 GB free, .* GB needed"):
        convert(pickled("llama"), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


class Evil:
    target = ""

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_code_in_a_pickle_is_not_run(pickled, tmp_path, monkeypatch):
    path, ran = pickled("llama"), tmp_path / "ran"
    monkeypatch.setattr(Evil, "target", str(ran))
    torch.save({"model.norm.weight": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read without running its code"):
        convert(path, tmp_path / "out")
    assert not ran.exists() and not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


@pytest.fixture
def adapter(trunk_dir, tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    rows, columns = TrunkFiles(trunk_dir("llama")).entries[f"{Q}.weight"].shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, columns, generator=generator) * 0.1, torch.randn(rows, 3, generator=generator) * 0.1
    save_file(
        {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": b},
        path / "adapter_model.safetensors",
    )
    about = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "bias": "none", "use_rslora": False}
    (path / "adapter_config.json").write_text(json.dumps(about))
    return path, b @ a


def edit(path, **changes) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("changes", "scale"), [({}, 4.0), ({"use_rslora": True}, 12 / 3**0.5)])
def test_an_adapter_is_merged(trunk_dir, adapter, tmp_path, changes, scale):
    path, product = adapter
    edit(path, **changes)
    convert(trunk_dir("llama"), tmp_path / "out", path)
    before, after = TrunkFiles(trunk_dir("llama")), TrunkFiles(tmp_path / "out")
    for name in before.entries:
        change = scale * product if name == f"{Q}.weight" else 0.0
        torch.testing.assert_close(after.read(name), before.read(name) + change)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "'IA3' is not LORA"),
        ({"r": None}, "r is None"),
    ],
)
def test_adapters_that_do_more_are_refused(trunk_dir, adapter, tmp_path, changes, message):
    edit(adapter[0], **changes)
    with pytest.raises(UserError, match=message):
        convert(trunk_dir("llama"), tmp_path / "out", adapter[0])
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(trunk_dir, adapter, tmp_path):
    path, _ = adapter
    tensors = load_file(path / "adapter_model.safetensors")
    other = {name.replace("layers.0", "layers.9"): tensor for name, tensor in tensors.items()}
    save_file(other, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is of no tensor in"):
        convert(trunk_dir("llama"), tmp_path / "out", path)
    save_file(
        {name: tensor[:2, :2].contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="does not fit the base's"):
        convert(trunk_dir("llama"), tmp_path / "out", path)
    with pytest.raises(UserError, match="there is nothing to convert"):
        convert(trunk_dir("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
