"""Whose config.json it is, and what is wrong with the trunk's directory."""

import json
from pathlib import Path

import pytest

from sgt_titan.config.resolve import resolve
from sgt_titan.config.trunk import read_trunk
from sgt_titan.errors import UserError
from tests.unit.config.configs import TRUNK, config_of


@pytest.fixture
def trunk_folder(tmp_path, bare_trunk) -> Path:
    assert bare_trunk(tmp_path / "trunk", **TRUNK) == TRUNK
    return tmp_path / "trunk"


def trunk_error(path, architecture="", weights=True) -> str:
    with pytest.raises(UserError) as caught:
        read_trunk(config_of(f"trunk.architecture={architecture}", tmp=str(path)), weights=weights)
    return str(caught.value)


def test_read_trunk(tmp_path, trunk_folder):
    folder = str(trunk_folder)
    assert read_trunk(config_of(tmp=folder)) == TRUNK
    architecture = tmp_path / "arch.json"
    architecture.write_text(json.dumps({**TRUNK, "rope_theta": 1}))
    words = f"trunk.architecture={architecture}"
    assert read_trunk(config_of(words, tmp=folder)) == TRUNK
    assert read_trunk(config_of(words, tmp=""), weights=False)["rope_theta"] == 1
    assert read_trunk(config_of(words, tmp=str(tmp_path / "no")), weights=False)["rope_theta"] == 1


def test_arithmetic_needs_no_variable(tmp_path, monkeypatch):
    """A dry run of a shipped config, before the site has said where its trunks are."""
    monkeypatch.delenv("SGT_NO", raising=False)
    (tmp_path / "a.json").write_text(json.dumps(TRUNK))
    config = resolve(config_of("trunk.path=${SGT_NO}/m", f"trunk.architecture={tmp_path}/a.json"), world_size=1)
    assert read_trunk(config, weights=False) == TRUNK
    with pytest.raises(UserError, match=r"^trunk\.path: environment variable SGT_NO is not set"):
        read_trunk(config)


def test_mistakes_of_the_trunk_directory(tmp_path, trunk_folder):
    no = tmp_path / "no"
    architecture = tmp_path / "arch.json"
    architecture.write_text(json.dumps({**TRUNK, "hidden_size": 65}))
    assert trunk_error("") == "trunk.path is not set: it must be the directory with the frozen model's checkpoint"
    assert trunk_error("", architecture).startswith("trunk.path is not set: ")
    assert trunk_error(no) == f"trunk.path: no directory {no}"
    assert trunk_error(no, architecture) == f"trunk.path: no directory {no}"
    assert trunk_error(no, no) == f"trunk.architecture: no file {no}"
    assert trunk_error(tmp_path) == (
        f"trunk.path: no config.json in {tmp_path}; it must be a Hugging Face checkpoint directory"
    )
    folder = trunk_folder
    (folder / "model.safetensors").unlink()
    none = f"trunk.path: no model.safetensors and no model.safetensors.index.json in {folder}"
    assert trunk_error(folder) == f"{none}; download the weights"
    assert trunk_error(folder, architecture, weights=False) == (
        f"trunk.architecture: hidden_size is 65 in {architecture} but 64 in {folder}/config.json"
    )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}))
    (folder / "1.safetensors").touch()
    assert trunk_error(folder) == (f"trunk.path: {folder} lacks 2.safetensors (1 of 2 files missing)")
    index.write_text("{}")
    assert trunk_error(folder) == f"{index}: not a safetensors index; download it again"
    (folder / "config.json").write_text('{"a": ')
    assert trunk_error(folder, weights=False).startswith(f"{folder}/config.json: is not valid JSON: Expecting value")
    (folder / "config.json").write_text("[]")
    assert trunk_error(folder, weights=False) == f"{folder}/config.json: must hold a JSON object"
