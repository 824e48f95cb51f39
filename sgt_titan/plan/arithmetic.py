"""A config's memory, work and traffic in one object."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sgt_titan.config.door import read_config
from sgt_titan.config.load import load
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError
from sgt_titan.trunk.families import expert_count, shapes

from .hardware import EXPOSED_RANGE, GPUS, HFU, HFU_RANGE, NO_GPU, Gpu
from .memory import Memory, item_size, memory
from .traffic import Traffic, gathered_per_microbatch, traffic
from .weights import (
    Degrees,
    Weight,
    checkpoint_bytes,
    embedding_weights,
    end_weights,
    estimator_layers,
    estimator_weights,
    gathered_elements,
    stored_layers,
    total_bytes,
    trunk_layers,
)


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
    checkpoint_bytes: int
    trunk_bytes: int  # of the whole frozen model, as loaded
    layer_gathered: int  # bytes of the largest layer after its gather
    gathered_per_microbatch: int  # bytes a rank receives from its shard group, forward and backward
    traffic: list[Traffic]
    microbatches: int  # in an optimizer step
    rows_per_step: int
    tokens_per_step: int

    @property
    def hardware(self) -> Gpu:
        return GPUS.get(self.gpu, NO_GPU)

    @property
    def capacity(self) -> float:
        return self.hardware.memory

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity

    def _work_seconds(self, hfu: float) -> float:
        return self.tokens_per_step * self.hardware_flops_per_token / (self.degrees.world * self.hardware.flops * hfu)

    @property
    def seconds_per_step(self) -> float:
        """At ``HFU``, if the communication hides behind the work."""
        return self._work_seconds(HFU)

    @property
    def seconds_range(self) -> tuple[float, float]:
        """Best and worst step: ``HFU_RANGE``, and of the communication ``EXPOSED_RANGE`` beside the work.

        A step is never shorter than its slowest link.
        """
        best, worst = [], []
        for link in ("nvlink", "network"):
            on_link = [one.seconds(self.hardware) for one in self.traffic if one.link == link]
            worst.append(sum(slow for slow, _ in on_link))
            best.append(sum(fast for _, fast in on_link))
        return (
            max(self._work_seconds(HFU_RANGE[1]) + EXPOSED_RANGE[1] * sum(best), *best),
            max(self._work_seconds(HFU_RANGE[0]) + EXPOSED_RANGE[0] * sum(worst), *worst),
        )

    @property
    def gather_seconds_per_step(self) -> float:
        """Of the network alone, if no shard group stays within a node."""
        return self.microbatches * self.gathered_per_microbatch / self.hardware.network


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
    weights = [*embedding_weights(trunk), *end_weights(trunk), *(w for layer in layers for w in layer)]

    # 2 forward of the teacher, 2 of the student, 2 backward for activations; the estimator as any trained model.
    work = sum(_work(w, trunk) for w in weights) + sum(_work(w, trunk) for w in estimator)
    recompute = 0
    if config.activation_checkpoint.mode == "full":
        recompute = 2 * sum(_work(w, trunk) for layer in (*layers, *estimator_layers(config, trunk)) for w in layer)
    size = item_size(config)
    layer_bytes = [total_bytes(gathered_elements, layer, degrees, size) for layer in stored_layers(config, trunk)]
    microbatches = training.global_batch_size // (training.local_batch_size * degrees.dp)
    return Plan(
        degrees=degrees,
        gpu=config.cluster.gpu,
        trunk_parameters=sum(w.numel for w in weights),
        estimator_parameters=sum(w.numel for w in estimator),
        model_flops_per_token=6 * work,
        hardware_flops_per_token=6 * work + recompute,
        memory=memory(config, trunk, degrees, max(layer_bytes)),
        checkpoint_bytes=checkpoint_bytes(config, trunk),
        trunk_bytes=size * sum(w.numel for w in weights),
        layer_gathered=max(layer_bytes),
        gathered_per_microbatch=gathered_per_microbatch(config, trunk, degrees),
        traffic=traffic(config, trunk, degrees, microbatches),
        microbatches=microbatches,
        rows_per_step=training.global_batch_size,
        tokens_per_step=training.global_batch_size * training.seq_len,
    )


def _work(weight: Weight, trunk: dict[str, Any]) -> int:
    """Parameters of ``weight`` that a token meets."""
    if not weight.matmul:
        return 0
    return weight.numel * trunk["num_experts_per_tok"] // expert_count(trunk) if weight.expert else weight.numel


def prepared(name: str, overrides: list[str] | None = None) -> tuple[Config, dict[str, Any]]:
    """The resolved config at its own cluster size, and its trunk's config.json.

    Raises:
        UserError: anything wrong with the config, or a run that is not counted here.
    """
    config = load(name, overrides or [])
    if config.run.task != "sgt":
        raise UserError(f"{name}: run.task is {config.run.task}; plan counts the training of a transform (sgt) alone")
    world_size = config.cluster.nodes * config.cluster.gpus_per_node
    config, trunk = read_config(name, overrides or [], world_size=world_size, trunk="config")
    shapes(trunk)  # a family that is known, with all that shapes depend on
    return config, trunk


def from_name(name: str, overrides: list[str] | None = None) -> Plan:
    """The plan of a config at its own cluster size.

    Raises:
        UserError: anything wrong with the config.
    """
    return plan(*prepared(name, overrides))


def fewest_nodes(name: str, overrides: list[str], most: int) -> tuple[int, Plan] | None:
    """The smallest power of two of nodes up to ``most`` on which a config fits, its trunk sharded over all of them.

    The global batch stays, so that fewer nodes take more microbatches.
    """
    nodes = 1
    while nodes <= most:
        layout = ["--cluster.nodes", str(nodes), "--parallelism.data_parallel_replicate_degree", "1"]
        layout += ["--parallelism.data_parallel_shard_degree", "-1"]
        try:
            found = from_name(name, [*overrides, *layout])
        except UserError:  # degrees or batch that do not divide at this size
            found = None
        if found is not None and found.fits:
            return nodes, found
        nodes *= 2
    return None
