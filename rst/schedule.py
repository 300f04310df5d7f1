"""When to take a SAM step: the scheduling functions p(t), the coin, and what they cost.

`schedule(step, total_steps)` is the probability that step `step` (0-based, counted before the update) of
`total_steps` is a SAM step. The families of "Randomized Sharpness-Aware Training" (arXiv 2203.09962) are
constant, piecewise, linear and trigonometric; `Periodic` and `Window` are for comparisons. All take a numpy
array of steps, too, and return an array. Any callable with this signature is a schedule, whether or not it
takes arrays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, Self

import numpy as np

from rst.draws import draw

Schedule = Callable[[int, int], float]
Sampling = Literal["independent", "systematic"]
Steps = int | np.ndarray
UNIT = 2**53  # of probabilities as whole numbers


def uniform(seed: int, step: int) -> float:
    """The coin of `step`, uniform on [0, 1): the step is a SAM step iff `uniform(seed, step) < p(step)`.

    A stateless function of its arguments, the same in every process. So a run can resume anywhere, all ranks
    agree, and for a given seed the SAM steps of a smaller p(t) are a subset of those of a larger one.
    """
    return (draw(seed, "coin", step) >> 11) * 2.0**-53


def probability(schedule: Schedule, step: int, total_steps: int) -> float:
    """p(step). Raises ValueError where it is none, and past the end of the run."""
    if step >= total_steps:
        raise ValueError(f"step {step + 1} is past the end of the run: total_steps={total_steps}")
    p = schedule(step, total_steps)
    if not -1e-9 <= p <= 1 + 1e-9:
        raise ValueError(f"the schedule gave p = {p} at step {step}, which is no probability")
    return p


class Independent:
    """Decides by a coin per step, see `uniform`."""

    def __init__(self, schedule: Schedule, total_steps: int, seed: int) -> None:
        self.schedule, self.total_steps, self.seed = schedule, total_steps, seed

    def __call__(self, step: int) -> bool:
        """Whether `step` is a SAM step."""
        return uniform(self.seed, step) < probability(self.schedule, step, self.total_steps)


class Systematic(Independent):
    """Decides by systematic sampling: with S_t = Σ_{s≤t} p(s) and one offset U for the run,
    uniform on [0, 1), step t is a SAM step iff ⌊S_t + U⌋ > ⌊S_{t−1} + U⌋.

    It is one with probability p(t), too, but the SAM steps of any stretch of the run are within 1 of their
    expected number. The sums are of whole numbers, so that a run decides alike however it is resumed.
    """

    def __init__(self, schedule: Schedule, total_steps: int, seed: int) -> None:
        super().__init__(schedule, total_steps, seed)
        self._rewind()

    def __call__(self, step: int) -> bool:
        if step < self._step:
            self._rewind()
        while self._step < step:
            self._sum += self._p(self._step)
            self._step += 1
        return (self._sum + self._p(step)) // UNIT > self._sum // UNIT

    def _rewind(self) -> None:
        self._step, self._sum = 0, draw(self.seed, "offset") >> 11  # S_{step−1} + U

    def _p(self, step: int) -> int:
        return round(min(max(probability(self.schedule, step, self.total_steps), 0.0), 1.0) * UNIT)


def decider(sampling: str, schedule: Schedule, total_steps: int, seed: int) -> Independent:
    """What decides which steps are SAM steps. Raises ValueError for an unknown sampling or a bad seed."""
    uniform(seed, 0)  # refuses a bad seed now, not at the first step
    if sampling not in ("independent", "systematic"):
        raise ValueError(f"sampling must be 'independent' or 'systematic', got {sampling!r}")
    return (Systematic if sampling == "systematic" else Independent)(schedule, total_steps, seed)


def expected_propagations(schedule: Schedule, total_steps: int) -> float:
    """Expected number of propagations (forward-backward pairs) in a run: T + Σ p(t).

    Divided by T it is the expected *average propagation count* η̂ = 1 + mean p, between 1 (SGD) and 2 (SAM).

    Raises:
        ValueError: `total_steps` is less than 1.
    """
    return total_steps + math.fsum(probabilities(schedule, total_steps))


def propagations_std(schedule: Schedule, total_steps: int, sampling: Sampling = "independent") -> float:
    """Standard deviation of a run's number of propagations: √Σ p(t)(1 − p(t)) for independent coins, and for
    systematic sampling √r(1 − r), r being the fractional part of Σ p(t).

    Raises:
        ValueError: `total_steps` is less than 1.
    """
    p = probabilities(schedule, total_steps)
    if sampling == "systematic":
        p = np.array([math.fsum(p) % 1.0])
    return math.sqrt(max(0.0, math.fsum(p * (1 - p))))


def matched_gamma(schedule: Schedule, total_steps: int) -> float:
    """γ = 1 / mean p, for SAM's expected regularization. Raises ValueError where mean p is 0."""
    mean = expected_propagations(schedule, total_steps) / total_steps - 1
    if mean <= 0:
        raise ValueError("gamma='matched' is 1 / mean p, and this schedule has mean p = 0")
    return 1 / mean


def probabilities(schedule: Schedule, total_steps: int) -> np.ndarray:
    """p(t) for t = 0 … T−1."""
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    steps: Any = np.arange(total_steps)
    try:
        p = np.asarray(schedule(steps, total_steps), dtype=float)
    except Exception:  # a callable that takes one step at a time; whatever else is wrong will be raised below
        p = np.empty(0)
    if p.shape != steps.shape:
        p = np.array([schedule(step, total_steps) for step in range(total_steps)], dtype=float)
    return p


@dataclass(frozen=True)
class Constant:
    """p(t) = p."""

    p: float

    def __post_init__(self) -> None:
        _check_probabilities(p=self.p)

    def __call__(self, step: Steps, total_steps: int) -> Any:
        return self.p + 0.0 * step

    @classmethod
    def with_mean(cls, p: float, rising: bool = True) -> Self:
        """Constant(p). It has no direction: `rising` is accepted so that one sweep can cover every family."""
        return cls(p)


@dataclass(frozen=True)
class Piecewise:
    """p(t) = before while t ≤ boundary·T, then after. The first "after" step is ⌊boundary·T⌋ + 1.

    Args:
        boundary: where p changes, as a fraction of the run.
    """

    before: float
    after: float
    boundary: float

    def __post_init__(self) -> None:
        _check_probabilities(before=self.before, after=self.after, boundary=self.boundary)

    def __call__(self, step: Steps, total_steps: int) -> Any:
        is_before = step <= self.boundary * total_steps
        return is_before * self.before + (1 - is_before) * self.after

    @classmethod
    def with_mean(cls, p: float, rising: bool = True) -> Self:
        """All SAM steps in one stretch, with mean p: the last p·T steps (rising) or the first (falling).

        The boundary step belongs to "before", so a count may differ from p·T by one step; p = 0 and p = 1 are
        exact, as they have no boundary.
        """
        _check_probabilities(p=p)
        if p in (0.0, 1.0):
            return cls(p, p, 1.0)
        return cls(0.0, 1.0, 1.0 - p) if rising else cls(1.0, 0.0, p)


@dataclass(frozen=True)
class Linear:
    """p(t) = start + (end − start)·t/T."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_probabilities(start=self.start, end=self.end)

    def __call__(self, step: Steps, total_steps: int) -> Any:
        return self.start + (self.end - self.start) * (step / total_steps)

    @classmethod
    def with_mean(cls, p: float, rising: bool = True) -> Self:
        """The steepest line with mean p that stays in [0, 1]: between max(0, 2p−1) and min(1, 2p)."""
        return cls(*_ends(p, rising))


@dataclass(frozen=True)
class Cosine:
    """p(t) = ½(start + end) + ½(start − end)·cos(πt/T).

    Our reading of the paper's trigonometric family, whose form its sources do not give.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_probabilities(start=self.start, end=self.end)

    def __call__(self, step: Steps, total_steps: int) -> Any:
        # numpy's cosine may differ in the last bit from one CPU to the next, and the coin must not.
        cos = np.cos if isinstance(step, np.ndarray) else math.cos
        wave = cos(math.pi * step / total_steps)
        return 0.5 * (self.start + self.end) + 0.5 * (self.start - self.end) * wave

    @classmethod
    def with_mean(cls, p: float, rising: bool = True) -> Self:
        """Half a cosine wave with mean p, between max(0, 2p−1) and min(1, 2p)."""
        return cls(*_ends(p, rising))


@dataclass(frozen=True)
class Periodic:
    """p(t) = 1 at every `every`-th step (t = 0, every, 2·every, …), else 0: no chance involved."""

    every: int

    def __post_init__(self) -> None:
        if not isinstance(self.every, Integral) or self.every < 1:
            raise ValueError(f"the schedule's every must be a whole number of steps ≥ 1, got {self.every!r}")

    def __call__(self, step: Steps, total_steps: int) -> Any:
        return 1.0 * (step % self.every == 0)


@dataclass(frozen=True)
class Window:
    """p(t) = 1 for start·T ≤ t < end·T, else 0.

    Args:
        start, end: fractions of the run.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        _check_probabilities(start=self.start, end=self.end)
        if self.start > self.end:
            raise ValueError(f"the schedule's start={self.start} must not be above its end={self.end}")

    def __call__(self, step: Steps, total_steps: int) -> Any:
        return 1.0 * ((self.start * total_steps <= step) & (step < self.end * total_steps))


@dataclass(frozen=True)
class Warmup:
    """p(t) = 0 for the first `steps` steps, then `schedule`'s, or that number: warmup steps still advance
    the schedule."""

    schedule: Schedule | float
    steps: int

    def __call__(self, step: Any, total_steps: int) -> Any:
        p = self.schedule(step, total_steps) if callable(self.schedule) else self.schedule
        return (step >= self.steps) * p


def _check_probabilities(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or not 0.0 <= value <= 1.0:
            raise ValueError(f"the schedule's {name} must be a number in [0, 1], got {value!r}")


def _ends(p: float, rising: bool) -> tuple[float, float]:
    _check_probabilities(p=p)
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
