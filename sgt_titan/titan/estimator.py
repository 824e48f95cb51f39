"""The trainable half of the composite model. Shape suffixes: B rows, T tokens, D width."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module, ModuleList

from .body import Body
from .prior import Prior


class Denoiser(Module):
    """g of ``sent = z + scale g(z, mask)``: a body that is told where z is noisy, and a linear head. Causal."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        body: Body.Config
        mark: Linear.Config  # 1 -> D: what is added where z is noisy, in units of the table's std
        head: Linear.Config
        scale: float

    def __init__(self, config: Config):
        super().__init__()
        self.scale = config.scale
        self.body = config.body.build()
        self.mark, self.head = config.mark.build(), config.head.build()

    def forward(self, z_BTD, noisy_BT1, attention_masks, positions):
        marked_BTD = z_BTD + self.scale * self.mark(noisy_BT1)
        return self.scale * self.head(self.body(marked_BTD, attention_masks, positions))


class Estimator(Module):
    """What is trained: mu(x) and log sigma(x) of Eq. 1 before their bounds, from one or two bodies and two linear
    heads; the gate, the denoiser and the rate's prior, where there are such.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        bodies: list[Body.Config]
        mean_head: Linear.Config
        log_std_head: Linear.Config
        gate_head: Linear.Config | None = None  # D -> 1
        denoiser: Denoiser.Config | None = None
        prior: Prior.Config | None = None

    def __init__(self, config: Config):
        super().__init__()
        self.bodies = ModuleList(body.build() for body in config.bodies)
        self.mean_head = config.mean_head.build()
        self.log_std_head = config.log_std_head.build()
        self.gate_head = config.gate_head.build() if config.gate_head is not None else None
        self.denoiser = config.denoiser.build() if config.denoiser is not None else None
        self.prior = config.prior.build() if config.prior is not None else None

    def every_body(self) -> list[Body]:
        """All decoders that are trained, in the order in which a step meets them."""
        others = [part.body for part in (self.denoiser, self.prior) if part is not None and part.body is not None]
        return [*self.bodies, *others]

    def forward(self, x_BTD, attention_masks, positions):
        features = [body(x_BTD, attention_masks, positions) for body in self.bodies]
        gate = None if self.gate_head is None else self.gate_head(features[-1])
        return self.mean_head(features[0]), self.log_std_head(features[-1]), gate
