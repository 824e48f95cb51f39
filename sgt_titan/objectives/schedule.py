"""The weight of a loss term over the run."""

from __future__ import annotations


def weight_at(step: int, weight: float, start: float, ramp_steps: int) -> float:
    """The weight at ``step`` (counted from 0) of a linear ramp from ``start`` to ``weight``.

    ``start`` at step 0, ``weight`` from step ``ramp_steps`` on; ``ramp_steps <= 0`` means no ramp. A function of the
    step alone, so a resumed run continues its ramp.
    """
    if step >= ramp_steps or ramp_steps <= 0:
        return weight
    share = max(step, 0) / ramp_steps
    return (1.0 - share) * start + share * weight
