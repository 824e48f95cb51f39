"""What each tensor of a checkpoint reads and writes, a row a tensor: all that conversion needs to know of a family.

A *space* is a vector space inside the model whose basis the server must not know:

    residual   width D, between the blocks                      the secret U
    query, key head dimensions before the scores                O per KV head: rotations of RoPE planes, or any
    value      head dimensions of a value head                  R per KV head, any orthogonal
    heads      the same, per query head (o_proj reads it)       the R of its KV head
    unit       units of the MLP                                 P, a permutation

A weight from space a to space b becomes ``L_b W L_a^T``, a bias in b ``L_b bias``. Weights that read a norm's output
absorb its gain (``W diag(g)``) and its bias (``W b``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sgt_titan.errors import UserError

Space = Literal["residual", "query", "key", "value", "heads", "unit"]


@dataclass(frozen=True)
class Linear:
    """``out``: several where the checkpoint stores several projections in one tensor. norm: whose output it reads."""

    reads: Space
    out: tuple[Space, ...]
    norm: str = ""


@dataclass(frozen=True)
class Family:
    """Names without ``prefix`` and, inside ``layer`` (with ``{}`` for the index), without the layer's.

    transposed: weights are stored (in, out). centred: LayerNorm, which subtracts the mean first.
    qk_norm: queries and keys have gains of their own between projection and RoPE. rope: queries and keys are rotated.
    """

    prefix: str
    layer: str
    linears: Mapping[str, Linear]
    norms: tuple[str, ...]
    final_norm: str
    embed: str
    positions: str = ""
    transposed: bool = False
    centred: bool = False
    rope: bool = True
    qk_norm: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()  # buffers of old checkpoints
    sizes: Mapping[str, str] = field(default_factory=dict)  # our name -> config.json's

    def split(self, name: str) -> tuple[int | None, str]:
        """Layer (None outside layers) and local name of a tensor, without the prefix."""
        local = name.removeprefix(self.prefix)
        match = re.fullmatch(re.escape(self.layer).replace(r"\{\}", r"(\d+)") + r"(.+)", local)
        return (int(match[1]), match[2]) if match else (None, local)


_LLAMA = Family(
    prefix="model.",
    layer="layers.{}.",
    linears={
        "self_attn.q_proj": Linear("residual", ("query",), "input_layernorm"),
        "self_attn.k_proj": Linear("residual", ("key",), "input_layernorm"),
        "self_attn.v_proj": Linear("residual", ("value",), "input_layernorm"),
        "self_attn.o_proj": Linear("heads", ("residual",)),
        "mlp.gate_proj": Linear("residual", ("unit",), "post_attention_layernorm"),
        "mlp.up_proj": Linear("residual", ("unit",), "post_attention_layernorm"),
        "mlp.down_proj": Linear("unit", ("residual",)),
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="norm",
    embed="embed_tokens",
    ignored=("self_attn.rotary_emb.inv_freq",),
)
_QWEN3 = Family(**{**_LLAMA.__dict__, "qk_norm": ("self_attn.q_norm", "self_attn.k_norm")})
_GPT2 = Family(
    prefix="transformer.",
    layer="h.{}.",
    linears={
        "attn.c_attn": Linear("residual", ("query", "key", "value"), "ln_1"),
        "attn.c_proj": Linear("heads", ("residual",)),
        "mlp.c_fc": Linear("residual", ("unit",), "ln_2"),
        "mlp.c_proj": Linear("unit", ("residual",)),
    },
    norms=("ln_1", "ln_2"),
    final_norm="ln_f",
    embed="wte",
    positions="wpe",
    transposed=True,
    centred=True,
    rope=False,
    ignored=("attn.bias", "attn.masked_bias"),
)

FAMILIES: dict[str, Family] = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3, "gpt2": _GPT2}


@dataclass(frozen=True)
class Sizes:
    """Of one checkpoint: stream, layers, query heads, heads of keys and values, a head's dimension, MLP units."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    units: int
    vocab: int
    tied: bool


def family_of(config: Mapping[str, Any], path: Any) -> Family:
    """The row of a config.json.

    Raises:
        UserError: another family, or quantised weights, which have no basis to change.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r}; a rotated basis is known for {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise UserError(f"{path}: quantised weights cannot be rotated; give the checkpoint in bfloat16 or float32")
    if kind == "gpt2" and config.get("add_cross_attention"):
        raise UserError(f"{path}: cross-attention is not supported; give a decoder without it")
    return FAMILIES[kind]


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """From a config.json, with transformers' defaults for what it leaves out."""
    from transformers import AutoConfig

    options = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    hf = AutoConfig.for_model(config["model_type"], **options)
    heads = hf.num_attention_heads
    units = getattr(hf, "intermediate_size", None) or getattr(hf, "n_inner", None) or 4 * hf.hidden_size
    return Sizes(
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        units=units,
        vocab=hf.vocab_size,
        tied=bool(hf.tie_word_embeddings),
    )
