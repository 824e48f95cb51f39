"""The tensors of trunk and estimator, and how much of each a rank holds. Exact: held to the modules torchtitan builds.

Letters: B rows of a rank, T tokens of a row, D width, V vocabulary, E experts, tp / fsdp / ep degrees.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

from sgt_titan.config.schema import Config
from sgt_titan.trunk.families import FAMILIES, expert_count, head_dim, kv_heads, mixtures, shared_width


@dataclass(frozen=True)
class Weight:
    """One tensor: its shape, the dimension that tensor parallelism splits (None: replicated), and whose it is."""

    shape: tuple[int, ...]
    tp_dim: int | None = None
    expert: bool = False
    matmul: bool = True  # takes part in every token's work; False: a lookup table
    itemsize: int | None = None  # bytes of an element, where it is not of the trunk's type

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Degrees:
    """How ranks share the work; ``fsdp`` is the shards of one copy, ``replicas`` the copies."""

    world: int
    replicas: int
    fsdp: int
    tp: int
    ep: int
    sp: bool

    @property
    def dp(self) -> int:
        return self.replicas * self.fsdp

    @property
    def efsdp(self) -> int:
        return self.fsdp * self.tp // self.ep

    @property
    def gathers(self) -> bool:
        """Whether frozen weights are split by FSDP, and so copied when they are used."""
        return self.fsdp > 1 or self.ep > 1


def column(rows: int, width: int) -> Weight:
    """A linear layer split over its outputs."""
    return Weight((rows, width), tp_dim=0)


def row(rows: int, width: int) -> Weight:
    """A linear layer split over its inputs."""
    return Weight((rows, width), tp_dim=1)


def gated_mlp(hidden: int, width: int) -> list[Weight]:
    return [column(hidden, width), column(hidden, width), row(width, hidden)]


def attention_weights(trunk: dict[str, Any]) -> list[Weight]:
    """Grouped-query attention, or DeepSeek's latent attention where the config has ``kv_lora_rank``."""
    width, heads = trunk["hidden_size"], trunk["num_attention_heads"]
    if "kv_lora_rank" in trunk:
        nope, rope, value = trunk["qk_nope_head_dim"], trunk["qk_rope_head_dim"], trunk["v_head_dim"]
        q_rank, kv_rank = trunk["q_lora_rank"], trunk["kv_lora_rank"]
        outputs = heads * (nope + rope)
        query = [Weight((q_rank, width)), Weight((q_rank,)), column(outputs, q_rank)] if q_rank else []
        return [
            *(query or [column(outputs, width)]),
            Weight((kv_rank + rope, width)),
            Weight((kv_rank,)),
            column(heads * (nope + value), kv_rank),
            row(width, heads * value),
        ]
    dim, outputs = head_dim(trunk), (heads, kv_heads(trunk), kv_heads(trunk))
    weights = [*(column(n * dim, width) for n in outputs), row(width, heads * dim)]
    family = FAMILIES[trunk["model_type"]]
    if family.qkv_bias:
        weights += [Weight((n * dim,), tp_dim=0) for n in outputs]
    if family.qk_norm:
        weights += [Weight((dim,)), Weight((dim,))]
    return weights


def layer_weights(trunk: dict[str, Any], *, experts: bool) -> list[Weight]:
    """One decoder layer; ``experts``: with a mixture of experts instead of the dense MLP."""
    width = trunk["hidden_size"]
    shared = [*attention_weights(trunk), Weight((width,)), Weight((width,))]
    if not experts:
        return shared + gated_mlp(trunk["intermediate_size"], width)
    count, hidden = expert_count(trunk), trunk["moe_intermediate_size"]
    shared_mlp = gated_mlp(shared_width(trunk), width) if shared_width(trunk) else []
    routed = [
        Weight((count, hidden, width), tp_dim=1, expert=True),
        Weight((count, hidden, width), tp_dim=1, expert=True),
        Weight((count, width, hidden), tp_dim=2, expert=True),
    ]
    return [*shared, Weight((count, width)), *shared_mlp, *routed]


def trunk_layers(trunk: dict[str, Any]) -> list[list[Weight]]:
    return [layer_weights(trunk, experts=experts) for experts in mixtures(trunk)]


def stored_layers(config: Config, trunk: dict[str, Any]) -> list[list[Weight]]:
    """The layers as a rank keeps and gathers them: matrices a byte each under ``trunk.float8``, and a scale a row."""
    layers = trunk_layers(trunk)
    if config.trunk.float8 == "none":
        return layers
    return [[stored for weight in layer for stored in _in_float8(weight)] for layer in layers]


def _in_float8(weight: Weight) -> list[Weight]:
    if len(weight.shape) != 2:
        return [weight]
    scale = Weight((weight.shape[0], 1), tp_dim=0 if weight.tp_dim == 0 else None, matmul=False, itemsize=4)
    return [replace(weight, itemsize=1), scale]


def end_weights(trunk: dict[str, Any]) -> list[Weight]:
    """Final norm and lm_head."""
    return [Weight((trunk["hidden_size"],)), column(trunk["vocab_size"], trunk["hidden_size"])]


def embedding_weights(trunk: dict[str, Any]) -> list[Weight]:
    """The embedding table, unless it is lm_head's own."""
    if trunk.get("tie_word_embeddings"):
        return []
    return [Weight((trunk["vocab_size"], trunk["hidden_size"]), tp_dim=0, matmul=False)]


def head_weights(config: Config, trunk: dict[str, Any]) -> list[Weight]:
    """Those of mean, std and gate: whole on every tensor-parallel rank."""
    width = trunk["hidden_size"]
    gate = [Weight((1, width)), Weight((1,))] if config.estimator.gate else []
    return [*2 * [Weight((width, width)), Weight((width,))], *gate]


def trained_bodies(config: Config) -> list[int]:
    """Decoder layers of each body that is trained: the estimator's one or two, the denoiser's, the context prior's."""
    bodies = [config.estimator.layers] * (2 if config.estimator.body == "separate" else 1)
    if config.denoiser.layers:
        bodies.append(config.denoiser.layers)
    if config.objective.rate.prior == "context":
        bodies.append(config.objective.rate.context_layers)
    return bodies


def estimator_layers(config: Config, trunk: dict[str, Any]) -> list[list[Weight]]:
    """Of all bodies."""
    return sum(trained_bodies(config)) * [layer_weights(trunk, experts=False)]


def estimator_weights(config: Config, trunk: dict[str, Any]) -> list[Weight]:
    """Layers, a final norm for each body, the heads, what denoiser and prior have besides."""
    norms = len(trained_bodies(config)) * [Weight((trunk["hidden_size"],))]
    layers = [w for layer in estimator_layers(config, trunk) for w in layer]
    others = [*head_weights(config, trunk), *denoiser_weights(config, trunk), *prior_weights(config, trunk)]
    return [*layers, *norms, *others]


def denoiser_weights(config: Config, trunk: dict[str, Any]) -> list[Weight]:
    """Its mark and its head, beside its body."""
    width = trunk["hidden_size"]
    return [Weight((width, 1)), Weight((width, width)), Weight((width,))] if config.denoiser.layers else []


def prior_weights(config: Config, trunk: dict[str, Any]) -> list[Weight]:
    """The learned numbers of the rate's prior, and the context's bottleneck."""
    rate, width = config.objective.rate, trunk["hidden_size"]
    if rate.prior == "broad":
        return []
    vectors = [Weight((1,), matmul=False), *3 * [Weight((width,), matmul=False)]]
    if rate.prior == "tokens":
        return vectors
    return [*vectors, Weight((rate.context_rank, width)), Weight((trunk["vocab_size"], rate.context_rank))]


def checkpoint_bytes(config: Config, trunk: dict[str, Any]) -> int:
    """Weights and both moments in float32; the rest of a checkpoint is kilobytes."""
    return 3 * 4 * sum(w.numel for w in estimator_weights(config, trunk))


# -- shards ------------------------------------------------------------------------------------------------------------


def gathered_elements(weight: Weight, degrees: Degrees) -> int:
    """Elements a rank computes with: split by tensor or expert parallelism, whole as to FSDP."""
    return prod(_local_shape(weight, degrees))


def shard_elements(weight: Weight, degrees: Degrees) -> int:
    """Elements that rank 0 (no rank has more) keeps between uses. FSDP2 splits a dimension in equal parts, the last
    ones shorter or empty: the first, or of experts the second once there are more shards than experts.
    """
    shape = list(_local_shape(weight, degrees))
    dim, shards = 0, degrees.fsdp
    if weight.expert and degrees.ep > 1:
        shards = degrees.efsdp
        dim = 1 if shards * degrees.ep > weight.shape[0] else 0
    elif weight.expert:
        dim = 1 if shards > weight.shape[0] else 0
    shape[dim] = ceil(shape[dim] / shards)
    return prod(shape)


def _local_shape(weight: Weight, degrees: Degrees) -> tuple[int, ...]:
    shape = list(weight.shape)
    if weight.expert and degrees.ep > 1:
        shape[0] = ceil(shape[0] / degrees.ep)
    elif weight.tp_dim is not None:
        shape[weight.tp_dim] = ceil(shape[weight.tp_dim] / degrees.tp)
    return tuple(shape)


def total(count, weights: Iterable[Weight], degrees: Degrees) -> int:
    return sum(count(weight, degrees) for weight in weights)


def total_bytes(count, weights: Iterable[Weight], degrees: Degrees, size: int) -> int:
    """Like ``total``, in bytes; ``size`` is that of an element of the trunk's type."""
    return sum(count(weight, degrees) * (weight.itemsize or size) for weight in weights)
