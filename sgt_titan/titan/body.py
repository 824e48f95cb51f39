"""A short causal decoder of the trunk's family: what estimator, denoiser and prior are made of."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.protocols.module import Module, ModuleDict


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
