"""Learning-rate factors as functions of the run's progress in [0, 1] (steps done / total steps)."""

import math
from collections.abc import Sequence


def cosine(progress: float) -> float:
    """½(1 + cos(π·progress)): from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def step(progress: float, milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> float:
    """factor^k after the k-th milestone (a fraction of the run)."""
    return factor ** sum(progress >= milestone for milestone in milestones)


def constant(progress: float) -> float:
    """1."""
    return 1.0
