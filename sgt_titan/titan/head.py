"""lm_head as a module that gives the loss instead of logits.

FSDP gathers lm_head's weight when the module is called. Everything that needs it happens in that call, the student's
gradient included, and its results carry no graph: the weight is freed at once and not gathered again for the backward
pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.protocols.module import Module

from sgt_titan.objectives.distillation import EAGER, Distilled, distil
from sgt_titan.objectives.top_k import Targets


class DistillationHead(Module):
    """Hidden states of both streams to ``Distilled``; ``block`` is the trunk's lm_head."""

    def __init__(self, block: Module):
        super().__init__()
        self.block, self.kernels = block, EAGER

    @property
    def weight(self) -> torch.Tensor:
        """lm_head's own: torchtitan ties an embedding table to it by this name."""
        return self.block.weight

    @torch.no_grad()
    def forward(
        self,
        student_ND: torch.Tensor,
        teacher_ND: torch.Tensor | None,
        *,
        chunk: int,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        want_gradient: bool,
        targets: Targets | None = None,
        keep: int = 0,
    ) -> Distilled:
        """Local tensors in and out; ``group`` holds the ranks that share the vocabulary. See ``distil``."""
        weight_VD = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return distil(
            student_ND,
            teacher_ND,
            weight_VD,
            chunk=chunk,
            group=group,
            vocab_start=vocab_start,
            want_gradient=want_gradient,
            targets=targets,
            keep=keep,
            kernels=self.kernels,
        )
