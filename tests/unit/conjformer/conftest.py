"""Rotated trunks of every family, made once a session through the command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rotated_trunks import Rotated, write_gpt2

from sgt_titan.conjformer.command import convert

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trunk_of(trunk_dir, tmp_path_factory):
    """``trunk_of(name)``: a row of the shared table of trunks, or ``gpt2``, ``gpt2-untied``."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if not name.startswith("gpt2"):
            return trunk_dir(name)
        if name not in made:
            made[name] = write_gpt2(tmp_path_factory.mktemp(name), tied=name == "gpt2")
            for file in trunk_dir("llama").glob("tokenizer*"):
                shutil.copyfile(file, made[name] / file.name)
        return made[name]

    return find


@pytest.fixture(scope="session")
def rotated(trunk_of, tmp_path_factory):
    """``rotated(name, *options)``: the trunk converted."""
    made: dict[tuple[str, ...], Rotated] = {}

    def make(name: str, *options: str) -> Rotated:
        key = (name, *options)
        if key not in made:
            folder = tmp_path_factory.mktemp("rotated")
            found = Rotated(trunk_of(name), folder / "server", folder / "server-client", folder / "keys" / "a.secret")
            assert convert([str(found.trunk), str(found.server), "--secret", str(found.secret), *options]) == 0
            made[key] = found
        return made[key]

    return make
