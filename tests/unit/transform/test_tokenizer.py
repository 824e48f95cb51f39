"""Ids are those of tokenizer.json, whatever class or model_type is named beside it."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from sgt_titan.errors import UserError
from sgt_titan.transform.configuration import SGTConfig
from sgt_titan.transform.tokenizer import (
    PROBE,
    check_ids_fingerprint,
    fingerprint_ids,
    load_tokenizer,
    tokenizer_folder,
)
from sgt_titan.trunk.tokenizer_files import check_tokenizer


@pytest.fixture
def folder(trunk_dir, tmp_path):
    """A tokenizer of bytes, to be changed."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trunk_dir("llama") / name, folder / name)
    return folder


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_class_that_brings_a_pre_tokenizer_of_its_own(folder):
    """Of a qwen2 folder whose tokenizer.json splits as it likes, transformers' class makes other ids."""
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    core.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    expected = core.encode("a 4111", add_special_tokens=False).ids
    found = {}
    for kind in ("qwen2", "llama", "stained_glass_transform"):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        tokenizer = load_tokenizer(folder)
        assert ids(tokenizer, "a 4111") == expected
        found[kind] = fingerprint_ids(tokenizer)
    assert len(set(found.values())) == 1
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert ids(AutoTokenizer.from_pretrained(folder), "a 4111") != expected, "nothing is shown by a class that agrees"


def test_settings_that_change_ids_are_refused(folder):
    token = {"content": "Hello", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"258": token | {"special": False}})
    with pytest.raises(UserError, match=r"tokenizer_config\.json changes the ids that tokenizer\.json gives"):
        load_tokenizer(folder)


def test_special_tokens_that_would_be_text_are_refused(folder):
    """They stand in every chat template; read as text they are other ids than the model knows."""
    edit(folder / "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(UserError, match=r"tokenizer_config\.json changes the ids .* split_special_tokens"):
        load_tokenizer(folder)


def test_the_probe_is_made_of_what_tokenizers_differ_in():
    kinds = {"digits": "4111", "capitals": "HELLO", "spaces": "  ", "newlines": "\n\n", "CJK": "你好", "RTL": "שלום"}
    assert all(text in PROBE for text in kinds.values())


def test_no_fast_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no readable tokenizer") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="a fast tokenizer"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=r"^export: .* is not a directory"):
        load_tokenizer(folder / "none", "export")


def test_fingerprint_is_of_what_it_does(folder):
    before = fingerprint_ids(load_tokenizer(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit(folder / "tokenizer_config.json", model_max_length=7)
    assert fingerprint_ids(load_tokenizer(folder)) == before
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.add_special_tokens(["<|new|>"])
    core.save(str(folder / "tokenizer.json"))
    added = fingerprint_ids(load_tokenizer(folder))
    assert added != before
    edit(folder / "tokenizer_config.json", bos_token="</s>")
    assert fingerprint_ids(load_tokenizer(folder)) not in (before, added)


def test_other_ids_than_in_training_are_refused(folder):
    tokenizer = load_tokenizer(folder)
    check_ids_fingerprint(tokenizer, SGTConfig(), folder)  # an export from before there was one
    check_ids_fingerprint(tokenizer, SGTConfig(fingerprints={"ids": fingerprint_ids(tokenizer)}), folder)
    with pytest.raises(UserError, match="gives other ids than the one the transform was trained with"):
        check_ids_fingerprint(tokenizer, SGTConfig(fingerprints={"ids": "0" * 64}), folder)


def test_the_folder_of_a_hub_name(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.update(how, name=name) or "/x")
    assert tokenizer_folder(folder) == folder and not asked
    assert str(tokenizer_folder("owner/name", revision="v1")) == "/x"
    assert asked["name"] == "owner/name" and asked["revision"] == "v1"
    assert {"tokenizer.json", "tokenizer_config.json"} < set(asked["allow_patterns"])


def test_a_template_that_lies_where_processors_look(folder):
    """Else a chat model would be trained on plain text, and only the word "plain" in the log would say so."""
    assert load_tokenizer(folder).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert load_tokenizer(folder).chat_template == "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text("own")
    assert load_tokenizer(folder).chat_template == "own"
    (folder / "chat_template.jinja").unlink()
    for text, words in (("[]", "must hold a JSON object"), ('{"chat_template": 3}', "must hold a text under")):
        (folder / "chat_template.json").write_text(text)
        with pytest.raises(UserError, match=words):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"vocab": {"a": 0, "b": 9}}}, ""),
        ({"model": {"vocab": {"a": 0, "b": 10}}}, "token 'b' has id 10, but config.json's vocab_size is 10"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 12, "content": "<x>"}]}, "token '<x>' has id 12"),
        ({"model": {"vocab": [["a", 0.0]] * 10 + [["b", 0.0]]}}, "token 'b' has id 10"),
        ("version https://git-lfs.github.com/spec/v1", "is not valid JSON"),
    ],
)
def test_a_tokenizer_larger_than_the_table_is_known_before_a_start(tmp_path, content, words):
    (tmp_path / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    try:
        check_tokenizer(tmp_path, {"vocab_size": 10})
        assert not words
    except UserError as error:
        assert words and words in str(error)
