"""Memory, work and traffic of a run, by arithmetic.

    python -m sgt_titan.plan NAME [--rows N] [--section.key value ...]    one config
    python -m sgt_titan.plan                                              the tables of docs/MEMORY.md

Counted from the run's config and the trunk's config.json alone; no torch, no GPU, no weights. Shards and flops are
exact (``tests/unit/test_train_configs.py`` holds them to the modules torchtitan builds); what a step needs beside them
is an estimate, whose terms are the fields of ``Memory`` (``tests/unit/test_plan.py`` holds it to a trace of the model's
allocations). GB is 1e9 bytes.

Letters: B rows of a rank, T tokens of a row, D width, V vocabulary, E experts, tp / fsdp / ep degrees.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import ceil, prod
from typing import Any

from sgt_titan.config.load import load, read_trunk, resolve, validate
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError, guarded

BF16, FP32 = 2, 4
GB = 1e9

# Dense bf16 flops per second, memory in bytes, and a GPU's share of its node's network in bytes per second, of the
# usual 8-GPU machines (8 x 200 and 8 x 400 Gbit/s).
GPUS = {
    "A100-80GB": (312e12, 80e9, 25e9),
    "H100-80GB": (989e12, 80e9, 50e9),
}
NO_GPU = (float("nan"), float("inf"), float("nan"))  # sized for CPUs: nothing is promised
# The shipped configs with a row in docs/MEMORY.md, small to large.
SHIPPED = (
    "llama3_1b",
    "qwen3_32b_64x8",
    "deepseek_r1_qwen_32b_64x8",
    "llama3_70b_1x8",
    "llama3_70b_32x8",
    "llama3_70b_64x8",
    "deepseek_r1_70b_64x8",
    "deepseek_v3_64x8",
)
HFU = 0.4  # assumed for durations; what a well-tuned run of this size reaches
RESERVED = int(6e9)  # CUDA context, NCCL buffers, cuBLAS workspaces and fragmentation: an allowance

# Tensors of a step that grow with the batch, by number of copies; see the fields of Memory.
LAYERS_IN_FLIGHT = 3  # FSDP2: the layer at work, its gather buffer, and the next one's
TRANSFORM_COPIES = 18  # float32 (B, T, D): x, mu, log sigma, x~, what their bounds and the terms save, and gradients
PAIR_COPIES = 6  # float32 (G, T, D): both sides of a pair, their gradients, two temporaries
HIDDEN_COPIES = 5  # (B, T, D): both streams whole, their utility positions, and the student's gradient
# A chunk of logits: teacher and student, soft cross-entropy's three float32 and a mask.
CHUNK_LOGITS = 2**26  # as in objectives/distillation.py, which needs torch


@dataclass(frozen=True)
class Weight:
    """One tensor: its shape, the dimension that tensor parallelism splits (None: replicated), and whose it is."""

    shape: tuple[int, ...]
    tp_dim: int | None = None
    expert: bool = False
    matmul: bool = True  # takes part in every token's work; False: a lookup table

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


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. The first four stay for the whole run; ``peak`` says which of the others coincide."""

    trunk: int  # shard of the frozen weights, bf16 on a GPU
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


@dataclass(frozen=True)
class Plan:
    """What ``plan`` counts; parameters and flops are of the whole model."""

    degrees: Degrees
    gpu: str
    trunk_parameters: int
    estimator_parameters: int
    model_flops_per_token: int  # what MFU counts
    hardware_flops_per_token: int  # what HFU counts: with recomputation
    memory: Memory
    trunk_bytes: int  # of the whole frozen model, as loaded
    layer_gathered: int  # bytes of the largest layer after its gather
    gathered_per_microbatch: int  # bytes a rank receives from its shard group, forward and backward
    microbatches: int  # in an optimizer step
    rows_per_step: int
    tokens_per_step: int

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and both moments in float32; the rest of a checkpoint is kilobytes."""
        return 3 * FP32 * self.estimator_parameters

    @property
    def capacity(self) -> float:
        return GPUS.get(self.gpu, NO_GPU)[1]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity

    @property
    def seconds_per_step(self) -> float:
        """At ``HFU``, if the gathers hide behind the work."""
        return (
            self.tokens_per_step
            * self.hardware_flops_per_token
            / (self.degrees.world * GPUS.get(self.gpu, NO_GPU)[0] * HFU)
        )

    @property
    def gather_seconds_per_step(self) -> float:
        """Of the network alone, if no shard group stays within a node."""
        return self.microbatches * self.gathered_per_microbatch / GPUS.get(self.gpu, NO_GPU)[2]


# -- weights -----------------------------------------------------------------------------------------------------------


def column(rows: int, width: int) -> Weight:
    """A linear layer split over its outputs."""
    return Weight((rows, width), tp_dim=0)


def row(rows: int, width: int) -> Weight:
    """A linear layer split over its inputs."""
    return Weight((rows, width), tp_dim=1)


def gated_mlp(hidden: int, width: int) -> list[Weight]:
    return [column(hidden, width), column(hidden, width), row(width, hidden)]


def head_dim(trunk: dict[str, Any]) -> int:
    return trunk.get("head_dim") or trunk["hidden_size"] // trunk["num_attention_heads"]


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
    dim, outputs = head_dim(trunk), (heads, trunk["num_key_value_heads"], trunk["num_key_value_heads"])
    weights = [*(column(n * dim, width) for n in outputs), row(width, heads * dim)]
    if trunk["model_type"] == "qwen2":
        weights += [Weight((n * dim,), tp_dim=0) for n in outputs]
    if trunk["model_type"] == "qwen3":
        weights += [Weight((dim,)), Weight((dim,))]
    return weights


def layer_weights(trunk: dict[str, Any], *, experts: bool) -> list[Weight]:
    """One decoder layer; ``experts``: with a mixture of experts instead of the dense MLP."""
    width = trunk["hidden_size"]
    shared = [*attention_weights(trunk), Weight((width,)), Weight((width,))]
    if not experts:
        return shared + gated_mlp(trunk["intermediate_size"], width)
    count, hidden = trunk["n_routed_experts"], trunk["moe_intermediate_size"]
    routed = [
        Weight((count, hidden, width), tp_dim=1, expert=True),
        Weight((count, hidden, width), tp_dim=1, expert=True),
        Weight((count, width, hidden), tp_dim=2, expert=True),
    ]
    return [*shared, Weight((count, width)), *gated_mlp(hidden * trunk["n_shared_experts"], width), *routed]


def trunk_layers(trunk: dict[str, Any]) -> list[list[Weight]]:
    dense = trunk.get("first_k_dense_replace", trunk["num_hidden_layers"])
    return [layer_weights(trunk, experts=index >= dense) for index in range(trunk["num_hidden_layers"])]


def end_weights(trunk: dict[str, Any]) -> list[Weight]:
    """Final norm and lm_head."""
    return [Weight((trunk["hidden_size"],)), column(trunk["vocab_size"], trunk["hidden_size"])]


def embedding_weights(trunk: dict[str, Any]) -> list[Weight]:
    """The embedding table, unless it is lm_head's own."""
    if trunk.get("tie_word_embeddings"):
        return []
    return [Weight((trunk["vocab_size"], trunk["hidden_size"]), tp_dim=0, matmul=False)]


def head_weights(trunk: dict[str, Any]) -> list[Weight]:
    """The two heads: whole on every tensor-parallel rank."""
    width = trunk["hidden_size"]
    return 2 * [Weight((width, width)), Weight((width,))]


def estimator_weights(config: Config, trunk: dict[str, Any]) -> list[Weight]:
    bodies = 2 if config.estimator.body == "separate" else 1
    body = config.estimator.layers * layer_weights(trunk, experts=False) + [Weight((trunk["hidden_size"],))]
    return bodies * body + head_weights(trunk)


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


def _sum(count, weights: Iterable[Weight], degrees: Degrees) -> int:
    return sum(count(weight, degrees) for weight in weights)


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan(config: Config, trunk: dict[str, Any]) -> Plan:
    """The arithmetic of a resolved and validated config at its own cluster size.

    Args:
        trunk: the trunk's config.json.

    Raises:
        UserError: ``cluster.gpu`` is not one whose figures are known.
    """
    if config.cluster.gpu and config.cluster.gpu not in GPUS:
        raise UserError(f"cluster.gpu {config.cluster.gpu!r} is not known; known are {', '.join(GPUS)}")
    if not config.cluster.gpu and config.trunk.dtype == "auto":
        config = replace(config, trunk=replace(config.trunk, dtype="float32"))
    p, training = config.parallelism, config.training
    degrees = Degrees(
        world=config.cluster.nodes * config.cluster.gpus_per_node,
        replicas=p.data_parallel_replicate_degree,
        fsdp=p.data_parallel_shard_degree,
        tp=p.tensor_parallel_degree,
        ep=p.expert_parallel_degree,
        sp=p.enable_sequence_parallel and p.tensor_parallel_degree > 1,
    )
    layers, estimator = trunk_layers(trunk), estimator_weights(config, trunk)
    ends, embeddings = end_weights(trunk), embedding_weights(trunk)
    weights = [*embeddings, *ends, *(w for layer in layers for w in layer)]

    # 2 forward of the teacher, 2 of the student, 2 backward for activations; the estimator as any trained model.
    work = sum(_work(w, trunk) for w in weights) + sum(_work(w, trunk) for w in estimator)
    recompute = 2 * work if config.activation_checkpoint.mode == "full" else 0

    size = _item_size(config)
    layer_bytes = [size * _sum(gathered_elements, layer, degrees) for layer in layers]
    # Layers are gathered in the forward and in the backward pass, the ends in the forward pass alone.
    twice, once = [w for layer in layers for w in layer], [*ends, *embeddings]
    received = 2 * sum(layer_bytes) + size * _sum(gathered_elements, once, degrees)
    own = size * (2 * _sum(shard_elements, twice, degrees) + _sum(shard_elements, once, degrees))
    return Plan(
        degrees=degrees,
        gpu=config.cluster.gpu,
        trunk_parameters=sum(w.numel for w in weights),
        estimator_parameters=sum(w.numel for w in estimator),
        model_flops_per_token=6 * work,
        hardware_flops_per_token=6 * work + recompute,
        memory=_memory(config, trunk, degrees, max(layer_bytes)),
        trunk_bytes=size * sum(w.numel for w in weights),
        layer_gathered=max(layer_bytes),
        gathered_per_microbatch=received - own,
        microbatches=training.global_batch_size // (training.local_batch_size * degrees.dp),
        rows_per_step=training.global_batch_size,
        tokens_per_step=training.global_batch_size * training.seq_len,
    )


def _item_size(config: Config) -> int:
    """Bytes of a number in the trunk and in its activations."""
    return FP32 if config.trunk.dtype == "float32" else BF16


def _work(weight: Weight, trunk: dict[str, Any]) -> int:
    """Parameters of ``weight`` that a token meets."""
    if not weight.matmul:
        return 0
    return weight.numel * trunk["num_experts_per_tok"] // trunk["n_routed_experts"] if weight.expert else weight.numel


def _memory(config: Config, trunk: dict[str, Any], degrees: Degrees, layer_gathered: int) -> Memory:
    training, width, tp, size = config.training, trunk["hidden_size"], degrees.tp, _item_size(config)
    tokens = training.local_batch_size * training.seq_len
    own_tokens = tokens // tp if degrees.sp else tokens
    estimator = estimator_weights(config, trunk)
    estimator_layers = config.estimator.layers * (2 if config.estimator.body == "separate" else 1)
    everything = [*embedding_weights(trunk), *end_weights(trunk), *(w for layer in trunk_layers(trunk) for w in layer)]

    kept = size * max(_layer_kept(trunk, degrees, tokens, own_tokens, experts) for experts in _kinds(trunk))
    layers = trunk["num_hidden_layers"] + estimator_layers
    recomputed = config.activation_checkpoint.mode == "full"
    # Selective recomputation saves between a third and all of a layer, by operation: counted as all of it.
    saved = layers * (size * own_tokens * width if recomputed else kept)
    if not recomputed:  # trained matrices keep their inputs too, gathered along the sequence
        saved += estimator_layers * size * 2 * tokens * width
    group = max(config.objective.mi_group, training.local_batch_size)
    pairs = PAIR_COPIES * group * own_tokens // training.local_batch_size
    in_flight = LAYERS_IN_FLIGHT if degrees.fsdp > 1 or degrees.ep > 1 else 1
    norm, lm_head = end_weights(trunk)
    # A tied table is gathered from the embedding to the loss, an lm_head of its own during the loss alone.
    tied = bool(trunk.get("tie_word_embeddings"))
    stay_gathered = [norm, *head_weights(trunk), *([lm_head] if tied else [])]
    vocabulary = ceil(trunk["vocab_size"] / tp)
    chunk = training.loss_chunk_tokens or max(128, 1 << (CHUNK_LOGITS // vocabulary).bit_length() - 1)
    # torchtitan's caches: cos and sin of every feature, or a complex number for each pair of them.
    rope = trunk["qk_rope_head_dim"] if "kv_lora_rank" in trunk else 2 * head_dim(trunk)
    elements = _sum(shard_elements, estimator, degrees)
    return Memory(
        trunk=size * _sum(shard_elements, everything, degrees),
        estimator=FP32 * elements,
        optimizer=3 * FP32 * elements,
        buffers=FP32 * layers * training.seq_len * rope,
        gathered=in_flight * layer_gathered + size * _sum(gathered_elements, stay_gathered, degrees),
        saved=saved,
        layer=size * _layer_passing(trunk, degrees, tokens) + (kept if recomputed else 0),
        transform=FP32 * width * (TRANSFORM_COPIES * own_tokens + tokens + pairs),  # noise is drawn for whole rows
        logits=(0 if tied else size * gathered_elements(lm_head, degrees))
        + HIDDEN_COPIES * size * tokens * width
        + (2 * size + 3 * FP32 + 1) * min(chunk, tokens) * vocabulary,
    )


def _kinds(trunk: dict[str, Any]) -> set[bool]:
    """Whether there are layers without experts (False) and with them (True)."""
    dense = trunk.get("first_k_dense_replace", trunk["num_hidden_layers"])
    return {index >= dense for index in (0, trunk["num_hidden_layers"] - 1)}


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
        attention = (2 * heads + 2 * trunk["num_key_value_heads"]) * head_dim(trunk) // tp
    ends = 9 * width * own_tokens // 2
    if not experts:
        return ends + tokens * (attention + 3 * trunk["intermediate_size"] // tp)
    top, hidden = trunk["num_experts_per_tok"], trunk["moe_intermediate_size"]
    # With expert parallelism each tensor-parallel rank routes its own tokens; spread evenly, it receives as many.
    routed_tokens = top * (own_tokens if degrees.ep > 1 else tokens)
    routed = routed_tokens * (6 * width + 3 * hidden // (1 if degrees.ep > 1 else tp))
    return ends + routed + tokens * (attention + 3 * hidden * trunk["n_shared_experts"] // tp)


def _layer_passing(trunk: dict[str, Any], degrees: Degrees, tokens: int) -> int:
    """Numbers alive only while a layer is worked on: the input that sequence parallelism gathers and its gradient, and
    gradients of two tensors of the MLP's hidden width.
    """
    return tokens * (2 * trunk["hidden_size"] + 2 * trunk["intermediate_size"] // degrees.tp)


# -- printing ----------------------------------------------------------------------------------------------------------


def gigabytes(count: float) -> str:
    return f"{count / GB:,.2f} GB"


def table(result: Plan, rows: int | None = None) -> str:
    """A Markdown table of one plan.

    Args:
        rows: packed rows (or samples, without packing) of an epoch, when they are known.
    """
    d, m = result.degrees, result.memory
    verdict = "fits" if result.fits else "does not fit"
    notes = {
        "trunk": "frozen, bf16, sharded",
        "estimator": "float32",
        "optimizer": "gradient and two Adam moments, float32",
        "buffers": "rotary caches",
        "gathered": f"layers in flight ({gigabytes(result.layer_gathered)} each), heads",
        "saved": "activations kept for the backward pass",
        "layer": "one layer's backward, with what is recomputed for it",
        "transform": "x, mu, log sigma, x~, noise, pairs; float32",
        "logits": "lm_head, hidden states, a chunk of both streams' logits; words split over TP",
        "reserved": "allowance",
    }
    lines = [
        f"{d.world} x {result.gpu}: replicas {d.replicas} x shards {d.fsdp} x TP {d.tp}, EP {d.ep}",
        "",
        "| per GPU | | |",
        "|---|---:|---|",
        *(f"| {f.name} | {gigabytes(getattr(m, f.name))} | {notes[f.name]} |" for f in fields(m)),
        f"| peak | {gigabytes(m.peak)} | of {gigabytes(result.capacity)}: {verdict} |",
        "",
        "| run | |",
        "|---|---:|",
        f"| trunk | {result.trunk_parameters / 1e9:.3f}e9 parameters, {gigabytes(result.trunk_bytes)} |",
        f"| estimator | {result.estimator_parameters / 1e9:.3f}e9 parameters |",
        f"| checkpoint | {gigabytes(result.checkpoint_bytes)}, "
        f"{result.checkpoint_bytes / result.trunk_bytes:.1%} of the trunk |",
        f"| work | {result.model_flops_per_token / 1e9:,.0f} Gflop a token, "
        f"{result.hardware_flops_per_token / 1e9:,.0f} with recomputation |",
        f"| step | {result.rows_per_step} rows, {result.tokens_per_step:,} tokens, "
        f"{result.microbatches} microbatches |",
        f"| time of a step | {result.seconds_per_step:.1f} s at {HFU:.0%} HFU |",
        f"| gathers of a step | {gigabytes(result.microbatches * result.gathered_per_microbatch)} a GPU, "
        f"{result.gather_seconds_per_step:.1f} s of network, overlapped |",
    ]
    if rows is not None:
        steps = rows / result.rows_per_step
        lines.append(f"| epoch | {steps:,.0f} steps, {steps * result.seconds_per_step / 3600:,.1f} h |")
    return "\n".join(lines)


def summary(names: Iterable[str]) -> str:
    """The two tables of docs/MEMORY.md."""
    plans = {name: from_name(name) for name in names}
    memory = [
        "| config | GPUs | replicas x shards x TP (EP) | trunk | estimator | Adam, gradient | gathered | saved "
        "| transform | layer or logits | peak of 80 GB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    work = [
        "| config | trunk, 1e9 | trunk, GB | estimator, 1e9 | checkpoint, GB | checkpoint / trunk | Gflop a token "
        "| with recomputation | s a step | gathers, s a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, p in plans.items():
        d, m = p.degrees, p.memory
        numbers = (m.trunk, m.estimator, m.optimizer, m.gathered, m.saved, m.transform, max(m.layer, m.logits))
        cells = " | ".join(f"{n / GB:.2f}" for n in numbers)
        mesh = f"{d.replicas} x {d.fsdp} x {d.tp}" + (f" ({d.ep})" if d.ep > 1 else "")
        verdict = f"{m.peak / GB:.0f}, {'fits' if p.fits else 'does not fit'}"
        memory.append(f"| {name} | {d.world} | {mesh} | {cells} | {verdict} |")
        work.append(
            f"| {name} | {p.trunk_parameters / 1e9:.3f} | {p.trunk_bytes / GB:,.1f} "
            f"| {p.estimator_parameters / 1e9:.3f} | {p.checkpoint_bytes / GB:.2f} "
            f"| {p.checkpoint_bytes / p.trunk_bytes:.1%} | {p.model_flops_per_token / 1e9:,.0f} "
            f"| {p.hardware_flops_per_token / 1e9:,.0f} | {p.seconds_per_step:.1f} | {p.gather_seconds_per_step:.1f} |"
        )
    return "\n".join([*memory, "", *work])


def from_name(name: str, overrides: list[str] | None = None) -> Plan:
    """The plan of a config at its own cluster size.

    Raises:
        UserError: anything wrong with the config.
    """
    config = load(name, overrides or [])
    world_size = config.cluster.nodes * config.cluster.gpus_per_node
    config = resolve(config, world_size=world_size)
    trunk = read_trunk(config, weights=False)
    validate(config, world_size, trunk)
    return plan(config, trunk)


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)

    def action() -> int:
        rows = None
        if "--rows" in words:
            at = words.index("--rows")
            if at + 1 >= len(words) or not words[at + 1].isdigit():
                raise UserError("--rows needs the number of rows of an epoch")
            rows = int(words[at + 1])
            del words[at : at + 2]
        if not words:
            print(summary(SHIPPED))
            return 0
        if words[0].startswith("-"):
            raise UserError("usage: python -m sgt_titan.plan [NAME [--rows N] [--section.key value ...]]")
        print(table(from_name(words[0], words[1:]), rows))
        return 0

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
