"""A run under node failures, event by event: what share of the time is training that counts.

``interval.saving`` gives the same by a formula, to first order. Here failures may come while a run is starting, may hit
a save that is being written, and are as many as they happen to be, so that there is an interval beside the mean.

An attempt is: notice (until somebody knows that the one before is dead), requeue, preflight, start; then cycles of work
and the stall of a save. A save counts once it is written, beside the work of the next cycle. A failure ends the attempt
and takes the work since the last save that counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

RUNS = 400
MOST_ATTEMPTS = 100_000  # of one run, after which it counts as one that does not end

Gaps = Callable[[random.Random], float]  # seconds from the beginning of an attempt to its failure


@dataclass(frozen=True)
class Conditions:
    """Seconds, unless said otherwise."""

    work: float  # of training in all
    mtbf: float  # between failures of any of the nodes
    interval: float  # of work between saves
    stall: float  # of a save, in which nothing is trained
    write: float  # from a save's beginning until it counts
    notice: float
    requeue: float
    preflight: float
    start: float

    @property
    def overhead(self) -> float:
        """Of each attempt but the first, which nobody had to notice and requeue."""
        return self.notice + self.requeue + self.preflight + self.start


@dataclass(frozen=True)
class Lived:
    """One simulated run. Seconds."""

    total: float
    lost: float  # work done and not kept
    attempts: int
    in_vain: int  # attempts that ended before a new save counted


@dataclass(frozen=True)
class Goodput:
    """Of many runs: shares of the time."""

    mean: float
    low: float  # 5% of the runs are below
    high: float  # 5% are above
    lost: float  # of the work, done again
    attempts: float
    in_vain: float  # of the attempts


def one_run(c: Conditions, chance: random.Random, gap: Gaps | None = None) -> Lived:
    """Live through one run.

    Args:
        gap: draws the time of an attempt's failure; by default exponential with mean ``c.mtbf``.
    """
    total = lost = kept = 0.0
    attempts = in_vain = 0
    while kept < c.work and attempts < MOST_ATTEMPTS:
        begin = c.preflight + c.start if attempts == 0 else c.overhead
        attempts += 1
        fails = gap(chance) if gap else chance.expovariate(1 / c.mtbf)
        # Noticing and requeueing come before the nodes of the attempt can fail it.
        waited = begin - c.preflight - c.start
        ready = begin - waited
        left = c.work - kept
        whole = int(left / c.interval) - (left % c.interval == 0)  # saves before the last one, which ends the run
        finish = ready + left + whole * c.stall + max(c.stall, c.write)
        if fails >= finish:
            return Lived(total + waited + finish, lost, attempts, in_vain)
        total += waited + fails
        cycle = c.interval + c.stall
        trained = max(0.0, fails - ready)
        cycles = int(trained / cycle)
        done = min(left, cycles * c.interval + min(trained - cycles * cycle, c.interval))
        since_first = trained - c.interval - c.write  # since the attempt's first save has counted
        counted = min(whole, int(since_first / cycle) + 1) if since_first >= 0 else 0
        kept += counted * c.interval
        lost += done - counted * c.interval
        in_vain += not counted
    return Lived(total, lost, attempts, in_vain)


def simulate(c: Conditions, *, seed: int = 0, runs: int = RUNS, gap: Gaps | None = None) -> Goodput:
    """``runs`` runs, each with a generator of its own, so that changed conditions meet the same chances."""
    lived = [one_run(c, random.Random(f"{seed}-{run}"), gap) for run in range(runs)]
    good = sorted(c.work / one.total for one in lived)
    attempts = sum(one.attempts for one in lived)
    return Goodput(
        mean=c.work * runs / sum(one.total for one in lived),
        low=good[int(0.05 * (runs - 1))],
        high=good[int(0.95 * (runs - 1) + 0.5)],
        lost=sum(one.lost for one in lived) / (c.work * runs),
        attempts=attempts / runs,
        in_vain=sum(one.in_vain for one in lived) / attempts,
    )


def knobs(c: Conditions, *, seed: int = 0, runs: int = RUNS) -> list[tuple[str, float]]:
    """What goodput gains by making each condition twice as good, the largest first. Failures: half as many."""
    before = simulate(c, seed=seed, runs=runs).mean

    def changed() -> Iterator[tuple[str, Conditions]]:
        for name in (f.name for f in fields(Conditions) if f.name != "work"):
            factor = 2.0 if name == "mtbf" else 0.5
            yield name, replace(c, **{name: getattr(c, name) * factor})

    gains = [(name, simulate(other, seed=seed, runs=runs).mean - before) for name, other in changed()]
    return sorted(gains, key=lambda pair: -pair[1])


def needed_mtbf(c: Conditions, target: float, *, seed: int = 0, runs: int = RUNS) -> float | None:
    """The shortest time between failures, in seconds, that reaches ``target``; None where none does."""

    def reaches(mtbf: float) -> bool:
        return simulate(replace(c, mtbf=mtbf), seed=seed, runs=runs).mean >= target

    low, high = c.overhead / 4, 1e4 * (c.overhead + c.interval)
    if not reaches(high):
        return None
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high
