"""``run.task finetune``'s export: a Hugging Face checkpoint, whole or not at all. Training one: tests/distributed."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from sgt_titan import checkpoint, disk
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.export import write_model

STATE = {"hf_config": {"model_type": "llama"}}


@pytest.fixture
def weights(monkeypatch):
    found = {"model.norm.weight": torch.ones(4)}
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path, prefix: dict(found))
    return found


def test_a_model_with_the_trunk_s_tokenizer(weights, tmp_path):
    out = write_model(tmp_path, STATE, TRUNK, tmp_path / "a" / "model", overwrite=False)
    assert json.loads((out / "config.json").read_text()) == STATE["hf_config"]
    assert torch.equal(load_file(out / "model.safetensors")["model.norm.weight"], torch.ones(4))
    assert (out / "tokenizer.json").read_bytes() == (TRUNK / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        write_model(tmp_path, STATE, TRUNK, out, overwrite=False)
    weights["model.norm.weight"] = torch.zeros(4)
    write_model(tmp_path, STATE, TRUNK, out, overwrite=True)
    assert torch.equal(load_file(out / "model.safetensors")["model.norm.weight"], torch.zeros(4))
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_trunk_that_is_gone_is_one_line(weights, tmp_path, exists):
    trunk = tmp_path / "trunk"
    if exists:
        trunk.mkdir()
    with pytest.raises(UserError, match=r"trunk\.path: .*trunk has no tokenizer"):
        write_model(tmp_path, STATE, trunk, tmp_path / "model", overwrite=False)
    assert not (tmp_path / "model").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free", lambda path: 10)
    with pytest.raises(UserError, match="GB free"):
        write_model(tmp_path, STATE, TRUNK, tmp_path / "a" / "model", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_model_survives_a_rename_that_fails(weights, tmp_path, monkeypatch):
    out = write_model(tmp_path, STATE, TRUNK, tmp_path / "model", overwrite=False)
    rename = os.rename

    def fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="full"):
        write_model(tmp_path, STATE, TRUNK, out, overwrite=True)
    assert (out / "model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["model"]
