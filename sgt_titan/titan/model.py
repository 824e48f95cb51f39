"""The composite model: a frozen torchtitan decoder, and the estimator trained against it.

Shape suffixes: B rows, T tokens, D width. What ``Streams`` holds are plain local tensors: DTensors live inside the
trunk and the bodies only. N counts the positions whose next-token distribution has to survive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import norm_config
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module, ModuleDict, ModuleList
from torchtitan.tools.utils import set_default_dtype

from sgt_titan.objectives.distillation import Distilled, attach
from sgt_titan.objectives.top_k import Targets
from sgt_titan.objectives.utility import SoftCrossEntropy
from sgt_titan.transform.gaussian import Bounds, bounded_log_std, bounded_mean, obfuscate

from .head import DistillationHead
from .pairs import Exchange, PairGroups
from .parallelize import head_sharding


class Streams(NamedTuple):
    """What one forward pass hands to the loss.

    The first four are float32, and this rank's slice of the sequence under sequence parallelism. ``soft`` is Eq. 3 at
    the N positions asked for, the same on all tensor-parallel ranks. ``pairs`` are the exchanges of the masks,
    of x + mu and of log sigma within pair groups.
    """

    x_BTD: torch.Tensor
    mean_BTD: torch.Tensor
    log_std_BTD: torch.Tensor
    x_tilde_BTD: torch.Tensor
    soft: SoftCrossEntropy
    pairs: list[Exchange]
    targets: Targets | None = None  # the teacher's top k, where they were asked for


class DualStream(Module):
    """One frozen decoder layer, or the final norm, for both streams.

    FSDP gathers what a module needs when it is called: one call for two streams is one gather. The teacher leaves
    no activations behind; recomputation, if any, wraps ``block`` and so concerns the student alone.
    """

    def __init__(self, block: Module):
        super().__init__()
        self.block = block

    def forward(self, teacher_BTD, student_BTD, *args):
        if teacher_BTD is not None:
            with torch.no_grad():
                teacher_BTD = self.block(teacher_BTD, *args)
        return teacher_BTD, self.block(student_BTD, *args)


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
        chunk_tokens: int = 0  # of the utility loss; 0: automatic

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
        self.trunk.norm, self.trunk.lm_head = DualStream(self.trunk.norm), DistillationHead(self.trunk.lm_head)
        self.estimator = config.estimator().build()
        self.trunk.requires_grad_(False)
        self.tp_mesh: DeviceMesh | None = None

    def train(self, mode: bool = True):
        super().train(mode)
        self.trunk.eval()  # frozen: no router statistics, no dropout
        return self

    def tie(self) -> None:
        """One parameter for a tied table and lm_head: sharding and ``to_empty`` make two of them."""
        if self.config.trunk.enable_weight_tying:
            self.trunk.tok_embeddings.weight = self.trunk.lm_head.weight

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Buffers only: the trunk's weights come from its checkpoint, the estimator's from ``initialize``."""
        self.tie()
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
        utility_BT: torch.Tensor,
        noise_BTD: torch.Tensor,
        pairs: PairGroups,
        targets: Targets | None = None,
        keep: int = 0,
    ) -> Streams:
        """One step of both streams.

        Args:
            tokens_BT: int64, whole sequences on every tensor-parallel rank.
            positions_BT: int64, 0 at the first token of each document.
            attention_masks: what the trunk's attention wants; None for causal attention over the row.
            obfuscate_BT: bool, whole sequences; where x~ replaces x.
            utility_BT: bool, whole sequences; where Eq. 3 is wanted.
            noise_BTD: float32 standard normal, this rank's slice of the sequence.
            targets: what the teacher said before at the positions of ``utility_BT``: it is not asked again.
            keep: how many of the teacher's most probable tokens ``Streams.targets`` shall hold; 0: no targets.
            pairs: with whom rows are exchanged for the MI term; the exchange goes on while the trunk works.
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

        exchanges = pairs.start(obfuscate_BT.to(torch.uint8), x_BTD + mean_BTD, log_std_BTD)

        teacher = embedded if targets is None else None
        student = like(x_tilde_BTD.to(embedded.dtype), embedded)
        for layer in trunk.layers.values():
            teacher, student = layer(teacher, student, attention_masks, positions_BT)
        teacher, student = trunk.norm(teacher, student)
        student_ND = whole(student)[utility_BT]
        distilled = self.distil(
            None if teacher is None else whole(teacher)[utility_BT], student_ND, targets=targets, keep=keep
        )
        soft = attach(distilled, student_ND)
        return Streams(x_BTD, mean_BTD, log_std_BTD, x_tilde_BTD, soft, exchanges, distilled.targets)

    def distil(self, teacher_ND: torch.Tensor | None, student_ND: torch.Tensor, **options) -> Distilled:
        """Eq. 3 at some positions, in chunks of tokens and with the vocabulary split over tensor parallelism."""
        group, vocab_start = None, 0
        if self.tp_mesh is not None:
            shard = -(-self.config.trunk.vocab_size // self.tp_mesh.size())
            group, vocab_start = self.tp_mesh.get_group(), shard * self.tp_mesh.get_local_rank()
        return self.trunk.lm_head(
            student_ND,
            teacher_ND,
            chunk=self.config.chunk_tokens,
            group=group,
            vocab_start=vocab_start,
            want_gradient=student_ND.requires_grad,
            **options,
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, differentiably."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's value on every rank; the ranks' gradients with respect to it are parts of a sum."""
    if not isinstance(tensor, DTensor):
        return tensor
    everywhere = [Replicate()] * tensor.device_mesh.ndim
    return tensor.redistribute(placements=everywhere).to_local(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``tensor`` as the local part of a DTensor laid out like ``reference``."""
    if not isinstance(reference, DTensor):
        return tensor
    return DTensor.from_local(tensor, reference.device_mesh, reference.placements, run_check=False)


def _leave(parameter: torch.Tensor) -> None:
    """An initialiser for weights that are filled right after."""
