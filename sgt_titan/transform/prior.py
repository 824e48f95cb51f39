"""The learned priors of the rate, as an export carries them; what they mean: objectives/rate.py.

    prior.logit (1,)                          of pi_0
    prior.gain, prior.shift, prior.log_std    (D,): a, b / scale, ln(s / scale)
    prior.log_frequency (V,)                  ln p_v of the training data's obfuscated tokens
    prior.body..., prior.down (R, D), prior.up (V, R)    context: a causal network over what was released before

Legend: B rows, T tokens, D width, V vocabulary, R rank of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sgt_titan.objectives.rate import learned_rate, token_log_probability
from sgt_titan.transform.configuration import SGTConfig


class Prior(nn.Module):
    """``pi_0 N(0, tau^2) + (1 - pi_0) sum_v p_v N(a e_v + b, s^2)``, p_v fixed or from the context."""

    def __init__(self, config: SGTConfig, decoder: Callable[..., nn.Module]):
        super().__init__()
        self.scale = config.scale
        self.logit = nn.Parameter(torch.empty(1))
        self.gain, self.shift, self.log_std = (nn.Parameter(torch.empty(config.hidden_size)) for _ in range(3))
        self.register_buffer("log_frequency", torch.empty(config.vocab_size))
        self.body = decoder(config, config.context_layers) if config.rate_prior == "context" else None
        if self.body is not None:
            self.down = nn.Parameter(torch.empty(config.context_rank, config.hidden_size))
            self.up = nn.Parameter(torch.empty(config.vocab_size, config.context_rank))

    log_frequency: torch.Tensor
    body: Any  # a transformers decoder, or None

    def reset(self, init: Any) -> None:
        """Half broad, half tokens at their own embeddings, all tokens alike; for a module without a checkpoint."""
        init.ones_(self.gain)
        for zero in (self.logit, self.shift, *(() if self.body is None else (self.down, self.up))):
            init.zeros_(zero)
        init.constant_(self.log_std, math.log(0.3))
        init.constant_(self.log_frequency, -math.log(self.log_frequency.numel()))

    def rate(
        self,
        broad_BT: torch.Tensor,
        x_BTD: torch.Tensor,
        center_BTD: torch.Tensor,
        log_std_BTD: torch.Tensor,
        log_p_BT: torch.Tensor,
    ) -> torch.Tensor:
        """The bound of each position, (B, T) nats, from that of the broad component."""
        return learned_rate(
            broad_BT,
            x_BTD,
            center_BTD,
            log_std_BTD,
            log_p_BT,
            gain_D=self.gain.float(),
            shift_D=self.shift.float(),
            prior_log_std_D=self.log_std.float(),
            logit=self.logit[0].float(),
            scale=self.scale,
        )

    def log_probability(
        self, z_BTD: torch.Tensor, tokens_BT: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """ln p of each token, (B, T) float32: of its frequency, or given what was released before it."""
        if self.body is None:
            return self.log_frequency.float()[tokens_BT]
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden_BTD = self.body(
            inputs_embeds=z_BTD.to(self.down.dtype), attention_mask=attention_mask, position_ids=positions
        ).last_hidden_state
        before_BTD = F.pad(hidden_BTD.float(), (0, 0, 1, 0))[:, :-1]
        features_BTR = before_BTD @ self.down.float().T
        up_VR, log_frequency_V = self.up.float(), self.log_frequency.float()
        rows = [  # a row at a time: (T, V) logits
            token_log_probability(features_TR, up_VR, log_frequency_V, tokens_T)
            for features_TR, tokens_T in zip(features_BTR, tokens_BT, strict=True)
        ]
        return torch.stack(rows)
