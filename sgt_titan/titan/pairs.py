"""Partners of the mutual-information term, and their exchange between ranks while the trunk is at work.

Where a pair group spans ranks, every rank needs the other ranks' y + mu(y) and log sigma(y), which are known before the
trunk starts, and needs them after it. So the gather is started before the trunk's forward and waited for in the loss;
in the backward pass the sum of the gradients is started in the loss and waited for behind the trunk's backward.
Autograd runs what was recorded last first, which gives that order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


@dataclass
class PairGroups:
    """Where the partners of the mutual-information term are: ``size`` consecutive rows of the global microbatch.

    Attributes:
        size: rows of a group; 1: there are no pairs.
        process_group: the data-parallel ranks that share a group, or None where a rank holds whole groups.
        first: place of this rank's first row in its group (0 where a rank holds whole groups).
    """

    size: int
    process_group: dist.ProcessGroup | None = None
    first: int = 0

    def start(self, *tensors: torch.Tensor) -> list[Exchange]:
        """Begin to gather the rows of the group of each tensor (B, ...); ``Exchange.finish`` gives (G, ...)."""
        return [Exchange(tensor, self.process_group) for tensor in tensors]


def make_pair_groups(size: int, local_batch_size: int, batch_mesh) -> PairGroups:
    """Pair groups for a rank that holds ``local_batch_size`` rows; collective where groups span ranks."""
    if local_batch_size % size == 0:
        return PairGroups(size)
    span = size // local_batch_size
    ranks = batch_mesh.mesh.flatten().tolist()
    mine = dist.get_rank()
    # Every rank of the world must take part in the creation of every group, those of other tensor-parallel slices too.
    everyone: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, ranks)
    result = PairGroups(size)  # replaced: every rank is in one of the chunks
    for members in dict.fromkeys(map(tuple, everyone)):
        for start in range(0, len(members), span):
            chunk = list(members[start : start + span])
            group = dist.new_group(chunk)
            if mine in chunk:
                result = PairGroups(size, group, first=chunk.index(mine) * local_batch_size)
    return result


class Exchange:
    """One tensor on its way to the ranks of a pair group."""

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup | None):
        self.group, self.work = group, None
        self.result = tensor if group is None else _Started.apply(tensor, self)

    def finish(self) -> torch.Tensor:
        """The rows of the whole group, in order; differentiable if the tensor was. To be called once."""
        result, self.result = self.result, None
        return result if self.group is None else _Finished.apply(result, self)


class _Started(torch.autograd.Function):
    """Forward starts the gather. Backward waits for the sum of the gradients, which ``_Finished`` has started."""

    @staticmethod
    def forward(ctx, tensor, exchange):
        ctx.exchange = exchange
        rows = tensor.contiguous()
        gathered = rows.new_empty((exchange.group.size() * rows.shape[0], *rows.shape[1:]))
        exchange.work = dist.all_gather_single(gathered, rows, group=exchange.group, async_op=True)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, whole):
        exchange = ctx.exchange
        exchange.work.wait()
        gradient, exchange.gradient = exchange.gradient, None
        return gradient, None


class _Finished(torch.autograd.Function):
    """Forward waits for the gather. Backward starts to sum the ranks' gradients, each rank keeping its rows."""

    @staticmethod
    def forward(ctx, gathered, exchange):
        ctx.exchange = exchange
        exchange.work.wait()
        return gathered.view_as(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx, whole):
        exchange = ctx.exchange
        whole = whole.contiguous()
        exchange.gradient = whole.new_empty((whole.shape[0] // exchange.group.size(), *whole.shape[1:]))
        exchange.work = dist.reduce_scatter_single(exchange.gradient, whole, group=exchange.group, async_op=True)
        return whole, None  # the place of a gradient; ``_Started`` returns the real one
