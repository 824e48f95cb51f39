"""The learned priors of the rate (``objectives/rate.py``): what z is compared with, trained to make the bound tight.

Legend: B rows, T this rank's tokens, D width, V vocabulary, R rank of the context's bottleneck, N hidden tokens, flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchtitan.protocols.module import Module

from sgt_titan.objectives.rate import broad_rate, learned_rate, token_log_probability

from .body import Body
from .layout import local, whole

CHUNK_LOGITS = 1 << 24  # of the context's vocabulary at a time


class Prior(Module):
    """``tokens`` and, with a body, ``context``. All numbers are public and exported.

    logit_1: of pi_0. gain_D, shift_D, log_std_D: a, b / scale and ln(s / scale). log_frequency_V: ln p, from the data.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        width: int
        vocab: int
        scale: float
        tau: float
        rank: int = 0
        body: Body.Config | None = None
        enable_sp: bool = True

    body: Any  # a Body, or None
    log_frequency: torch.Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.scale, self.tau, self.enable_sp = config.scale, config.tau, config.enable_sp
        self.logit = nn.Parameter(torch.empty(1))
        self.gain, self.shift, self.log_std = (nn.Parameter(torch.empty(config.width)) for _ in range(3))
        self.register_buffer("log_frequency", torch.empty(config.vocab))
        self.body = config.body.build() if config.body is not None else None
        if self.body is not None:
            self.down = nn.Parameter(torch.empty(config.rank, config.width))
            self.up = nn.Parameter(torch.empty(config.vocab, config.rank))

    def forward(self, x_BTD, center_BTD, log_std_BTD, mask_BT, tokens_BT, part: slice, z, attention_masks, positions):
        """Rate of each of this rank's positions in nats, (B, T) float32.

        Args:
            x_BTD, center_BTD, log_std_BTD, mask_BT: this rank's slice; float32, and bool.
            tokens_BT: int64, whole rows; ``part`` is the slice.
            z: what the client released, laid out as the trunk's embeddings: only ``context`` looks at it.
        """
        log_p_BT = self._local(self.log_frequency)[tokens_BT[:, part]]
        if self.body is not None:
            log_p_BT = self._context(z, attention_masks, positions, tokens_BT, part, mask_BT)
        return learned_rate(
            broad_rate(center_BTD, log_std_BTD, self.tau * self.scale),
            x_BTD,
            center_BTD,
            log_std_BTD,
            log_p_BT,
            gain_D=self._local(self.gain),
            shift_D=self._local(self.shift),
            prior_log_std_D=self._local(self.log_std),
            logit=self._local(self.logit)[0],
            scale=self.scale,
        )

    def _context(self, z, attention_masks, positions, tokens_BT, part: slice, mask_BT) -> torch.Tensor:
        """ln p(x_t | z_<t) at hidden positions, 0 elsewhere, (B, T)."""
        hidden = self.body(z, attention_masks, positions)
        # Position t is predicted from t - 1, which another rank may hold.
        hidden_BTD = (whole(hidden) if self.enable_sp else local(hidden)).float()
        before_BTD = F.pad(hidden_BTD, (0, 0, 1, 0))[:, :-1][:, part]
        features_NR = before_BTD[mask_BT] @ self._local(self.down).T
        up_VR, targets_N = self._local(self.up), tokens_BT[:, part][mask_BT]
        log_frequency_V = self._local(self.log_frequency)
        size = max(1, CHUNK_LOGITS // up_VR.shape[0])
        pieces = [
            checkpoint(token_log_probability, features, up_VR, log_frequency_V, targets, use_reentrant=False)
            for features, targets in zip(features_NR.split(size), targets_N.split(size), strict=True)
        ]
        log_p_BT = torch.zeros(mask_BT.shape, device=features_NR.device)
        return log_p_BT.masked_scatter(mask_BT, torch.cat(pieces)) if pieces else log_p_BT

    def _local(self, parameter: torch.Tensor) -> torch.Tensor:
        """The whole parameter; under sequence parallelism each rank's gradient is a part of the sum."""
        if not isinstance(parameter, DTensor):
            return parameter
        kind = Partial() if self.enable_sp else Replicate()
        return parameter.to_local(grad_placements=[kind] * parameter.device_mesh.ndim)
