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
    """Names in config.json of how many experts there are (the first that is there) and how wide one is; what a mixture
    has beside them.

    shared: the count of shared experts, merged into one MLP. bias: of the router, chooses and does not weigh.
    first_dense, dense_layers, every: which layers are dense: the first so many, those listed, all but every n-th.
    """

    count: tuple[str, ...]
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

    latent: DeepSeek's attention (MLA) instead of grouped queries. skips_rope: ``no_rope_layers`` says which layers go
    without RoPE; nobody else reads that key. tied: transformers' default of tie_word_embeddings.
    defaults: transformers' for numbers that shapes depend on and config.json may leave out.
    refused: values of config.json that the row has no module for.
    trained: ``titan/trunks.py`` builds it; else it is known to a part of the project only (a rotated basis).
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    latent: bool = False
    skips_rope: bool = False
    experts: Experts | None = None
    tied: bool = False
    defaults: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=lambda: _BIASED)
    trained: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "mistral": Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "smollm3": Family(skips_rope=True, tied=True, defaults={"num_key_value_heads": 4}),
    "qwen3": Family(qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "qwen3_moe": Family(
        qk_norm=True,
        defaults={"num_key_value_heads": 4},
        experts=Experts(
            ("num_experts", "num_local_experts"),
            "moe_intermediate_size",
            dense_layers="mlp_only_layers",
            every="decoder_sparse_step",
        ),
    ),
    "deepseek_v3": Family(
        latent=True,
        refused={"attention_bias": True, "rope_interleave": False},
        experts=Experts(
            ("n_routed_experts",),
            "moe_intermediate_size",
            shared="n_shared_experts",
            bias=True,
            first_dense="first_k_dense_replace",
        ),
    ),
    "gpt2": Family(tied=True, trained=False),
}
TRAINED = tuple(name for name, row in FAMILIES.items() if row.trained)

# What people ask for and has no row, with what it would need.
_GEMMA = "which has gains of 1 + w, a gelu MLP and scaled embeddings; torchtitan 0.3.0 has no such block"
_TOWER = "a text model and a vision tower under one name, of which the text model would need what {} does"
WITHOUT_ROW = {
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}, nor four norms a layer, capped logits and windows",
    "gemma3_text": f"{_GEMMA}, nor four norms a layer, two rotary bases and windows",
    "gemma3": _TOWER.format("gemma3_text"),
    "llama4_text": "whose attention is chunked and scaled by position; torchtitan 0.3.0 has no llama4 block",
    "llama4": _TOWER.format("llama4_text"),
    "gpt_oss": "which is shipped in mxfp4, stacked and with biases, which is not read here; torchtitan has its block",
    "mixtral": "whose experts have names of their own (block_sparse_moe, w1 to w3): a table of names is missing",
    "phi3": "which stores queries, keys and values in one tensor; loading would not be a rename",
}

# What a checkpoint may hold beside its model: buffers of old ones. Layers that predict further tokens: ``unexpected``.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


# What scales rotary frequencies, and the numbers that it needs.
ROPES: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of a config.json.

    Raises:
        UserError: there is none, with what is supported.
    """
    kind = config.get("model_type")
    if kind in WITHOUT_ROW:
        raise UserError(f"trunk: config.json has model_type {kind!r}, {WITHOUT_ROW[kind]}")
    if kind not in TRAINED:
        raise UserError(f"trunk: config.json has model_type {kind!r}; supported are {', '.join(TRAINED)}")
    return FAMILIES[kind]


# What values must be, as transformers checks them: counts, those of them that may be null, numbers, switches.
_COUNTS = (*NEEDED, "max_position_embeddings")
_COUNTS_OR_NULL = ("num_key_value_heads", "head_dim")
_NUMBERS = ("rms_norm_eps",)
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob")


def _check_values(config: Mapping[str, Any], row: Family) -> None:
    """Raises UserError for a value of another kind than its key's, or a list of another length than the layers'."""
    for key in (*_COUNTS, *_COUNTS_OR_NULL, *_NUMBERS, *_SWITCHES):
        value = config.get(key)
        if key not in config or (value is None and key in _COUNTS_OR_NULL):
            continue
        if key in _SWITCHES:
            fine, what = isinstance(value, bool), "true or false"
        elif key in _NUMBERS:
            fine, what = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        else:
            fine, what = type(value) is int and value > 0, "a number above 0"
        if not fine:
            raise UserError(f"trunk: config.json has {key} {value!r}, which must be {what}")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), Mapping | None):
            raise UserError(f"trunk: config.json has {key} {config[key]!r}, which must be an object")
        if any(isinstance(value, Mapping) for value in (config.get(key) or {}).values()):
            raise UserError(f"trunk: config.json has {key} for several kinds of layers; all layers here have one")
    for key in ("layer_types", *(("no_rope_layers",) if row.skips_rope else ())):
        value, layers = config.get(key), config.get("num_hidden_layers")
        if key == "no_rope_layers" and isinstance(value, list):  # looked up by index: a body has its trunk's whole list
            value = value[:layers]
        if value is not None and (not isinstance(value, list) or len(value) != layers):
            raise UserError(f"trunk: config.json has {key} that is no list of its {layers} layers")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UserError for a config.json whose row cannot express what it asks for."""
    row = family_of(config)
    _check_values(config, row)
    for key, value in row.refused.items():
        if config.get(key) == value:
            kind = config["model_type"]
            raise UserError(f"trunk: config.json has {key} = {value!r}, which the {kind} row cannot express")
    if other := next((kind for kind in config.get("layer_types") or () if kind != "full_attention"), None):
        raise UserError(f"trunk: config.json has layer_types with {other!r}; all modules here see the whole context")
    if config.get("is_causal") is False:
        raise UserError("trunk: config.json has is_causal = False: an encoder, which predicts no next token")
    window = config.get("sliding_window", row.defaults.get("sliding_window"))
    if window and config.get("use_sliding_window", True) and window < (config.get("max_position_embeddings") or 0):
        raise UserError(
            f"trunk: config.json has sliding_window {window}, less than its context, and no module here has one; "
            "Mistral 7B from v0.2 on has none"
        )
    if config["model_type"] == "mistral" and config.get("layer_types"):
        raise UserError("trunk: config.json has layer_types, by which transformers takes it for a 'ministral': no row")
    if (found := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"trunk: config.json has hidden_act {found!r}; only 'silu' is supported")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # in transformers' order
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPES:
        why = "depends on the sequence length and " if kind in ("dynamic", "longrope", "su") else ""
        raise UserError(
            f"trunk: rope_type {kind!r} {why}is not supported; use a checkpoint with rope_type {', '.join(ROPES)}"
        )
    if lacking := [key for key in ROPES[kind] if rope.get(key) is None]:
        raise UserError(f"trunk: config.json has rope_type {kind!r} without its {lacking[0]}")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether lm_head is the embedding table."""
    found = config.get("tie_word_embeddings")
    return FAMILIES[config["model_type"]].tied if found is None else bool(found)


def expert_count(config: Mapping[str, Any]) -> int:
    """Routed experts of a mixture; 0: there are none."""
    experts = FAMILIES[config["model_type"]].experts
    return next((config[key] for key in experts.count if config.get(key)), 0) if experts else 0


def shared_width(config: Mapping[str, Any]) -> int:
    """Hidden width of the MLP that every token of a mixture passes; 0: there is none."""
    experts = FAMILIES[config["model_type"]].experts
    return config[experts.width] * (config.get(experts.shared) or 0) if experts and experts.shared else 0


def mixtures(config: Mapping[str, Any]) -> list[bool]:
    """For each layer, whether it has experts."""
    return [has_experts(config, layer) for layer in range(config["num_hidden_layers"])]


def body_fields(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Changes that make a config.json that of its first ``layers`` layers, without experts: a short body has no use for
    them. Which layers go without RoPE stays as it is, by index."""
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    if kinds := config.get("layer_types"):
        changes["layer_types"] = [kinds[index % len(kinds)] for index in range(layers)]
    experts = FAMILIES[config["model_type"]].experts
    if experts and experts.first_dense:
        changes[experts.first_dense] = layers
    if experts and experts.dense_layers:
        changes[experts.dense_layers] = list(range(layers))
    return changes


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has a mixture of experts instead of one MLP."""
    experts = FAMILIES[config["model_type"]].experts
    if experts is None or not expert_count(config):
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
    experts = family_of(config).experts
    missing = [key for key in NEEDED if not isinstance(config.get(key), int)]
    if experts and not any(key in config for key in experts.count):
        missing.append(experts.count[0])
    if missing:
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
    width, count, hidden = config["hidden_size"], expert_count(config), config[experts.width]
    yield "mlp.gate.weight", (count, width)
    if experts.bias:
        yield "mlp.gate.e_score_correction_bias", (count,)
    if shared := shared_width(config):
        yield from _mlp("mlp.shared_experts", shared, width)
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
