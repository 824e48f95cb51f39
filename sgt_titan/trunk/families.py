"""Trunk families, a row each, by the ``model_type`` of config.json: all that is known of one without torch.

What needs modules is keyed by the same names and built from the same flags: torchtitan's decoder in
``titan/trunks.py``, spaces of a rotated basis in ``conjformer/families.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sgt_titan.errors import UserError

Shapes = Iterator[tuple[str, tuple[int, ...]]]
NEEDED = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Experts:
    """Names in config.json of how many experts there are and how wide one is; what a mixture has beside them.

    shared: the count of shared experts, merged into one MLP. bias: of the router, chooses and does not weigh.
    first_dense, dense_layers, every: which layers are dense: the first so many, those listed, all but every n-th.
    """

    count: str
    width: str
    shared: str = ""
    bias: bool = False
    first_dense: str = ""
    dense_layers: str = ""
    every: str = ""


_BIASED = {"attention_bias": True, "mlp_bias": True, "use_sliding_window": True}


@dataclass(frozen=True)
class Family:
    """qkv_bias: queries, keys and values have one. qk_norm: queries and keys have gains of their own, per head.

    latent: DeepSeek's attention (MLA) instead of grouped queries. tied: transformers' default of tie_word_embeddings.
    defaults: transformers' for numbers that shapes depend on and config.json may leave out.
    refused: values of config.json that the row has no module for.
    trained: ``titan/trunks.py`` builds it; else it is known to a part of the project only (a rotated basis).
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    latent: bool = False
    experts: Experts | None = None
    tied: bool = False
    defaults: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=lambda: _BIASED)
    trained: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "deepseek_v3": Family(
        latent=True,
        refused={"attention_bias": True, "rope_interleave": False},
        experts=Experts(
            "n_routed_experts",
            "moe_intermediate_size",
            shared="n_shared_experts",
            bias=True,
            first_dense="first_k_dense_replace",
        ),
    ),
    "gpt2": Family(tied=True, trained=False),
}
TRAINED = tuple(name for name, row in FAMILIES.items() if row.trained)

# What a checkpoint may hold beside its model: buffers of old ones. Layers that predict further tokens: ``unexpected``.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of a config.json.

    Raises:
        UserError: there is none, with what is supported.
    """
    kind = config.get("model_type")
    if kind not in TRAINED:
        raise UserError(f"trunk: config.json has model_type {kind!r}; supported are {', '.join(TRAINED)}")
    return FAMILIES[kind]


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UserError for a config.json whose row cannot express what it asks for."""
    row = family_of(config)
    for key, value in row.refused.items():
        if config.get(key) == value:
            kind = config["model_type"]
            raise UserError(f"trunk: config.json has {key} = {value!r}, which the {kind} row cannot express")
    if (found := config.get("hidden_act") or "silu") != "silu":
        raise UserError(f"trunk: config.json has hidden_act {found!r}; only 'silu' is supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("dynamic", "longrope", "su"):
        raise UserError(
            f"trunk: rope_type {kind!r} depends on the sequence length and is not supported; use a checkpoint with "
            "rope_type default, linear, llama3 or yarn"
        )


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether lm_head is the embedding table."""
    found = config.get("tie_word_embeddings")
    return FAMILIES[config["model_type"]].tied if found is None else bool(found)


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has a mixture of experts instead of one MLP."""
    experts = FAMILIES[config["model_type"]].experts
    if experts is None or not config.get(experts.count):
        return False
    if layer < (config.get(experts.first_dense) or 0) or layer in (config.get(experts.dense_layers) or ()):
        return False
    return not experts.every or (layer + 1) % (config.get(experts.every) or 1) == 0


def head_dim(config: Mapping[str, Any]) -> int:
    found = config.get("head_dim", FAMILIES[config["model_type"]].defaults.get("head_dim"))
    return found or config["hidden_size"] // config["num_attention_heads"]


def kv_heads(config: Mapping[str, Any]) -> int:
    found = config.get("num_key_value_heads", FAMILIES[config["model_type"]].defaults.get("num_key_value_heads"))
    return found or config["num_attention_heads"]


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its Hugging Face name; held to the modules torchtitan builds by the tests.

    Raises:
        UserError: config.json lacks a number that shapes depend on.
    """
    family_of(config)
    if missing := [key for key in NEEDED if not isinstance(config.get(key), int)]:
        raise UserError(f"trunk: config.json has no {', '.join(missing)}")
    try:
        return dict(_tensors(config))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"trunk: config.json: cannot tell the shapes of its tensors ({error!r})") from None


def _tensors(config: Mapping[str, Any]) -> Shapes:
    width, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, width)
    yield "model.norm.weight", (width,)
    if not is_tied(config):
        yield "lm_head.weight", (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer(config, layer):
            yield f"model.layers.{layer}.{name}", shape


def _layer(config: Mapping[str, Any], layer: int) -> Shapes:
    row, width = FAMILIES[config["model_type"]], config["hidden_size"]
    yield "input_layernorm.weight", (width,)
    yield "post_attention_layernorm.weight", (width,)
    yield from _latent_attention(config) if row.latent else _attention(config, row)
    if row.experts is not None and has_experts(config, layer):
        yield from _mixture(config, row.experts)
    else:
        yield from _mlp("mlp", config["intermediate_size"], width)


def _attention(config: Mapping[str, Any], row: Family) -> Shapes:
    width, dim, heads = config["hidden_size"], head_dim(config), config["num_attention_heads"]
    kv = kv_heads(config)
    for name, count in (("q", heads), ("k", kv), ("v", kv)):
        yield f"self_attn.{name}_proj.weight", (count * dim, width)
        if row.qkv_bias:
            yield f"self_attn.{name}_proj.bias", (count * dim,)
    yield "self_attn.o_proj.weight", (width, heads * dim)
    if row.qk_norm:
        yield "self_attn.q_norm.weight", (dim,)
        yield "self_attn.k_norm.weight", (dim,)


def _latent_attention(config: Mapping[str, Any]) -> Shapes:
    width, heads, value = config["hidden_size"], config["num_attention_heads"], config["v_head_dim"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank = config["kv_lora_rank"]
    if query := config.get("q_lora_rank"):
        yield "self_attn.q_a_proj.weight", (query, width)
        yield "self_attn.q_a_layernorm.weight", (query,)
        yield "self_attn.q_b_proj.weight", (heads * (nope + rope), query)
    else:
        yield "self_attn.q_proj.weight", (heads * (nope + rope), width)
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, width)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
    yield "self_attn.o_proj.weight", (width, heads * value)


def _mlp(where: str, hidden: int, width: int) -> Shapes:
    yield f"{where}.gate_proj.weight", (hidden, width)
    yield f"{where}.up_proj.weight", (hidden, width)
    yield f"{where}.down_proj.weight", (width, hidden)


def _mixture(config: Mapping[str, Any], experts: Experts) -> Shapes:
    width, count, hidden = config["hidden_size"], config[experts.count], config[experts.width]
    yield "mlp.gate.weight", (count, width)
    if experts.bias:
        yield "mlp.gate.e_score_correction_bias", (count,)
    if experts.shared and config.get(experts.shared):
        yield from _mlp("mlp.shared_experts", hidden * config[experts.shared], width)
    for expert in range(count):
        yield from _mlp(f"mlp.experts.{expert}", hidden, width)


def unexpected(names: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Tensors of the files that config.json does not describe: whoever leaves them out has another model.

    Left out on purpose: rotary buffers, and the layers behind the last that predict further tokens.
    """
    expected, extra = shapes(config), config.get("num_nextn_predict_layers") or 0
    last = config["num_hidden_layers"]
    further = tuple(f"model.layers.{last + i}." for i in range(extra))
    return [
        name
        for name in names
        if name not in expected and not _IGNORED.fullmatch(name) and not (further and name.startswith(further))
    ]
