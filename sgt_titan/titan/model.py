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
from torch.distributed.tensor import DTensor
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import norm_config
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module
from torchtitan.tools.utils import set_default_dtype

from sgt_titan.config.schema import Rate
from sgt_titan.objectives.distillation import Distilled, attach, compiled_kernels
from sgt_titan.objectives.top_k import Targets
from sgt_titan.objectives.utility import SoftCrossEntropy
from sgt_titan.transform.gaussian import Bounds, moments, obfuscate

from .body import Body
from .compilation import compile_blocks
from .estimator import Denoiser, Estimator
from .flops import model_flops_per_token
from .head import DistillationHead
from .layout import like, local, whole
from .lean import Unfilled
from .pairs import Exchange, PairGroups
from .parallelize import head_sharding, prior_sharding
from .prior import Prior


class Streams(NamedTuple):
    """What one forward pass hands to the loss.

    The first five are float32, and this rank's slice of the sequence under sequence parallelism: ``z`` is x + mu +
    sigma eps where obfuscated, ``x_tilde`` what is sent, after the denoiser. ``soft`` is Eq. 3 at the N positions asked
    for, the same on all tensor-parallel ranks. ``pairs`` are the exchanges of the masks, of x + mu and of log sigma
    within pair groups. ``rate_BT`` is the rate under a learned prior, nats.
    """

    x_BTD: torch.Tensor
    mean_BTD: torch.Tensor
    log_std_BTD: torch.Tensor
    z_BTD: torch.Tensor
    x_tilde_BTD: torch.Tensor
    soft: SoftCrossEntropy
    pairs: list[Exchange]
    targets: Targets | None = None  # the teacher's top k, where they were asked for
    rate_BT: torch.Tensor | None = None


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


class SGTModel(BaseModel):
    """Trunk (frozen, whatever its family) plus estimator (trainable: everything that is learned)."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        trunk: Decoder.Config
        body: Decoder.Config  # of this and the next two, only layers and norm are built
        separate_bodies: bool
        bounds: Bounds
        denoiser: Decoder.Config | None = None
        context: Decoder.Config | None = None
        prior: Rate | None = None  # None: broad, which has nothing to learn
        trunk_dtype: torch.dtype
        enable_sp: bool = True
        chunk_tokens: int = 0  # of the utility loss; 0: automatic

        def update_from_config(self, *, config, **kwargs) -> None:
            """Sequence length and shardings, by torchtitan's own rules for the family."""
            self.enable_sp = config.parallelism.enable_sequence_parallel
            self.trunk.update_from_config(config=config, **kwargs)
            for decoder in filter(None, (self.body, self.denoiser, self.context)):
                decoder.update_from_config(config=config, **kwargs)
                # A decoder's final norm gathers the sequence for lm_head; the heads here work on its shards.
                decoder.norm.sharding_config = norm_config(enable_sp=self.enable_sp)

        def estimator(self) -> Estimator.Config:
            width, scale = self.trunk.dim, self.bounds.scale

            def head(inputs: int = width, bias: bool = True, outputs: int = width) -> Linear.Config:
                return Linear.Config(
                    in_features=inputs,
                    out_features=outputs,
                    bias=bias,
                    sharding_config=head_sharding(self.enable_sp, bias),
                )

            def body(decoder: Decoder.Config) -> Body.Config:
                return Body.Config(layers=decoder.layers, norm=decoder.norm)

            denoiser, prior = None, None
            if self.denoiser is not None:
                denoiser = Denoiser.Config(body=body(self.denoiser), mark=head(1, bias=False), head=head(), scale=scale)
            if self.prior is not None:
                prior = Prior.Config(
                    width=width,
                    vocab=self.trunk.vocab_size,
                    scale=scale,
                    tau=self.prior.tau,
                    rank=self.prior.context_rank,
                    body=None if self.context is None else body(self.context),
                    enable_sp=self.enable_sp,
                    sharding_config=prior_sharding(self.enable_sp),
                )
            return Estimator.Config(
                bodies=[body(self.body)] * (2 if self.separate_bodies else 1),
                mean_head=head(),
                log_std_head=head(),
                gate_head=head(outputs=1) if self.bounds.closed else None,
                denoiser=denoiser,
                prior=prior,
            )

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            return sum(p.numel() for p in model.parameters()), model_flops_per_token(model)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.bounds = config.bounds
        self.enable_sp = config.enable_sp
        with set_default_dtype(config.trunk_dtype), Unfilled():
            self.trunk = config.trunk.build()
        for index, block in self.trunk.layers.items():
            self.trunk.layers[index] = DualStream(block)
        self.trunk.norm, self.trunk.lm_head = DualStream(self.trunk.norm), DistillationHead(self.trunk.lm_head)
        with Unfilled():
            self.estimator = config.estimator().build()
        self.trunk.requires_grad_(False)
        self.tp_mesh: DeviceMesh | None = None

    def train(self, mode: bool = True):
        super().train(mode)
        self.trunk.eval()  # frozen: no router statistics, no dropout
        return self

    def to_empty(self, *, device, recurse: bool = True):
        """torch's, whose ``empty_like`` of what is on the meta device goes by way of sympy."""

        def empty(t: torch.Tensor) -> torch.Tensor:
            plain = not isinstance(t, DTensor) and t.is_contiguous()
            return torch.empty(t.shape, dtype=t.dtype, device=device) if plain else torch.empty_like(t, device=device)

        return self._apply(empty, recurse=recurse)

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

    def compile_blocks(self, backend: str, *, whole: bool = True) -> None:
        """Every layer and the loss by torch.compile, from their next call on; ``whole``: or it is an error."""
        layers = [dual.block for dual in self.trunk.layers.values()]
        trained = [layer for body in self.estimator.every_body() for layer in body.layers.values()]
        compile_blocks([*layers, *trained], backend, fullgraph=whole)
        self.trunk.lm_head.kernels = compiled_kernels(backend)

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
        mean, log_std, gate = self.estimator(embedded, attention_masks, positions_BT)

        x_BTD = local(embedded).float()
        mean_BTD, log_std_BTD = moments(
            x_BTD, local(mean), local(log_std), None if gate is None else local(gate), self.bounds
        )
        part = self.sequence_slice(obfuscate_BT.shape[1])
        mask_BT = obfuscate_BT[:, part]
        z_BTD = obfuscate(x_BTD, mean_BTD, log_std_BTD, noise_BTD, mask_BT)

        exchanges = pairs.start(obfuscate_BT.to(torch.uint8), x_BTD + mean_BTD, log_std_BTD)

        denoiser, prior, x_tilde_BTD, rate_BT = self.estimator.denoiser, self.estimator.prior, z_BTD, None
        z = like(z_BTD.to(embedded.dtype), embedded)
        if denoiser is not None:
            noisy = like(mask_BT[..., None].to(embedded.dtype), embedded)
            cleaned_BTD = z_BTD + local(denoiser(z, noisy, attention_masks, positions_BT)).float()
            x_tilde_BTD = torch.where(mask_BT[..., None], cleaned_BTD, x_BTD)
        if prior is not None:
            # Only where it is read: FSDP's hook would meet its missing gradient with zeros that are no DTensor.
            seen = None if prior.body is None else z
            rate_BT = prior(
                x_BTD, x_BTD + mean_BTD, log_std_BTD, mask_BT, tokens_BT, part, seen, attention_masks, positions_BT
            )

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
        return Streams(x_BTD, mean_BTD, log_std_BTD, z_BTD, x_tilde_BTD, soft, exchanges, distilled.targets, rate_BT)

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


def _leave(parameter: torch.Tensor) -> None:
    """An initialiser for weights that are filled right after."""
