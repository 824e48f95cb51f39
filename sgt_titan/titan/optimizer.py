"""AdamW that refuses a non-finite step, on all ranks at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.tools.logging import logger

from sgt_titan.config import schema


class NonFiniteError(RuntimeError):
    """Too many steps in a row with a non-finite loss or gradient."""


class GuardedOptimizers(OptimizersContainer):
    """Skips ``step`` where a loss or a gradient of any rank is not finite, counts it, and gives up after too many.

    A skipped step leaves weights and moments as they were, so no checkpoint ever holds what a NaN touched.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        max_skipped: int = 10

    def __init__(self, config: Config, *, model_parts) -> None:
        super().__init__(config, model_parts=model_parts)
        self.max_skipped = config.max_skipped
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._loss_is_finite: torch.Tensor | None = None

    def observe(self, loss: torch.Tensor) -> None:
        """Remember whether a microbatch's loss was finite, without waiting for it."""
        finite = torch.isfinite(loss.detach()).all()
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite

    def all_finite(self) -> bool:
        """The same answer on every rank."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        local = [g._local_tensor if isinstance(g, DTensor) else g for g in grads]
        device = local[0].device if local else torch.device("cpu")
        # A norm reads a gradient once, where isfinite reads it five times. It is not finite where one of them is not,
        # nor where their squares overflow, which clipping to a norm could make nothing of either.
        norm = torch.nn.utils.get_total_norm([g for g in local if g.numel()]).to(device)
        finite = [torch.isfinite(norm)]
        if self._loss_is_finite is not None:
            finite.append(self._loss_is_finite)
        self._loss_is_finite = None
        flag = torch.stack(finite).all().to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def step(self, closure=None) -> None:
        if self.all_finite():
            self.skipped_in_a_row = 0
            super().step(closure)
            return
        # torchtitan's optimizer state leaves out moments that do not exist yet where gradients are left over.
        self.zero_grad()
        self.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning(f"Non-finite loss or gradient: step skipped on all ranks ({self.skipped_in_a_row} in a row)")
        if self.skipped_in_a_row >= self.max_skipped:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient "
                "(training.max_nonfinite_steps); the last checkpoint is from before them"
            )


def adamw(pattern: str, options: schema.Optimizer, weight_decay: float) -> ParamGroupConfig:
    """AdamW for the parameters whose names match."""
    kwargs = {
        "lr": options.lr,
        "betas": (options.beta1, options.beta2),
        "eps": options.eps,
        "weight_decay": weight_decay,
    }
    return ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=kwargs)


def guarded_adamw(groups: list[ParamGroupConfig], max_skipped: int, *, fused: bool) -> GuardedOptimizers.Config:
    implementation = "fused" if fused else "foreach"
    return GuardedOptimizers.Config(param_groups=groups, implementation=implementation, max_skipped=max_skipped)


def optimizer_config(options: schema.Optimizer, max_skipped: int, *, fused: bool) -> GuardedOptimizers.Config:
    """AdamW with weight decay on the bodies' matrices only: decayed heads would drift to zero, which means no noise
    beyond ``std_init`` and no mean; a prior is fitted, not regularised.
    """
    groups = [
        adamw(r"head\.(weight|bias)$|norm\.weight$|\.bias$|mark\.weight$|prior\.[a-z_]+$", options, 0.0),
        adamw(r"estimator\.", options, options.weight_decay),
    ]
    return guarded_adamw(groups, max_skipped, fused=fused)
