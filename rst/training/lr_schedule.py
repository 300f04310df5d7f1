"""Learning-rate factors as functions of the run's progress in [0, 1] (steps done / total steps)."""

import math
from collections.abc import Callable, Sequence


def cosine(progress: float) -> float:
    """½(1 + cos(π·progress)): from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def step(progress: float, milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> float:
    """factor^k after the k-th milestone (a fraction of the run).

    Raises:
        ValueError: a milestone or the factor is not between 0 and 1 (milestones are not epochs).
    """
    if not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(
            f"lr_schedule.milestones are fractions of the run, between 0 and 1, got {milestones}"
        )
    if not 0 < factor <= 1:
        raise ValueError(f"lr_schedule.factor must be above 0 and at most 1, got {factor}")
    return factor ** sum(progress >= milestone for milestone in milestones)


def constant(progress: float) -> float:
    """1."""
    return 1.0


def with_warmup(factor: Callable[[float], float], warmup: float) -> Callable[[float], float]:
    """A linear ramp from 0 to 1 over the fraction `warmup` of the run, then all of `factor` over the rest."""
    factor(0.0)  # raises for bad options now, not after the warmup

    def ramped(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return factor((progress - warmup) / (1 - warmup))

    return ramped
