"""A trunk to be fine-tuned: transformers' own model inside torchtitan's trainer, data-parallel.

torchtitan has no GPT-2, and a model that is to be served by transformers or vLLM afterwards is best trained as it will
run. Norms are frozen: with one gain for all features the linears behind a norm can take up any change of it, so a
trained scalar would add nothing, and gains that stay equal are what a rotation needs.

A teacher (the original) is a second, frozen model beside it. Logits of both exist for a chunk of tokens at a time.

Legend: B rows, T tokens, D width, V vocabulary, N scored tokens, C of a chunk.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
import tyro
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division, get_fsdp_reshard_after_forward_policy
from torchtitan.protocols.model import BaseModel
from transformers import PretrainedConfig

from sgt_titan.conjformer.families import FAMILIES, Family, Linear
from sgt_titan.objectives.distillation import chunk_size
from sgt_titan.objectives.drift import gram_cosine, table_cosine
from sgt_titan.objectives.utility import soft_cross_entropy

from .compilation import compile_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS, ROWS = 8, 512  # of the drift's estimate: weights, and rows of the table


class Scores(NamedTuple):
    """Sums over scored tokens. next: cross-entropy of the next token, nats. kl: to the teacher, 0 without one; both
    differentiable. right: most probable was the next token."""

    next: torch.Tensor
    kl: torch.Tensor
    right: torch.Tensor


class FinetuneModel(BaseModel):
    """``lm`` is the transformers model; everything but its norms is trained. ``teacher``: frozen, or None."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        hf: Annotated[PretrainedConfig, tyro.conf.Suppress]
        teacher: Annotated[PretrainedConfig | None, tyro.conf.Suppress] = None

        def update_from_config(self, *, config, **kwargs) -> None: ...

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            assert isinstance(model, FinetuneModel)
            count, teacher = (0 if m is None else m.num_parameters() for m in (model.lm, model.teacher))
            return count, 6 * count + 2 * teacher

    def __init__(self, config: Config):
        super().__init__()
        self.lm = _bare(config.hf)
        self.teacher = _bare(config.teacher).requires_grad_(False) if config.teacher is not None else None
        for module in self.lm.modules():
            if type(module).__name__.endswith("Norm"):
                module.requires_grad_(False)

    @property
    def layers(self) -> nn.ModuleList:
        return layers_of(self.lm)

    def verify_module_protocol(self) -> None:
        """transformers' modules are not torchtitan's and need not be: nothing here relies on their protocol."""

    def train(self, mode: bool = True):
        super().train(mode)
        for model in self._models():  # no dropout: a resumed run repeats the uninterrupted one
            model.eval()
        return self

    def _models(self) -> list[PreTrainedModel]:
        return [self.lm] if self.teacher is None else [self.lm, self.teacher]

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Buffers and ties, which do not survive the way over the meta device; weights come from the checkpoint."""
        for model in self._models():
            model.tie_weights()
            for name, module in list(model.named_modules()):
                if not any(True for _ in module.buffers(recurse=False)):
                    continue
                if not hasattr(module, "inv_freq"):
                    raise NotImplementedError(f"{name}: {type(module).__name__} has buffers that cannot be made anew")
                device = module.inv_freq.device
                model.set_submodule(name, type(module)(model.config).to(device))

    def compile_blocks(self, backend: str, *, whole: bool = False) -> None:
        """Every layer by torch.compile, from its next call on."""
        compile_blocks(self.layers, backend, fullgraph=whole)

    def forward(self, tokens_BT: torch.Tensor, chosen_BT: torch.Tensor, chunk: int = 0) -> Scores:
        """Scores of the tokens behind the chosen positions. Rows are padded on the right, which causal attention never
        looks at. chunk: tokens whose logits exist at a time; 0: ``chunk_size``."""
        target_N = tokens_BT.roll(-1, 1)[chosen_BT]
        ours_ND = self.lm.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state[chosen_BT]
        theirs_ND = None
        if self.teacher is not None:
            with torch.no_grad():
                body = self.teacher.base_model
                theirs_ND = body(input_ids=tokens_BT, use_cache=False).last_hidden_state[chosen_BT]
        size = chunk or chunk_size(self.lm.config.vocab_size, tokens_BT.device.type)
        sums = [ours_ND.sum().float() * 0] * 3  # a rank without a scored token takes part in the backward pass too
        for start in range(0, len(target_N), size):
            part = slice(start, start + size)
            theirs_CD = None if theirs_ND is None else theirs_ND[part]
            found = checkpoint(self._scores, ours_ND[part], theirs_CD, target_N[part], use_reentrant=False)
            sums = [a + b for a, b in zip(sums, found, strict=True)]
        return Scores(*sums)

    def _scores(
        self, ours_CD: torch.Tensor, theirs_CD: torch.Tensor | None, target_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_CV = self.lm.get_output_embeddings()(ours_CD).float()
        kl = logits_CV.new_zeros(())
        if theirs_CD is not None and self.teacher is not None:
            with torch.no_grad():
                teacher_CV = self.teacher.get_output_embeddings()(theirs_CD).float()
            found = soft_cross_entropy(logits_CV, teacher_CV)
            kl = (found.cross_entropy_N - found.teacher_entropy_N).sum()
        right = (logits_CV.detach().argmax(-1) == target_C).sum().float()
        return cross_entropy(logits_CV, target_C, reduction="sum"), kl, right

    def drift(self, step: int) -> torch.Tensor:
        """Mean squared cosine between the invariants of model and teacher: ``PAIRS`` projections and ``ROWS`` rows of
        the table, drawn by ``step``. Differentiable; the same on every rank, where it is collective.

        The teacher's gains are folded into its projections, as an attacker would, and the model's are scalar.
        """
        assert self.teacher is not None
        draw = random.Random(step)
        family = FAMILIES[self.lm.config.model_type]
        places = [(index, module) for index in range(len(self.layers)) for module in family.linears]
        found = []
        for index, module in draw.sample(places, min(PAIRS, len(places))):
            rule = family.linears[module]
            ours, theirs = (projection(model, family, index, module, rule) for model in (self.lm, self.teacher))
            found.append(gram_cosine(ours, theirs, reads=rule.reads == "residual"))
        rows_S = draw.sample(range(self.lm.config.vocab_size), min(ROWS, self.lm.config.vocab_size))
        ours_SD, theirs_SD = (
            whole(model.get_input_embeddings().get_parameter("weight"))[rows_S] for model in self._models()
        )
        found.append(table_cosine(ours_SD, theirs_SD))
        return torch.stack(found).square().mean()


def _bare(hf: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(hf, dtype=torch.float32, attn_implementation="sdpa")


def layers_of(lm: PreTrainedModel) -> nn.ModuleList:
    body = lm.base_model
    found = body.layers if hasattr(body, "layers") else body.h
    assert isinstance(found, nn.ModuleList)
    return found


def whole(weight: torch.Tensor) -> torch.Tensor:
    """Of a shard, the tensor; differentiable. Collective."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def projection(lm: PreTrainedModel, family: Family, index: int, module: str, rule: Linear) -> torch.Tensor:
    """(out, in), with the gain of the norm before it."""
    layer = layers_of(lm)[index]
    weight = whole(layer.get_submodule(module).get_parameter("weight"))
    weight = weight.T if family.transposed else weight
    return weight * whole(layer.get_submodule(rule.norm).get_parameter("weight")) if rule.norm else weight


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
    for layer in (*model.layers, *(layers_of(model.teacher) if model.teacher is not None else ())):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    disable_fsdp_gradient_division(model)  # the loss is a sum over the global batch divided by its count
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    return model
