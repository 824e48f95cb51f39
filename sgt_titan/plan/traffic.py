"""What a rank sends and receives in an optimizer step, by collective and by the link that carries it.

Bytes are those that one rank receives; a ring's reduce-scatter and all-gather move (n - 1) / n of the whole each, an
all-reduce both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sgt_titan.config.schema import Config
from sgt_titan.trunk.families import mixtures

from .hardware import LINK_RANGE, Gpu
from .memory import BF16, FP32, item_size
from .weights import (
    Degrees,
    embedding_weights,
    end_weights,
    estimator_weights,
    gathered_elements,
    shard_elements,
    stored_layers,
    total,
    total_bytes,
    trained_bodies,
)

Link = Literal["nvlink", "network"]


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in an optimizer step."""

    name: str
    count: int
    bytes: float
    link: Link

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """Worst and best, alone on its link."""
        speed = getattr(gpu, self.link)
        worst, best = (self.bytes / (speed * share) for share in LINK_RANGE)
        return worst, best


def gathered_per_microbatch(config: Config, trunk: dict[str, Any], degrees: Degrees) -> int:
    """Bytes of frozen weights that a rank receives from its shard group, forward and backward.

    Layers are gathered in the forward and in the backward pass, the ends in the forward pass alone.
    """
    size, layers = item_size(config), [w for layer in stored_layers(config, trunk) for w in layer]
    used = [*layers, *layers, *end_weights(trunk), *embedding_weights(trunk)]
    return total_bytes(gathered_elements, used, degrees, size) - total_bytes(shard_elements, used, degrees, size)


def traffic(config: Config, trunk: dict[str, Any], degrees: Degrees, microbatches: int) -> list[Traffic]:
    """Every kind that the layout has. Expert parallelism's exchange of tokens is counted as even."""
    found, size, width = [], item_size(config), trunk["hidden_size"]
    per_node = config.cluster.gpus_per_node

    def link(ranks: int) -> Link:
        """Of a group of neighbouring ranks: tensor-parallel ranks are the closest, shards next, copies last."""
        return "nvlink" if ranks <= per_node else "network"

    layers = trunk["num_hidden_layers"]
    tokens = config.training.local_batch_size * config.training.seq_len
    if degrees.fsdp > 1:
        found.append(
            Traffic(
                "all-gather of frozen layers",
                microbatches * (2 * layers + 2),
                microbatches * gathered_per_microbatch(config, trunk, degrees),
                link(degrees.fsdp * degrees.tp),
            )
        )
    if degrees.tp > 1:
        # Around attention and around the MLP, activations are gathered and scattered again: in the teacher's forward,
        # the student's forward and backward, and in what is recomputed.
        passes = 3 + (config.activation_checkpoint.mode == "full")
        pairs = 2 * passes * layers * microbatches
        moved = (degrees.tp - 1) / degrees.tp * tokens * width * size
        kinds = ("all-gather", "reduce-scatter") if degrees.sp else ("half an all-reduce", "half an all-reduce")
        found.append(Traffic(f"tensor parallel, {kinds[0]}", pairs, pairs * moved, link(degrees.tp)))
        found.append(Traffic(f"tensor parallel, {kinds[1]}", pairs, pairs * moved, link(degrees.tp)))
    if degrees.ep > 1:
        top, moe = trunk["num_experts_per_tok"], sum(mixtures(trunk))
        own = tokens // degrees.tp if degrees.sp else tokens
        calls = 2 * (3 + (config.activation_checkpoint.mode == "full")) * moe * microbatches
        moved = (degrees.ep - 1) / degrees.ep * own * top * width * size
        found.append(Traffic("experts, all-to-all", calls, calls * moved, link(degrees.ep)))
    trained = total(gathered_elements, estimator_weights(config, trunk), degrees)
    computed = {"auto": size, "bfloat16": BF16, "float32": FP32}[config.training.mixed_precision_param]
    if degrees.fsdp > 1:
        share = (degrees.fsdp - 1) / degrees.fsdp
        passes = 2 * computed + FP32  # gathered forward and backward as they are computed with; gradients in float32
        calls, moved = 3 * microbatches * sum(trained_bodies(config)), microbatches * share * passes * trained
        found.append(Traffic("estimator, gather and scatter", calls, moved, link(degrees.fsdp * degrees.tp)))
    if degrees.replicas > 1:
        moved = 2 * (degrees.replicas - 1) / degrees.replicas * FP32 * trained / degrees.fsdp
        found.append(Traffic("estimator, gradients of all copies", 1, moved, link(degrees.world)))
    return found
