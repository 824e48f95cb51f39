"""A small real tokenizer on disk, and no traffic with the hub."""

from __future__ import annotations

import json
import os

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sgt_titan.config import schema
from sgt_titan.data.sources import load_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(directory, *, template: str | None = CHATML, vocab_size: int = 320) -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 3, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    core.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
             "additional_special_tokens": special[2:]}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(
        json.dumps(about | ({"chat_template": template} if template else {}))
    )
    return str(directory)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def plain_tokenizer_dir(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("plain"), template=None)


@pytest.fixture
def make_tokenizer(tmp_path):
    """Write a tokenizer with another template or vocabulary; returns its directory."""
    return lambda name, **options: write_tokenizer(tmp_path / name, **options)


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory):
    """The datasets library copies local files into its cache: not into the user's."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE, datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf")
    datasets.config.HF_HUB_OFFLINE = True
    yield
    datasets.config.HF_DATASETS_CACHE, datasets.config.HF_HUB_OFFLINE = before


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON lines; returns the path."""

    def write_rows(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


@pytest.fixture
def make_config(tmp_path):
    """A configuration on a source, with ``data.*`` set from keywords."""

    def make(source, seq_len=64, **data) -> schema.Config:
        config = schema.Config()
        config.training.seq_len = seq_len
        config.data = schema.Data(source=str(source), cache_dir=str(tmp_path / "cache"), **data)
        return config

    return make


@pytest.fixture
def assets() -> str:
    if "SGT_TITAN_ASSETS" not in os.environ:
        pytest.skip("SGT_TITAN_ASSETS is not set")
    return os.environ["SGT_TITAN_ASSETS"]


@pytest.fixture
def read(tmp_path):
    """The contents of a source, and its fingerprint."""

    def rows(source, **options):
        found = load_rows(schema.Data(source=str(source), cache_dir=str(tmp_path / "cache"), **options))
        return [[m["content"] for m in found.messages(i)] for i in range(len(found))], found.fingerprint

    return rows
