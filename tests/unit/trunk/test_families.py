"""The torch-free registry against what it describes: transformers' checkpoints, torchtitan's modules, one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sgt_titan.errors import UserError
from sgt_titan.trunk import families
from sgt_titan.trunk.check import check_checkpoint
from sgt_titan.trunk.families import FAMILIES, NEEDED, TRAINED, WITHOUT_ROW, check_config, shapes


def test_shapes_are_those_of_transformers_checkpoints(trunk_dir, trunk_kinds):
    for name, kind in trunk_kinds.items():
        path = trunk_dir(name)
        stored = {key: tuple(tensor.shape) for key, tensor in load_file(path / "model.safetensors").items()}
        assert shapes(json.loads((path / "config.json").read_text())) == stored, name
        assert check_checkpoint(path)["model_type"] == kind
    assert set(trunk_kinds.values()) == set(TRAINED), "a family without a checkpoint of its own in tests/conftest.py"


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if not FAMILIES[kind].latent])
def test_what_a_config_leaves_out_has_transformers_defaults(kind):
    full = AutoConfig.for_model(kind).to_dict()
    row = FAMILIES[kind].experts
    needed = [*NEEDED, "model_type", *((*row.count, row.width) if row else ())]
    bare = {key: full[key] for key in needed if key in full}
    assert shapes(bare) == shapes(full)


def test_the_other_tables_have_the_same_families():
    from sgt_titan.titan.trunks import FAMILIES as BUILT

    assert tuple(BUILT) == TRAINED


def test_config_that_lacks_numbers():
    with pytest.raises(UserError, match=r"config\.json has no hidden_size, intermediate_size"):
        shapes({"model_type": "llama"})
    with pytest.raises(UserError, match="model_type 'bloom'; supported are llama, "):
        check_config({"model_type": "bloom"})


def test_what_has_no_row_says_what_it_would_need():
    assert not set(WITHOUT_ROW) & set(FAMILIES)
    for kind, reason in WITHOUT_ROW.items():
        AutoConfig.for_model(kind)  # transformers knows it by this name
        with pytest.raises(UserError) as error:
            check_config({"model_type": kind})
        assert str(error.value) == f"trunk: config.json has model_type {kind!r}, {reason}"


def test_a_window_shorter_than_the_context():
    config = {"model_type": "mistral", "max_position_embeddings": 32768}
    for window in ({"sliding_window": 4096}, {}):
        with pytest.raises(UserError, match="sliding_window 4096, less than its context"):
            check_config(config | window)
    check_config(config | {"sliding_window": None})
    check_config(config | {"sliding_window": 4096, "max_position_embeddings": 4096})
    check_config(config | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        (
            {"rope_scaling": {"type": "mrope"}},
            "rope_type 'mrope' is not supported; use a checkpoint with rope_type def",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' without its factor"),
        # Of both, transformers takes the older one.
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic"}}, "rope_type 'dynamic'"),
    ],
)
def test_what_a_row_cannot_express(change, message):
    with pytest.raises(UserError, match=message):
        check_config({"model_type": "llama", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "16"}, "hidden_size '16', which must be a number above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, which must be a number above 0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads '2', which must be"),
        ({"head_dim": 0}, "head_dim 0, which must be"),
        ({"max_position_embeddings": None}, "max_position_embeddings None, which must be"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5', which must be a number"),
        ({"rms_norm_eps": None}, "rms_norm_eps None, which must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false', which must be true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings None, which must be true or false"),
        ({"attention_bias": None}, "attention_bias None, which must be true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear', which must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters for several kinds of"),
        ({"hidden_act": None}, "hidden_act None; only 'silu'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"], "num_hidden_layers": 1}, "for a 'ministral'"),
        ({"layer_types": ["full_attention"], "num_hidden_layers": 2}, "layer_types that is no list of its 2 layers"),
        ({"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2},
         "layer_types with 'sliding_attention'"),
        ({"model_type": "smollm3", "no_rope_layers": [1], "num_hidden_layers": 2}, "no_rope_layers that is no list of"),
        ({"is_causal": False}, "is_causal = False: an encoder"),
    ],
)  # fmt: skip
def test_values_that_transformers_would_not_take(change, message):
    """Known before anything starts: transformers says so when the trunk is built, or computes another model."""
    with pytest.raises(UserError, match=message):
        check_config({"model_type": "llama", **change})


def test_values_that_may_be_null():
    check_config({"model_type": "llama", "num_key_value_heads": None, "head_dim": None, "rope_scaling": None})
    check_config({"model_type": "llama", "no_rope_layers": [0], "num_hidden_layers": 2})  # a key of SmolLM3's alone
    check_config({"model_type": "smollm3", "no_rope_layers": [1, 1, 0], "num_hidden_layers": 2})  # a body's, by index


def test_tensors_that_the_config_does_not_describe(trunk_dir, tmp_path):
    """A bias, or a layer more than config.json says: the model is another, whoever ignores it."""
    source = trunk_dir("llama")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((source / name).read_text())
    tensors = load_file(source / "model.safetensors")
    table = tensors["model.norm.weight"]
    for extra in ("model.layers.0.self_attn.q_proj.bias", "model.layers.3.input_layernorm.weight"):
        save_file({**tensors, extra: table.clone()}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"holds {extra}, which config.json does not describe"):
            check_checkpoint(tmp_path)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, buffer: table.clone()}, tmp_path / "model.safetensors")
    check_checkpoint(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out():
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    config = json.loads(AutoConfig.for_model(**config).to_json_string(use_diff=False))
    names = dict.fromkeys(["model.layers.3.eh_proj.weight", "model.layers.4.eh_proj.weight"])
    assert families.unexpected(names, config | {"n_routed_experts": 2}) == ["model.layers.4.eh_proj.weight"]


def test_the_table_in_the_docs_is_what_happens():
    """docs/TRAINING.md: ``python -m tests.bare_trunks``."""
    from tests.bare_trunks import table

    text = (Path(__file__).parents[3] / "docs" / "TRAINING.md").read_text()
    written = text.split("<!-- trunks -->\n")[1].split("\n<!-- /trunks -->")[0]
    assert written == table()
    assert all(f"| {kind} | read |" in written for kind in TRAINED)
