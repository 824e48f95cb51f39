"""Tensor parallelism, recomputation, compilation and FSDP2, for the trunk and the estimator.

torchtitan's modules carry their own sharding declarations; this file adds the heads' and decides what FSDP
gathers together. Frozen parameters get no gradient, hence no reduce-scatter and no optimizer state.
"""

from __future__ import annotations

from typing import Any

import spmd_types as spmd
import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
from torch.distributed.tensor import Shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division, get_fsdp_reshard_after_forward_policy
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
)
from torchtitan.protocols.sharding import ShardingConfig


def head_sharding(enable_sp: bool, bias: bool = True) -> ShardingConfig:
    """Heads: replicated weights on sequence shards. They are D x D; splitting them would cost a collective each."""
    activation = dense_sequence_parallel_placement() if enable_sp else dense_activation_placement(tp=spmd.I)
    kind = spmd.R if enable_sp else spmd.I
    return ShardingConfig(
        state_shardings={name: dense_param_placement(tp=kind) for name in ("weight", "bias")[: 1 + bias]},
        in_src_shardings={"input": activation},
        out_src_shardings=activation,
    )


def prior_sharding(enable_sp: bool) -> ShardingConfig:
    """A prior's numbers: whole on every rank, like the heads; its forward takes them apart itself."""
    kind = spmd.R if enable_sp else spmd.I
    names = ("logit", "gain", "shift", "log_std", "log_frequency", "down", "up")
    return ShardingConfig(state_shardings={name: dense_param_placement(tp=kind) for name in names})


def parallelize_sgt(
    model,
    *,
    parallel_dims: ParallelDims,
    training,
    parallelism,
    compile_config,
    ac_config,
    dump_folder: str,
):
    """torchtitan's ``parallelize_fn`` for ``SGTModel``. Order matters: TP, recomputation, compile, FSDP."""
    if parallel_dims.tp_enabled or parallel_dims.ep_enabled:
        model.parallelize(parallel_dims)
    if parallel_dims.tp_enabled:
        model.tp_mesh = parallel_dims.get_mesh("tp")
        model.tie()  # or FSDP gathers the table and lm_head one by one

    wrap_blocks(model, compile_config=compile_config, ac_config=ac_config, dump_folder=dump_folder)
    apply_fsdp(model, parallel_dims, training, parallelism)
    return model


def wrap_blocks(model, *, compile_config, ac_config, dump_folder: str) -> None:
    """Recomputation and compilation, a block at a time; the teacher is never recomputed."""
    trunk, bodies = model.trunk, model.estimator.every_body()
    if ac_config is not None:
        policy = ac_config.build(dump_folder=dump_folder)
        for index, dual in trunk.layers.items():
            dual.block = policy._wrap_block(dual.block, base_fqn=f"trunk.layers.{index}.block")
        for body in bodies:
            policy.apply(body)
    if compile_config.enable and "model" in compile_config.components:
        model.compile_blocks(compile_config.backend)


def apply_fsdp(model, parallel_dims: ParallelDims, training, parallelism) -> None:
    """One FSDP unit per decoder layer; embeddings, final norm and lm_head, and the heads, as units of their own.

    None where one process has everything and computes in the type it stores: there FSDP would be its bookkeeping alone.
    """
    if (
        parallel_dims.world_size == 1
        and TORCH_DTYPE_MAP[training.mixed_precision_param] == TORCH_DTYPE_MAP[training.dtype]
    ):
        return
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    mesh = parallel_dims.get_mesh(names)
    reshard = get_fsdp_reshard_after_forward_policy(parallelism.fsdp_reshard_after_forward, pp_enabled=False)
    keep = parallelism.fsdp_reshard_after_forward == "always"

    def shard(module, *, dtype: torch.dtype | None, reshard_after_forward: bool, **kwargs) -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, **kwargs)

    trunk, whole = model.trunk, mesh["fsdp"].size() == 1 and not parallel_dims.ep_enabled
    if not whole:  # frozen weights are stored in the type they are used in: None, no cast
        table = [trunk.tok_embeddings, trunk.lm_head]
        for unit in [table] if trunk.enable_weight_tying else table:
            shard(unit, dtype=None, reshard_after_forward=True)
        shard(trunk.norm, dtype=None, reshard_after_forward=keep)
        for dual in trunk.layers.values():
            shard(dual, dtype=None, reshard_after_forward=reshard, **expert_placement(dual, parallel_dims, mesh))

    estimator, dtype = model.estimator, TORCH_DTYPE_MAP[training.mixed_precision_param]
    for body in estimator.every_body():
        for layer in body.layers.values():
            shard(layer, dtype=dtype, reshard_after_forward=reshard)
    heads = [*(body.norm for body in estimator.bodies), estimator.mean_head, estimator.log_std_head]
    if estimator.gate_head is not None:
        heads.append(estimator.gate_head)
    shard(heads, dtype=dtype, reshard_after_forward=keep)
    if (denoiser := estimator.denoiser) is not None:
        shard([denoiser.body.norm, denoiser.mark, denoiser.head], dtype=dtype, reshard_after_forward=keep)
    if (prior := estimator.prior) is not None:
        if prior.body is not None:
            shard(prior.body.norm, dtype=dtype, reshard_after_forward=keep)
        # Its KL sums thousands of features: half a per cent of a std in bfloat16 would be nats.
        shard(prior, dtype=torch.float32, reshard_after_forward=keep)
    # A trunk that is not split has nobody to be gathered from: FSDP would only copy it, twice a step.
    ignored = set(trunk.parameters()) if whole else None
    shard(model, dtype=dtype, reshard_after_forward=keep, ignored_params=ignored)

    # FSDP prefetches, in the backward pass, what ran before in the forward pass: here the embedding table, which no
    # gradient reaches. A layer that prefetches itself prefetches nothing.
    first = next(iter(estimator.bodies[0].layers.values()))
    first.set_modules_to_backward_prefetch([first])

    # torchtitan's loss is already a sum over the global batch divided by its count.
    disable_fsdp_gradient_division(model)
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM


def expert_placement(dual, parallel_dims: ParallelDims, mesh) -> dict:
    """How FSDP shards a mixture of experts: over the hidden dimension once there are more shards than experts."""
    block = getattr(dual.block, "_checkpoint_wrapped_module", dual.block)
    if not getattr(block, "moe_enabled", False):
        return {}
    experts = block.moe.routed_experts.inner_experts
    expert_params = set(experts.parameters())
    if parallel_dims.ep_enabled:
        names = ["dp_replicate", "efsdp"] if parallel_dims.dp_replicate_enabled else ["efsdp"]
        expert_mesh = parallel_dims.get_mesh(names)
        dim = 1 if expert_mesh["efsdp"].size() * parallel_dims.ep > experts.num_experts else 0
        expert_info: Any
        dense_info: Any
        expert_info, dense_info = _get_mesh_info(expert_mesh, None), _get_mesh_info(mesh, None)

        def placement(param):
            is_expert = param in expert_params
            return ShardPlacementResult(
                placement=Shard(dim if is_expert else 0), mesh_info=expert_info if is_expert else dense_info
            )

        return {"shard_placement_fn": placement}
    if mesh["fsdp"].size() > experts.num_experts:
        return {"shard_placement_fn": lambda param: Shard(1) if param in expert_params else None}
    return {}
