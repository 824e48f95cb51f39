"""Trunk families, a row each: how a Hugging Face checkpoint becomes a torchtitan decoder.

A row holds a function from the Hugging Face config to a torchtitan ``Decoder.Config`` and the names of its
tensors. Weights keep their Hugging Face layout byte for byte: attention uses the rotate-half RoPE (MLA the
interleaved one) that Hugging Face checkpoints are stored for, so that loading, exporting and fingerprinting a
trunk are renames and nothing else. The rotary frequencies come from transformers, which makes every
``rope_scaling`` it knows work here and equal to it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE
from torchtitan.models.deepseek_v3 import build_mla_moe_layers
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.protocols.module import Module
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sgt_titan.trunk import families

Attention = Literal["sdpa", "flex"]

# Initial weights only ever matter for an estimator's layers: trunk weights are read from the checkpoint.
LINEAR_INIT = {"weight": partial(nn.init.normal_, std=0.02), "bias": nn.init.zeros_}
NORM_INIT = {"weight": nn.init.ones_}
EXPERTS_INIT = {name: LINEAR_INIT["weight"] for name in ("w1_EFD", "w2_EDF", "w3_EFD")}


# -- rotary embeddings -------------------------------------------------------------------------------------------------


def rotary_frequencies(hf: PretrainedConfig, dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies (dim / 2 of them) and the factor on cos and sin, as transformers computes them."""
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        inv_freq, factor = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim), 1.0
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return tuple(inv_freq.tolist()), float(factor)


def _angles(inv_freq: tuple[float, ...], length: int) -> torch.Tensor:
    """(length, frequencies) in radians; empty on the meta device, where torch reckons by way of its compiler."""
    if torch.get_default_device().type == "meta":
        return torch.empty(length, len(inv_freq), dtype=torch.float32)
    return torch.outer(torch.arange(length).float(), torch.tensor(inv_freq))


class HalfRoPE(CosSinRoPE):
    """Rotate-half RoPE with given frequencies: the layout of Hugging Face Llama and Qwen checkpoints."""

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        inv_freq: tuple[float, ...]
        factor: float = 1.0

    def _precompute_cache(self) -> torch.Tensor:
        angles = _angles(self.config.inv_freq, self.config.max_seq_len)
        if angles.is_meta:
            return angles.new_empty(len(angles), 4 * angles.shape[1])
        angles = angles.repeat(1, 2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * self.config.factor


class InterleavedRoPE(ComplexRoPE):
    """Interleaved RoPE with given frequencies: the layout of Hugging Face DeepSeek-V3 checkpoints."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        inv_freq: tuple[float, ...]
        factor: float = 1.0

    def _precompute_cache(self) -> torch.Tensor:
        angles = _angles(self.config.inv_freq, self.config.max_seq_len)
        if angles.is_meta:
            return torch.empty_like(angles, dtype=torch.complex64)
        return torch.polar(torch.full_like(angles, self.config.factor), angles)


# -- decoders ----------------------------------------------------------------------------------------------------------


def _inner_attention(kind: Attention) -> Module.Config:
    return ScaledDotProductAttention.Config() if kind == "sdpa" else FlexAttention.Config()


def _norm(hf: PretrainedConfig, width: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=width, eps=hf.rms_norm_eps, param_init=NORM_INIT)


def _decoder(hf: PretrainedConfig, model: type[Decoder], layers: list[TransformerBlock.Config]) -> Decoder.Config:
    width, vocab = hf.hidden_size, hf.vocab_size
    return model.Config(
        dim=width,
        vocab_size=vocab,
        enable_weight_tying=bool(hf.tie_word_embeddings),
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=width, param_init=LINEAR_INIT),
        norm=_norm(hf, width),
        lm_head=Linear.Config(in_features=width, out_features=vocab, param_init=LINEAR_INIT),
        layers=layers,
    )


def gqa_decoder(
    hf: PretrainedConfig,
    attention: Attention,
    *,
    model: type[Decoder],
    block: type[TransformerBlock],
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> Decoder.Config:
    """Llama, Mistral, SmolLM3, Qwen2 and Qwen3: grouped-query attention and a gated MLP, or (Qwen3) experts."""
    fields = hf.to_dict()
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    inv_freq, factor = rotary_frequencies(hf, head_dim)

    row = families.FAMILIES.get(hf.model_type, families.Family())
    with_rope = hf.no_rope_layers if row.skips_rope else [True] * hf.num_hidden_layers  # 1: it has

    def layer(index: int) -> TransformerBlock.Config:
        # A layer without RoPE is one whose angles are all 0.
        turns = inv_freq if with_rope[index] else (0.0,) * len(inv_freq)
        mixture = families.has_experts(fields, index)
        gqa = make_gqa_config(
            dim=hf.hidden_size,
            n_heads=hf.num_attention_heads,
            n_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            wqkv_param_init=LINEAR_INIT,
            wo_param_init=LINEAR_INIT,
            inner_attention=_inner_attention(attention),
            rope=HalfRoPE.Config(
                dim=head_dim,
                max_seq_len=hf.max_position_embeddings,
                inv_freq=turns,
                factor=factor if with_rope[index] else 1.0,
            ),
            qk_norm=_norm(hf, head_dim) if qk_norm else None,
        )
        gqa.qkv_linear.wq.bias = gqa.qkv_linear.wkv.bias = qkv_bias
        return block.Config(
            attention=gqa,
            attention_norm=_norm(hf, hf.hidden_size),
            ffn_norm=_norm(hf, hf.hidden_size),
            feed_forward=None if mixture else _mlp(hf),
            moe=_mixture(hf, families.expert_count(fields)) if mixture else None,
        )

    return _decoder(hf, model, [layer(index) for index in range(hf.num_hidden_layers)])


def _mlp(hf: PretrainedConfig) -> FeedForward.Config:
    return make_ffn_config(
        dim=hf.hidden_size,
        hidden_dim=hf.intermediate_size,
        w1_param_init=LINEAR_INIT,
        w2w3_param_init=LINEAR_INIT,
    )


def _mixture(hf: PretrainedConfig, count: int) -> MoE.Config:
    """Qwen3's: a softmax over all experts chooses and weighs; no shared expert, no bias."""
    return make_moe_config(
        num_experts=count,
        router=make_router_config(
            dim=hf.hidden_size,
            num_experts=count,
            gate_param_init=LINEAR_INIT,
            top_k=hf.num_experts_per_tok,
            score_func="softmax",
            route_norm=hf.norm_topk_prob,
        ),
        routed_experts=make_routed_experts_config(
            dim=hf.hidden_size,
            hidden_dim=hf.moe_intermediate_size,
            num_experts=count,
            top_k=hf.num_experts_per_tok,
            param_init=EXPERTS_INIT,
            comm_backend="standard",
        ),
        load_balance_coeff=None,
    )


def mla_moe_decoder(hf: PretrainedConfig, attention: Attention) -> Decoder.Config:
    """DeepSeek-V3: multi-head latent attention; dense layers, then mixtures of experts."""
    inv_freq, factor = rotary_frequencies(hf, hf.qk_rope_head_dim)
    # transformers multiplies the softmax scale by (0.1 * mscale_all_dim * ln(factor) + 1)^2 where rope is scaled;
    # torchtitan does so with `mscale` where `scaling` is "yarn" and `rope_factor` > 1.
    rope = hf.rope_parameters
    mscale = rope.get("mscale_all_dim", 0.0) if rope.get("rope_type", "default") != "default" else 0.0
    layers = build_mla_moe_layers(
        n_layers=hf.num_hidden_layers,
        n_dense_layers=hf.first_k_dense_replace,
        dim=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        q_lora_rank=hf.q_lora_rank or 0,
        kv_lora_rank=hf.kv_lora_rank,
        qk_nope_head_dim=hf.qk_nope_head_dim,
        qk_rope_head_dim=hf.qk_rope_head_dim,
        v_head_dim=hf.v_head_dim,
        mscale=mscale or 1.0,
        dense_hidden_dim=hf.intermediate_size,
        moe_hidden_dim=hf.moe_intermediate_size,
        num_experts=hf.n_routed_experts,
        num_shared_experts=hf.n_shared_experts,
        router_top_k=hf.num_experts_per_tok,
        router_score_func="sigmoid",
        router_num_expert_groups=hf.n_group if hf.n_group > 1 else None,
        router_num_limited_groups=hf.topk_group if hf.n_group > 1 else None,
        router_route_scale=hf.routed_scaling_factor,
        router_route_norm=hf.norm_topk_prob,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=LINEAR_INIT,
        norm_init=NORM_INIT,
        depth_init=lambda layer: LINEAR_INIT,
        depth_experts_init=lambda layer: EXPERTS_INIT,
        rope=InterleavedRoPE.Config(
            dim=hf.qk_rope_head_dim,
            max_seq_len=hf.max_position_embeddings,
            scaling="yarn" if mscale else "none",
            rope_factor=rope.get("factor", 1.0) if mscale else 1.0,
            inv_freq=inv_freq,
            factor=factor,
        ),
    )
    for layer in layers:
        layer.attention.inner_attention = _inner_attention(attention)
        layer.attention_norm = _norm(hf, hf.hidden_size)
        layer.ffn_norm = _norm(hf, hf.hidden_size)
        # transformers builds MLA's inner norms with its default eps, not with the config's.
        layer.attention.q_norm.eps = layer.attention.kv_norm.eps = 1e-6
    return _decoder(hf, DeepSeekV3Model, layers)


# -- tensor names: torchtitan -> Hugging Face; {} stands for the layer, a second {} for the expert ---------------------

OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
}
GQA = {
    **{
        f"layers.{{}}.attention.qkv_linear.w{p}.{kind}": f"model.layers.{{}}.self_attn.{p}_proj.{kind}"
        for p in "qkv"
        for kind in ("weight", "bias")
    },
    "layers.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.attention.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
}
MIXTURE = {
    "layers.{}.moe.router.gate.weight": "model.layers.{}.mlp.gate.weight",
    "layers.{}.moe.routed_experts.inner_experts.w1_EFD": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers.{}.moe.routed_experts.inner_experts.w2_EDF": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "layers.{}.moe.routed_experts.inner_experts.w3_EFD": "model.layers.{}.mlp.experts.{}.up_proj.weight",
}
MLA_MOE = {
    **MIXTURE,
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wq_a.weight": "model.layers.{}.self_attn.q_a_proj.weight",
    "layers.{}.attention.wq_b.weight": "model.layers.{}.self_attn.q_b_proj.weight",
    "layers.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_a_layernorm.weight",
    "layers.{}.attention.wkv_a.weight": "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight",
    "layers.{}.attention.wkv_b.weight": "model.layers.{}.self_attn.kv_b_proj.weight",
    "layers.{}.attention.kv_norm.weight": "model.layers.{}.self_attn.kv_a_layernorm.weight",
    "layers.{}.moe.expert_bias_E": "model.layers.{}.mlp.gate.e_score_correction_bias",
    "layers.{}.moe.shared_experts.w1.weight": "model.layers.{}.mlp.shared_experts.gate_proj.weight",
    "layers.{}.moe.shared_experts.w2.weight": "model.layers.{}.mlp.shared_experts.down_proj.weight",
    "layers.{}.moe.shared_experts.w3.weight": "model.layers.{}.mlp.shared_experts.up_proj.weight",
}


@dataclass(frozen=True)
class Family:
    """One row: ``decoder(hf_config, attention) -> Decoder.Config`` and tensor names (torchtitan -> Hugging Face)."""

    decoder: Callable[[PretrainedConfig, Attention], Decoder.Config]
    names: Mapping[str, str]


def _gqa(row: families.Family) -> Family:
    llama = not (row.qkv_bias or row.qk_norm or row.experts)
    model, block = (Llama3Model, Llama3TransformerBlock) if llama else (Qwen3Model, Qwen3TransformerBlock)
    build = partial(gqa_decoder, model=model, block=block, qkv_bias=row.qkv_bias, qk_norm=row.qk_norm)
    return Family(build, OUTER | GQA | (MIXTURE if row.experts else {}))


# Of the registry's rows: grouped queries by their flags, DeepSeek's latent attention by itself.
FAMILIES: dict[str, Family] = {
    name: Family(mla_moe_decoder, OUTER | MLA_MOE) if families.FAMILIES[name].latent else _gqa(families.FAMILIES[name])
    for name in families.TRAINED
}


def family_of(hf: PretrainedConfig) -> Family:
    """The row for a checkpoint.

    Raises:
        UserError: no row has this ``model_type``.
    """
    families.family_of({"model_type": hf.model_type})
    return FAMILIES[hf.model_type]


def hf_name(family: Family, name: str) -> str:
    """Hugging Face name of torchtitan tensor ``name``; an expert index is left as ``{}``."""
    head, _, rest = name.partition(".")
    if head != "layers":
        return family.names[name]
    layer, _, tail = rest.partition(".")
    return family.names[f"layers.{{}}.{tail}"].replace("{}", layer, 1)


def export_name(family: Family, name: str) -> str:
    """Name in checkpoints and exports of the estimator's tensor ``name``: bodies carry Hugging Face's layer names."""
    body = re.match(r"bodies\.\d+\.|(denoiser|prior)\.body\.", name)
    if body is None:
        return name
    return body[0] + hf_name(family, name[body.end() :]).removeprefix("model.")


def build(hf: PretrainedConfig, attention: Attention) -> Decoder.Config:
    """torchtitan's config of a trunk.

    Raises:
        UserError: no row, or one that cannot express what the config asks for.
    """
    families.check_config(hf.to_dict())
    return family_of(hf).decoder(hf, attention)


def build_body(hf: PretrainedConfig, layers: int, attention: Attention) -> Decoder.Config:
    """torchtitan's config of an estimator's body: ``layers`` decoder layers of the family, without experts."""
    hf = copy.deepcopy(hf)
    for key, value in families.body_fields(hf.to_dict(), layers).items():
        setattr(hf, key, value)
    return build(hf, attention)
