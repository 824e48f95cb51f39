"""The composite model: a frozen torchtitan decoder, and the estimator trained against it.

Shape suffixes: B rows, T tokens, D width, V vocabulary. Under sequence parallelism the tensors of ``Streams`` with a
T hold this rank's slice of the sequence, under tensor parallelism those with a V its slice of the vocabulary;
elsewhere they are whole. They are plain local tensors: DTensors live inside the trunk and the bodies only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import norm_config
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module, ModuleDict, ModuleList
from torchtitan.tools.utils import set_default_dtype

from sgt_titan.transform.gaussian import Bounds, bounded_log_std, bounded_mean, obfuscate

from .parallelize import head_sharding


class Streams(NamedTuple):
    """What one forward pass hands to the loss. ``x``, ``mean``, ``log_std``, ``x_tilde`` are float32."""

    x_BTD: torch.Tensor
    mean_BTD: torch.Tensor
    log_std_BTD: torch.Tensor
    x_tilde_BTD: torch.Tensor
    teacher_logits_BTV: torch.Tensor
    student_logits_BTV: torch.Tensor


class DualStream(Module):
    """One frozen decoder layer for both streams.

    FSDP gathers what a module needs when it is called: one call for two streams is one gather. The teacher leaves
    no activations behind; recomputation, if any, wraps ``block`` and so concerns the student alone.
    """

    def __init__(self, block: Module):
        super().__init__()
        self.block = block

    def forward(self, teacher_BTD, student_BTD, attention_masks, positions):
        with torch.no_grad():
            teacher_BTD = self.block(teacher_BTD, attention_masks, positions)
        return teacher_BTD, self.block(student_BTD, attention_masks, positions)


class Body(Module):
    """Decoder layers and a final norm: (B, T, D) -> (B, T, D), causal."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        layers: list
        norm: RMSNorm.Config

    def __init__(self, config: Config):
        super().__init__()
        self.layers = ModuleDict({str(i): layer.build() for i, layer in enumerate(config.layers)})
        self.norm = config.norm.build()

    def forward(self, h_BTD, attention_masks, positions):
        for layer in self.layers.values():
            h_BTD = layer(h_BTD, attention_masks, positions)
        return self.norm(h_BTD)


class Estimator(Module):
    """mu(x) and log sigma(x) of Eq. 1, before their bounds: one or two bodies and two linear heads."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        bodies: list[Body.Config]
        mean_head: Linear.Config
        log_std_head: Linear.Config

    def __init__(self, config: Config):
        super().__init__()
        self.bodies = ModuleList(body.build() for body in config.bodies)
        self.mean_head = config.mean_head.build()
        self.log_std_head = config.log_std_head.build()

    def forward(self, x_BTD, attention_masks, positions):
        features = [body(x_BTD, attention_masks, positions) for body in self.bodies]
        return self.mean_head(features[0]), self.log_std_head(features[-1])


class SGTModel(BaseModel):
    """Trunk (frozen, whatever its family) plus estimator (trainable)."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        trunk: Decoder.Config
        body: Decoder.Config  # only its layers and its norm are built
        separate_bodies: bool
        bounds: Bounds
        trunk_dtype: torch.dtype
        enable_sp: bool = True

        def update_from_config(self, *, config, **kwargs) -> None:
            """Sequence length and shardings, by torchtitan's own rules for the family."""
            for decoder in (self.trunk, self.body):
                decoder.update_from_config(config=config, **kwargs)
            self.enable_sp = config.parallelism.enable_sequence_parallel
            # A decoder's final norm gathers the sequence for lm_head; the heads here work on its shards.
            self.body.norm.sharding_config = norm_config(enable_sp=self.enable_sp)

        def estimator(self) -> Estimator.Config:
            width = self.trunk.dim

            def head() -> Linear.Config:
                return Linear.Config(
                    in_features=width,
                    out_features=width,
                    bias=True,
                    sharding_config=head_sharding(self.enable_sp),
                )

            body = Body.Config(layers=self.body.layers, norm=self.body.norm)
            return Estimator.Config(
                bodies=[body] * (2 if self.separate_bodies else 1), mean_head=head(), log_std_head=head()
            )

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            from .flops import model_flops_per_token

            return sum(p.numel() for p in model.parameters()), model_flops_per_token(model)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.bounds = config.bounds
        self.enable_sp = config.enable_sp
        with set_default_dtype(config.trunk_dtype):
            self.trunk = config.trunk.build()
        for index, block in self.trunk.layers.items():
            self.trunk.layers[index] = DualStream(block)
        self.estimator = config.estimator().build()
        self.trunk.requires_grad_(False)
        self.tp_mesh: DeviceMesh | None = None

    def train(self, mode: bool = True):
        super().train(mode)
        self.trunk.eval()  # frozen: no router statistics, no dropout
        return self

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Buffers only: the trunk's weights come from its checkpoint, the estimator's from ``initialize``."""
        if self.config.trunk.enable_weight_tying:
            self.trunk.tok_embeddings.weight = self.trunk.lm_head.weight
        for module in self.modules():
            if isinstance(module, Module):
                module._param_init = {name: _leave for name, _ in module.named_parameters(recurse=False)}
        super().init_states(buffer_device=buffer_device)

    def sequence_slice(self, length: int) -> slice:
        """This rank's part of a sequence of ``length`` tokens."""
        if self.tp_mesh is None or not self.enable_sp:
            return slice(0, length)
        part = length // self.tp_mesh.size()
        rank = self.tp_mesh.get_local_rank()
        return slice(rank * part, (rank + 1) * part)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        positions_BT: torch.Tensor,
        attention_masks,
        obfuscate_BT: torch.Tensor,
        noise_BTD: torch.Tensor,
    ) -> Streams:
        """One step of both streams.

        Args:
            tokens_BT: int64, whole sequences on every tensor-parallel rank.
            positions_BT: int64, 0 at the first token of each document.
            attention_masks: what the trunk's attention wants; None for causal attention over the row.
            obfuscate_BT: bool, whole sequences; where x~ replaces x.
            noise_BTD: float32 standard normal, this rank's slice of the sequence.
        """
        trunk = self.trunk
        with torch.no_grad():
            embedded = trunk.tok_embeddings(tokens_BT)
        mean, log_std = self.estimator(embedded, attention_masks, positions_BT)

        x_BTD = local(embedded).float()
        mean_BTD = bounded_mean(local(mean).float(), self.bounds)
        log_std_BTD = bounded_log_std(local(log_std).float(), self.bounds)
        mask_BT = obfuscate_BT[:, self.sequence_slice(obfuscate_BT.shape[1])]
        x_tilde_BTD = obfuscate(x_BTD, mean_BTD, log_std_BTD, noise_BTD, mask_BT)

        teacher = embedded
        student = like(x_tilde_BTD.to(embedded.dtype), embedded)
        for layer in trunk.layers.values():
            teacher, student = layer(teacher, student, attention_masks, positions_BT)
        with torch.no_grad():
            teacher_logits = trunk.lm_head(trunk.norm(teacher))
        student_logits = trunk.lm_head(trunk.norm(student))
        return Streams(x_BTD, mean_BTD, log_std_BTD, x_tilde_BTD, local(teacher_logits), local(student_logits))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, differentiably."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``tensor`` as the local part of a DTensor laid out like ``reference``."""
    if not isinstance(reference, DTensor):
        return tensor
    return DTensor.from_local(tensor, reference.device_mesh, reference.placements, run_check=False)


def _leave(parameter: torch.Tensor) -> None:
    """An initialiser for weights that are filled right after."""
