"""Bytes on the fullest GPU, or of a process on a CPU, by kind. What stays is exact; what a step adds is an estimate,
held to a trace.

``tests/unit/plan/test_memory.py`` traces the real model's allocations with fake tensors. Letters as in ``weights``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from sgt_titan.config.schema import Config
from sgt_titan.trunk.families import head_dim, kv_heads, mixtures, shared_width

from .weights import (
    Degrees,
    denoiser_weights,
    embedding_weights,
    end_weights,
    estimator_layers,
    estimator_weights,
    gathered_elements,
    head_weights,
    layer_weights,
    prior_weights,
    shard_elements,
    stored_layers,
    total,
    total_bytes,
)

BF16, FP32 = 2, 4
RESERVED = int(6e9)  # CUDA context, NCCL buffers, cuBLAS workspaces and fragmentation: an allowance
# On a CPU: Python with torch, torchtitan and transformers, as measured (benchmarks/process.py memory).
RESERVED_CPU = int(480e6)

# Tensors of a step that grow with the batch, by number of copies; see the fields of Memory.
LAYERS_IN_FLIGHT = 3  # FSDP2: the layer at work, its gather buffer, and the next one's
DENOISER_COPIES = 8  # float32 (B, T, D): z beside what is sent, where it is noisy, g(z), what is added, and gradients
TRANSFORM_COPIES = 18  # float32 (B, T, D): x, mu, log sigma, x~, what their bounds and the terms save, and gradients
PAIR_COPIES = 6  # float32 (G, T, D): both sides of a pair, their gradients, two temporaries
HIDDEN_COPIES = 5  # (B, T, D): both streams whole, their utility positions, and the student's gradient
CHUNK_LOGITS, CHUNK_TOKENS = 2**26, 64  # as in objectives/distillation.py, which needs torch
CHUNK_LOGITS_CPU, CHUNK_TOKENS_CPU = 2**22, 128


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. The first four stay for the whole run; ``peak`` says which of the others coincide."""

    trunk: int  # shard of the frozen weights, bf16 on a GPU, or layers in float8
    estimator: int  # float32 shard of the weights
    optimizer: int  # float32 shards of the gradients and of Adam's two moments
    buffers: int  # rotary caches, one a layer
    gathered: int  # whole layers in flight, the heads, after FSDP's gathers
    saved: int  # what the backward pass finds again: layer inputs under full recomputation, else everything
    layer: int  # one layer's backward, with what is recomputed for it
    transform: int  # x, mu, log sigma, x~, noise and pairs
    logits: int  # lm_head, hidden states of both streams, and a chunk of logits with the loss's temporaries
    reserved: int = RESERVED

    @property
    def peak(self) -> int:
        """Logits are alive after the last layer's forward and before its recomputation."""
        always = self.trunk + self.estimator + self.optimizer + self.buffers + self.reserved
        return always + self.gathered + self.saved + self.transform + max(self.layer, self.logits)


def item_size(config: Config) -> int:
    """Bytes of a number in the trunk and in its activations."""
    return FP32 if config.trunk.dtype == "float32" else BF16


def memory(config: Config, trunk: dict[str, Any], degrees: Degrees, layer_gathered: int) -> Memory:
    training, width, tp, size = config.training, trunk["hidden_size"], degrees.tp, item_size(config)
    tokens = training.local_batch_size * training.seq_len
    own_tokens = tokens // tp if degrees.sp else tokens
    estimator = estimator_weights(config, trunk)
    trained_layers = len(estimator_layers(config, trunk))
    layers_stored = stored_layers(config, trunk)
    everything = [*embedding_weights(trunk), *end_weights(trunk), *(w for layer in layers_stored for w in layer)]

    kept = size * max(_layer_kept(trunk, degrees, tokens, own_tokens, experts) for experts in _kinds(trunk))
    layers = trunk["num_hidden_layers"] + trained_layers
    recomputed = config.activation_checkpoint.mode == "full"
    # Selective recomputation saves between a third and all of a layer, by operation: counted as all of it.
    saved = layers * (size * own_tokens * width if recomputed else kept)
    if not recomputed:  # trained matrices keep their inputs too, gathered along the sequence
        saved += trained_layers * size * 2 * tokens * width
    group = max(config.objective.mi_group, training.local_batch_size)
    pairs = PAIR_COPIES * group * own_tokens // training.local_batch_size
    copies = TRANSFORM_COPIES + (DENOISER_COPIES if config.denoiser.layers else 0)
    heads = [*head_weights(config, trunk), *denoiser_weights(config, trunk), *prior_weights(config, trunk)]
    norm, lm_head = end_weights(trunk)
    # A tied table is gathered from the embedding to the loss, an lm_head of its own during the loss alone.
    tied = bool(trunk.get("tie_word_embeddings"))
    if degrees.gathers:
        in_flight = LAYERS_IN_FLIGHT * layer_gathered
        stay_gathered = [norm, *heads, *([lm_head] if tied else [])]
    else:  # the estimator alone, cast to the type it computes in
        in_flight = size * total(gathered_elements, layer_weights(trunk, experts=False), degrees)
        stay_gathered = heads
    vocabulary = ceil(trunk["vocab_size"] / tp)
    cpu = not config.cluster.gpu
    logits, least = (CHUNK_LOGITS_CPU, CHUNK_TOKENS_CPU) if cpu else (CHUNK_LOGITS, CHUNK_TOKENS)
    chunk = training.loss_chunk_tokens or max(least, 1 << max(0, (logits // vocabulary).bit_length() - 1))
    temporaries = 3 if tp > 1 else 2  # of the loss: ranks that share a vocabulary keep both exponentials
    # torchtitan's caches: cos and sin of every feature, or a complex number for each pair of them.
    rope = trunk["qk_rope_head_dim"] if "kv_lora_rank" in trunk else 2 * head_dim(trunk)
    elements = total(shard_elements, estimator, degrees)
    # A float8 matrix is multiplied by way of a copy in the trunk's type, one at a time.
    copied = max(gathered_elements(w, degrees) for w in layers_stored[0]) if config.trunk.float8 == "weights" else 0
    return Memory(
        trunk=total_bytes(shard_elements, everything, degrees, size),
        estimator=FP32 * elements,
        optimizer=3 * FP32 * elements,
        buffers=FP32 * layers * training.seq_len * rope,
        gathered=in_flight + size * (copied + total(gathered_elements, stay_gathered, degrees)),
        saved=saved,
        layer=size * _layer_passing(trunk, degrees, tokens) + (kept if recomputed else 0),
        transform=FP32 * width * (copies * own_tokens + tokens + pairs),  # noise is drawn for whole rows
        logits=(size * gathered_elements(lm_head, degrees) if degrees.gathers and not tied else 0)
        + HIDDEN_COPIES * size * tokens * width
        + (2 * size + temporaries * FP32) * min(chunk, tokens) * vocabulary,
        reserved=RESERVED_CPU if cpu else RESERVED,
    )


def _kinds(trunk: dict[str, Any]) -> set[bool]:
    """Whether there are layers without experts (False) and with them (True)."""
    return set(mixtures(trunk))


def _layer_kept(trunk: dict[str, Any], degrees: Degrees, tokens: int, own_tokens: int, experts: bool) -> int:
    """Numbers a layer's forward leaves for its backward. Frozen matrices keep no input: no weight gradient wants it.

    Norms and residuals keep 4.5 D a token of this rank; attention keeps q, k, v and its output, a gated MLP three
    tensors of its hidden width, all split over tensor parallelism. Measured on dense layers; experts are counted by
    analogy: three hidden tensors of every routed copy, and six D for its exchange and weighting.
    """
    width, tp, heads = trunk["hidden_size"], degrees.tp, trunk["num_attention_heads"]
    if "kv_lora_rank" in trunk:
        key = trunk["qk_nope_head_dim"] + trunk["qk_rope_head_dim"]
        attention = heads * (2 * key + 2 * trunk["v_head_dim"]) // tp + 2 * (trunk["q_lora_rank"] or 0)
    else:
        attention = (2 * heads + 2 * kv_heads(trunk)) * head_dim(trunk) // tp
    ends = 9 * width * own_tokens // 2
    if not experts:
        return ends + tokens * (attention + 3 * trunk["intermediate_size"] // tp)
    top, hidden = trunk["num_experts_per_tok"], trunk["moe_intermediate_size"]
    # With expert parallelism each tensor-parallel rank routes its own tokens; spread evenly, it receives as many.
    routed_tokens = top * (own_tokens if degrees.ep > 1 else tokens)
    routed = routed_tokens * (6 * width + 3 * hidden // (1 if degrees.ep > 1 else tp))
    return ends + routed + tokens * (attention + 3 * shared_width(trunk) // tp)


def _layer_passing(trunk: dict[str, Any], degrees: Degrees, tokens: int) -> int:
    """Numbers alive only while a layer is worked on: the input that sequence parallelism gathers and its gradient, and
    gradients of two tensors of the MLP's hidden width.
    """
    return tokens * (2 * trunk["hidden_size"] + 2 * trunk["intermediate_size"] // degrees.tp)
