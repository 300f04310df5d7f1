"""Measuring by comparison: on a machine that others use too, a time says little, a ratio of times taken in
turn says something. `make benchmark` (scripts/benchmark.py) is made of this."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Action = Callable[[], float | None]
Round = Mapping[str, float]  # seconds, or what an action returned, by the action's name


@dataclass(frozen=True)
class Settings:
    """`rounds` of a measurement; `threads` of PyTorch; `quick`: tiny models and data, to see that it runs."""

    rounds: int = 8
    threads: int = 1
    quick: bool = False


@dataclass(frozen=True)
class Figure:
    """A ratio, the median over rounds, with its quartiles `low` and `high`.

    `target`: "≤ 1.03", "< 0.03" or "≥ 5", say, or "" for none.
    """

    section: str
    what: str
    model: str
    ratio: float
    low: float
    high: float
    rounds: int
    target: str = ""

    @property
    def reached(self) -> str:
        """Whether the ratio, not rounded, keeps to the target: "yes", "no", or "" without a target."""
        if not self.target:
            return ""
        sign, number = self.target.split()
        bound = float(number)
        kept = {"≤": self.ratio <= bound, "<": self.ratio < bound, "≥": self.ratio >= bound}[sign]
        return "yes" if kept else "no"


def figure(
    section: str,
    what: str,
    model: str,
    rounds: Sequence[Round],
    ratio: Callable[[Round], float],
    target: str = "",
) -> Figure:
    """Of each round's ratio, never of times from two rounds, between which the machine may slow down."""
    low, median, high = np.quantile([ratio(one) for one in rounds], [0.25, 0.5, 0.75]).tolist()
    return Figure(section, what, model, median, low, high, len(rounds), target)


def ratio_of(a: str, b: str) -> Callable[[Round], float]:
    return lambda one: one[a] / one[b]


def interleaved(actions: Mapping[str, Action], rounds: int, warmup: int = 1) -> list[Round]:
    """Seconds of each action in each round. They take turns, A B C A B C …, so that whatever else the machine
    does meets all of them alike, each round beginning with another one, as the first finds the caches cold.
    What an action returns, if anything, stands in place of its seconds."""
    measured: list[Round] = []
    names = list(actions)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            gc.collect()  # what the last round left, as nothing is collected during one
            first = index % len(names)
            row = {name: _seconds(actions[name]) for name in names[first:] + names[:first]}
            if index >= warmup:
                measured.append({name: row[name] for name in names})
    finally:
        if was_enabled:
            gc.enable()
    return measured


def _seconds(action: Action) -> float:
    begun = time.perf_counter()
    own = action()
    return time.perf_counter() - begun if own is None else own


def per_step(
    step: Callable[[], object], steps: int = 1, prepare: Callable[[], object] | None = None
) -> Action:
    """Seconds a step, of `steps` of them. `prepare` comes before them and is not measured."""

    def action() -> float:
        if prepare is not None:
            prepare()
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - begun) / steps

    return action


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least-squares slope of log(seconds) against log(size): 1 where time is proportional to size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
