"""Having to stop: what one rank hears or finds out ends all of them at the same step boundary.

Schedulers announce the end of a job by a signal (time limit, preemption), and not to every rank at the same moment. A
rank that stopped alone would leave the others in a collective. So ranks exchange what they have heard once a step, over
gloo and beside the step's own work, and all act on the answer at the same boundary, at most one step after the signal.
What else a rank may find out alone goes the same way: a lost directory, a checkpoint that could not be written.
"""

from __future__ import annotations

import signal
from enum import IntEnum

import torch
import torch.distributed as dist

from sgt_titan.cluster import notice


class Reason(IntEnum):
    """Why a run is asked to stop; where ranks heard different things, the larger counts."""

    NONE = 0
    USR1 = 1  # the launch script's notice: the time limit is near
    TERM = 2  # the scheduler's: preemption, node going down, the end
    LOST = 3  # another attempt has taken the output directory: end without saving
    UNSAVED = 4  # writing a checkpoint has failed somewhere: end with its error


SIGNALS = {signal.SIGUSR1: Reason.USR1, signal.SIGTERM: Reason.TERM}


class StopRequest:
    """Listens for ``SIGNALS`` from construction until ``close``.

    ``begin`` at the start of a step, ``agreed`` at its end, on every rank. Collective, over a gloo group of all ranks
    that is made here.
    """

    def __init__(self) -> None:
        self.heard = max((SIGNALS[number] for number in notice.heard), default=Reason.NONE)
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, frame: object) -> None:
        self.heard = max(self.heard, SIGNALS[signal.Signals(number)])

    def begin(self, known: Reason = Reason.NONE) -> None:
        """Start the exchange of what was heard until now, or is ``known`` to this rank; it runs beside the step."""
        flag = torch.tensor(int(max(known, self.heard)), dtype=torch.int32)
        self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> Reason:
        """What all ranks know, the same on each: NONE to go on."""
        if self._pending is None:
            return Reason.NONE
        flag, work = self._pending
        self._pending = None
        work.wait()
        return Reason(int(flag))

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
