"""Exports for the demo trunk whose effect is known without training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from sgt_titan.config.schema import Config
from sgt_titan.demo import TRUNK
from sgt_titan.evaluation.world.samples import load_trunk
from sgt_titan.transform import ExportedTransform, SGTConfig, estimator_config, table_statistics, write_export
from sgt_titan.transform.trunk_files import TrunkFiles

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_export(tmp_path_factory):
    """Write an untrained export: zero heads, so mu is 0 and sigma is ``std`` times the table's std everywhere."""

    def make(std: float, *, embeddings: bool = True, table_change: float = 0.0, mean_bias: float = 0.0) -> Path:
        files = TrunkFiles(TRUNK)
        table_VD = files.embedding_table()
        known = table_statistics(table_VD)
        config = SGTConfig(
            trunk_config=estimator_config(AutoConfig.from_pretrained(TRUNK), 1),
            std_min=std / 10,
            std_max=std * 10,
            std_init=std,
            scale=known.scale,
            median_norm=known.median_norm,
            vocab_size=table_VD.shape[0],
            hidden_size=table_VD.shape[1],
            embeddings=embeddings,
            fingerprints={"trunk": files.fingerprint()},
        )
        torch.manual_seed(0)
        state = ExportedTransform(config).state_dict()
        if embeddings:
            state["embed_tokens.weight"] = table_VD + table_change
        if mean_bias:
            state["mean_head.bias"] = torch.full_like(state["mean_head.bias"], mean_bias)
        out = tmp_path_factory.mktemp("run") / "export"
        return write_export(out, config, state, tokenizer_dir=TRUNK, summary={})

    return make


@pytest.fixture(scope="session")
def trunk():
    """The demo trunk, loaded once."""
    return load_trunk(TRUNK, torch.device("cpu"))


@pytest.fixture(scope="session")
def demo_config(tmp_path_factory):
    """The demo corpus, few rows, cached once."""
    config = Config()
    config.trunk.path = str(TRUNK)
    config.data.source, config.data.max_samples, config.data.validation_samples = "demo", 240, 24
    config.data.cache_dir = str(tmp_path_factory.mktemp("cache"))
    config.data.template = "chat"
    config.training.seq_len = 192
    return config
