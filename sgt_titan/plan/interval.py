"""How often to save, and what failures cost: Young's and Daly's optimum."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from .arithmetic import Plan
from .hardware import HOST_COPY, START_SECONDS, STORAGE

DAY = 86400.0


@dataclass(frozen=True)
class Saving:
    """Seconds, unless said otherwise."""

    stall: float  # for which a save holds up training: the copy to the host; if synchronous, the write as well
    write: float  # until it is on disk and counts; runs beside the training if asynchronous
    mtbf: float  # of all nodes together
    optimum: float  # between saves
    lost_share: float  # of the time, at the optimum: saves, lost work and starts

    def steps(self, seconds_per_step: float) -> int | None:
        """None where nobody knows how long a step takes, as on CPUs."""
        return max(1, round(self.optimum / seconds_per_step)) if seconds_per_step == seconds_per_step else None


def daly(stall: float, mtbf: float) -> float:
    """Seconds of work between saves that waste least.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22 (2006), eq. 37;
    its first term is Young's (CACM 17, 1974).
    """
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return sqrt(2 * stall * mtbf) * (1 + sqrt(ratio) / 3 + ratio / 9) - stall


def saving(plan: Plan, nodes: int, node_mtbf_days: float, *, asynchronous: bool = True) -> Saving:
    """The interval for a plan on ``nodes`` nodes that each fail every ``node_mtbf_days`` days.

    What is lost with a failure is the work since the last save *that was complete*: the write's time comes on top of
    half an interval, and an interval shorter than a write would wait for it.
    """
    per_gpu = plan.checkpoint_bytes / (plan.degrees.fsdp * plan.degrees.tp)
    stall = 0.01 + per_gpu / HOST_COPY
    writers = max(1, plan.degrees.world // plan.degrees.replicas // max(1, plan.degrees.world // nodes))
    write = plan.checkpoint_bytes / (STORAGE * min(writers, nodes))
    if not asynchronous:
        stall += write
    mtbf = node_mtbf_days * DAY / nodes
    optimum = max(daly(stall, mtbf), 2 * write)
    lost = stall / optimum + (optimum / 2 + write + START_SECONDS) / mtbf
    return Saving(stall, write, mtbf, optimum, lost)
