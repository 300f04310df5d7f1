"""When to take a SAM step: the scheduling functions p(t), the coin, and what they cost.

`schedule(step, total_steps)` is the probability that step `step` (0-based, counted before the update) of
`total_steps` is a SAM step. The families are those of "Randomized Sharpness-Aware Training"
(arXiv 2203.09962): constant, piecewise, linear and trigonometric. Any callable of that signature is a
schedule too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Self

from rst.draws import draw

Schedule = Callable[[int, int], float]


def uniform(seed: int, step: int) -> float:
    """The coin of `step`, uniform on [0, 1): the step is a SAM step iff `uniform(seed, step) < p(step)`.

    A stateless function of its arguments, the same in every process. So a run resumes anywhere, all ranks
    agree, and for one seed the SAM steps of a smaller p(t) are a subset of those of a larger one.
    """
    return (draw(seed, "coin", step) >> 11) * 2.0**-53


def _check_unit_interval(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, float | Real) or not 0.0 <= value <= 1.0:
            raise ValueError(f"the schedule's {name} must be a number in [0, 1], got {value!r}")


@dataclass(frozen=True)
class Constant:
    """p(t) = p."""

    p: float

    def __post_init__(self) -> None:
        _check_unit_interval(p=self.p)

    def __call__(self, step: int, total_steps: int) -> float:
        return self.p

    def moments(self, total_steps: int) -> tuple[float, float]:
        return total_steps * self.p, total_steps * self.p**2

    @classmethod
    def with_mean(cls, p: float, rising: bool = True) -> Self:
        """Constant(p), which has no direction: `rising` is there so that one sweep covers every family."""
        return cls(p)


@dataclass(frozen=True)
class Piecewise:
    """p(t) = before while t ≤ boundary·T, then after. The first "after" step is ⌊boundary·T⌋ + 1.

    Args:
        boundary: where the switch lies, as a fraction of the run.
    """

    before: float
    after: float
    boundary: float

    def __post_init__(self) -> None:
        _check_unit_interval(before=self.before, after=self.after, boundary=self.boundary)

    def __call__(self, step: int, total_steps: int) -> float:
        return self.before if step <= self.boundary * total_steps else self.after

    def moments(self, total_steps: int) -> tuple[float, float]:
        n_before = min(total_steps, math.floor(self.boundary * total_steps) + 1)
        n_after = total_steps - n_before
        return (
            n_before * self.before + n_after * self.after,
            n_before * self.before**2 + n_after * self.after**2,
        )

    @classmethod
    def with_mean(cls, p: float, rising: bool = True) -> Self:
        """All SAM steps in one stretch of mean p: the last p·T steps (rising) or the first (falling).

        The boundary step belongs to "before", so a count may be one step off p·T; p = 0 and p = 1 are
        exact, as they have no switch.
        """
        _check_unit_interval(p=p)
        if p in (0.0, 1.0):
            return cls(p, p, 1.0)
        return cls(0.0, 1.0, 1.0 - p) if rising else cls(1.0, 0.0, p)


@dataclass(frozen=True)
class Linear:
    """p(t) = start + (end − start)·t/T."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_unit_interval(start=self.start, end=self.end)

    def __call__(self, step: int, total_steps: int) -> float:
        return self.start + (self.end - self.start) * (step / total_steps)

    def moments(self, total_steps: int) -> tuple[float, float]:
        # Σ t/T and Σ (t/T)² over t = 0 … T−1.
        first = (total_steps - 1) / 2
        second = (total_steps - 1) * (2 * total_steps - 1) / (6 * total_steps)
        slope = self.end - self.start
        return (
            total_steps * self.start + slope * first,
            total_steps * self.start**2 + 2 * self.start * slope * first + slope**2 * second,
        )

    @classmethod
    def with_mean(cls, p: float, rising: bool = True) -> Self:
        """The steepest line of mean p that stays in [0, 1]: between max(0, 2p−1) and min(1, 2p)."""
        return cls(*_ends(p, rising))


@dataclass(frozen=True)
class Cosine:
    """p(t) = ½(start + end) + ½(start − end)·cos(πt/T).

    Our reading of the paper's trigonometric family, whose form its sources do not give.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_unit_interval(start=self.start, end=self.end)

    def __call__(self, step: int, total_steps: int) -> float:
        wave = math.cos(math.pi * step / total_steps)
        return 0.5 * (self.start + self.end) + 0.5 * (self.start - self.end) * wave

    def moments(self, total_steps: int) -> tuple[float, float]:
        middle, amplitude = 0.5 * (self.start + self.end), 0.5 * (self.start - self.end)
        # Over t = 0 … T−1, cos(πt/T) sums to 1 (t and T−t cancel) and its square to T/2 (to 1 for T = 1).
        squares = total_steps / 2 if total_steps > 1 else 1.0
        return (
            total_steps * middle + amplitude,
            total_steps * middle**2 + 2 * middle * amplitude + amplitude**2 * squares,
        )

    @classmethod
    def with_mean(cls, p: float, rising: bool = True) -> Self:
        """Half a cosine wave of mean p between max(0, 2p−1) and min(1, 2p)."""
        return cls(*_ends(p, rising))


@dataclass(frozen=True)
class Periodic:
    """p(t) = 1 at every `every`-th step (t = 0, every, 2·every, …), else 0. No coin decides."""

    every: int

    def __post_init__(self) -> None:
        if not isinstance(self.every, int | Integral) or self.every < 1:
            raise ValueError(f"the schedule's every must be a whole number of steps ≥ 1, got {self.every!r}")

    def __call__(self, step: int, total_steps: int) -> float:
        return 1.0 if step % self.every == 0 else 0.0

    def moments(self, total_steps: int) -> tuple[float, float]:
        n_sam = float(-(-total_steps // self.every))
        return n_sam, n_sam


@dataclass(frozen=True)
class Warmup:
    """Plain steps for the first `steps` of a run, then `schedule`, which counts from step 0 all the same."""

    schedule: Schedule
    steps: int

    def __call__(self, step: int, total_steps: int) -> float:
        return 0.0 if step < self.steps else self.schedule(step, total_steps)

    def moments(self, total_steps: int) -> tuple[float, float]:
        total, squares = _moments(self.schedule, total_steps)
        left_out = [self.schedule(step, total_steps) for step in range(min(self.steps, total_steps))]
        return total - math.fsum(left_out), squares - math.fsum(p * p for p in left_out)


def _ends(p: float, rising: bool) -> tuple[float, float]:
    _check_unit_interval(p=p)
    low, high = max(0.0, 2 * p - 1), min(1.0, 2 * p)
    return (low, high) if rising else (high, low)


# The presets of the authors' code, whose p is not always the mean.


def piecewise1(p: float) -> Piecewise:
    """0 while t ≤ pT, then 1: mean 1 − p."""
    return Piecewise(before=0.0, after=1.0, boundary=p)


def piecewise2(p: float) -> Piecewise:
    """1 while t ≤ pT, then 0: mean p."""
    return Piecewise(before=1.0, after=0.0, boundary=p)


def piecewise3(p: float) -> Piecewise:
    """p while t ≤ T/2, then 1 − p: mean ½."""
    return Piecewise(before=p, after=1.0 - p, boundary=0.5)


def linear1(p: float) -> Linear:
    """0 → 2p for p ≤ ½, 2p − 1 → 1 for p > ½: mean p."""
    return Linear.with_mean(p)


def linear2(p: float) -> Linear:
    """p → 1 − p: mean ½."""
    return Linear(start=p, end=1.0 - p)


def _moments(schedule: Schedule, total_steps: int) -> tuple[float, float]:
    """Σ p(t) and Σ p(t)² over t = 0 … T−1: in closed form where the schedule has one, else summed."""
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if hasattr(schedule, "moments"):
        return schedule.moments(total_steps)
    p = [schedule(step, total_steps) for step in range(total_steps)]
    return math.fsum(p), math.fsum(x * x for x in p)


def expected_propagations(schedule: Schedule, total_steps: int) -> float:
    """Expected number of propagations (forward-backward pairs) of a run: T + Σ p(t).

    Divided by T it is the expected *average propagation count* η̂ = 1 + mean p, between 1 (SGD) and 2 (SAM).
    """
    return total_steps + _moments(schedule, total_steps)[0]


def propagations_std(schedule: Schedule, total_steps: int) -> float:
    """Standard deviation of a run's propagations: √Σ p(t)(1 − p(t)), as the coins are independent."""
    total, squares = _moments(schedule, total_steps)
    return math.sqrt(max(0.0, total - squares))
