"""Configs to be right or wrong, and a trunk for them."""

import json

import pytest

from sgt_titan.config.check import validate
from sgt_titan.config.resolve import resolve
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError

TRUNK = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 100,
}


def config_of(*overrides: str, tmp="/nonexistent-is-fine") -> Config:
    """Defaults with a source and a trunk path, and overrides; unresolved."""
    base = Config()
    base.objective.preset = "mi_abs_cos_norm"  # most to be wrong with
    base.data.source, base.trunk.path = "demo", tmp
    for word in overrides:
        key, _, text = word.partition("=")
        section, _, name = key.rpartition(".")
        owner = base
        for part in section.split("."):
            owner = getattr(owner, part)
        old = getattr(owner, name)
        assert hasattr(owner, name)
        kinds = {bool: lambda t: t == "true", int: int, float: float, str: str, type(None): float, dict: json.loads}
        setattr(owner, name, kinds[type(old)](text))
    return base


def message(*overrides: str, world_size=1, trunk=TRUNK, device=None) -> str:
    config = resolve(config_of(*overrides), world_size=world_size)
    with pytest.raises(UserError) as caught:
        validate(config, world_size, trunk, device=device)
    return str(caught.value)


def accepts(*overrides: str, world_size=1, trunk=TRUNK, device=None) -> Config:
    config = resolve(config_of(*overrides), world_size=world_size)
    validate(config, world_size, trunk, device=device)
    return config
