"""A trunk to be fine-tuned: transformers' own model inside torchtitan's trainer, data-parallel.

torchtitan has no GPT-2, and a model that is to be served by transformers or vLLM afterwards is best trained as it will
run. Norms are frozen: with one gain for all features the linears behind a norm can take up any change of it, so a
trained scalar would add nothing, and gains that stay equal are what a rotation needs.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division, get_fsdp_reshard_after_forward_policy
from torchtitan.protocols.model import BaseModel
from transformers import AutoModelForCausalLM, PretrainedConfig

from .compilation import compile_blocks


class FinetuneModel(BaseModel):
    """``lm`` is the transformers model; everything but its norms is trained."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        hf: Annotated[PretrainedConfig, tyro.conf.Suppress]

        def update_from_config(self, *, config, **kwargs) -> None: ...

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            count = sum(p.numel() for p in model.parameters())
            return count, 6 * count

    def __init__(self, config: Config):
        super().__init__()
        self.lm = AutoModelForCausalLM.from_config(config.hf, dtype=torch.float32, attn_implementation="sdpa")
        for module in self.lm.modules():
            if type(module).__name__.endswith("Norm"):
                module.requires_grad_(False)

    @property
    def layers(self) -> nn.ModuleList:
        body = self.lm.base_model
        return body.layers if hasattr(body, "layers") else body.h

    def verify_module_protocol(self) -> None:
        """transformers' modules are not torchtitan's and need not be: nothing here relies on their protocol."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.lm.eval()  # no dropout: a resumed run repeats the uninterrupted one
        return self

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Buffers and ties, which do not survive the way over the meta device; weights come from the checkpoint."""
        self.lm.tie_weights()
        for name, module in list(self.lm.named_modules()):
            if not any(True for _ in module.buffers(recurse=False)):
                continue
            if not hasattr(module, "inv_freq"):
                raise NotImplementedError(f"{name}: {type(module).__name__} has buffers that cannot be made anew")
            device = module.inv_freq.device
            self.lm.set_submodule(name, type(module)(self.lm.config).to(device))

    def compile_blocks(self, backend: str, *, whole: bool = False) -> None:
        """Every layer by torch.compile, from its next call on."""
        compile_blocks(self.layers, backend, fullgraph=whole)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V). Rows are padded on the right, which causal attention never looks at."""
        return self.lm(input_ids=tokens_BT, use_cache=False).logits


def parallelize_finetune(
    model: FinetuneModel,
    *,
    parallel_dims: ParallelDims,
    training,
    parallelism,
    compile_config,
    ac_config,
    dump_folder: str,
) -> FinetuneModel:
    """torchtitan's ``parallelize_fn``: recomputation, compilation, then FSDP2 with a unit per layer."""
    if ac_config is not None:
        policy = ac_config.build(dump_folder=dump_folder)
        for index, layer in enumerate(model.layers):
            model.layers[index] = policy._wrap_block(layer, base_fqn=f"layers.{index}")
    if compile_config.enable:
        model.compile_blocks(compile_config.backend)
    replicated = parallel_dims.dp_replicate_enabled
    mesh = parallel_dims.get_mesh(["dp_replicate", "fsdp"] if replicated else ["fsdp"])
    reshard = get_fsdp_reshard_after_forward_policy(parallelism.fsdp_reshard_after_forward, pp_enabled=False)
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param], reduce_dtype=torch.float32
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    disable_fsdp_gradient_division(model)  # the loss is a sum over the global batch divided by its count
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    return model
