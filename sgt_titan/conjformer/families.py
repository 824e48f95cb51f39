"""What each tensor of a checkpoint reads and writes, a row a tensor: all that conversion needs to know of a family.

A *space* is a vector space inside the model whose basis the server must not know:

    residual   width D, between the blocks                      the secret U
    query, key head dimensions before the scores                O per KV head: rotated and scaled RoPE planes, or any
    value      head dimensions of a value head                  A per KV head, any invertible
    heads      the same, per query head (o_proj reads it)       the A of its KV head
    unit       units of the MLP before their nonlinearity       P, a permutation
    scaled     units multiplied by a gate (up, down)            D P, a scale and a sign each as well

A weight from space a to space b becomes ``L_b W L_a^-1``, a bias in b ``L_b bias``; keys get the inverse transpose of
their queries' matrix. Weights that read a norm's output
absorb its gain (``W diag(g)``) and its bias (``W b``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sgt_titan.errors import UserError

Space = Literal["residual", "query", "key", "value", "heads", "unit", "scaled"]


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
        "mlp.up_proj": Linear("residual", ("scaled",), "post_attention_layernorm"),
        "mlp.down_proj": Linear("scaled", ("residual",)),
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

# Maps that change no output beside rotations, by name: what each needs, and why a family may lack it.
SYMMETRIES = {
    "values": "any invertible map between a head's values and its output",
    "units": "a scale and a sign of each MLP unit between up and down",
    "queries": "a scale of each RoPE plane between queries and keys; without RoPE any invertible map",
    "heads": "the order of heads",
}
_LACKS = {
    "units": "has no gate, so that a scale would pass a nonlinearity",
    "queries": "normalises queries and keys by head (QK-norm), which a scale would not survive",
}


def symmetries_of(family: Family) -> tuple[str, ...]:
    """The names of ``SYMMETRIES`` that a family has."""
    gated = any(rule.reads == "scaled" for rule in family.linears.values())
    has = {"units": gated, "queries": not family.qk_norm}
    return tuple(name for name in SYMMETRIES if has.get(name, True))


def chosen_symmetries(words: str, family: Family, kind: str) -> tuple[str, ...]:
    """``--symmetries``: all that the family has, none, or a list of names.

    Raises:
        UserError: no such name, or one that the family cannot have.
    """
    if words in ("all", "none"):
        return symmetries_of(family) if words == "all" else ()
    names = tuple(word.strip() for word in words.split(","))
    for name in names:
        if name not in SYMMETRIES:
            raise UserError(f"--symmetries {name}: unknown; all, none, or some of {', '.join(SYMMETRIES)}")
        if name not in symmetries_of(family):
            raise UserError(f"--symmetries {name}: {kind} {_LACKS[name]}; it has {', '.join(symmetries_of(family))}")
    return names


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
