"""Measuring by comparison: on a shared machine a time says little, a ratio of interleaved times a lot."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Action = Callable[[], object]
Round = Mapping[str, float]  # seconds by action
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of a ratio, with its quartiles `low` and `high`.

    `target` is a bound such as "≤ 1.03" or "≥ 5", or "" where there is none.
    """

    what: str
    setting: str
    median: float
    low: float
    high: float
    rounds: int
    target: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the median, before it is rounded for display, meets the target."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        return self.median <= float(bound) if sign == "≤" else self.median >= float(bound)


def ratio(
    what: str, setting: str, rounds: Sequence[Round], formula: Callable[[Round], float], target: str = ""
) -> Ratio:
    """`formula` is applied within each round: between rounds the machine may slow down or speed up."""
    low, median, high = np.quantile([formula(seconds) for seconds in rounds], [0.25, 0.5, 0.75]).tolist()
    return Ratio(what, setting, median, low, high, len(rounds), target)


def timed(action: Action, device: torch.device = CPU, repeat: int = 1) -> Callable[[], float]:
    """Seconds for `repeat` times `action`: on the CPU this process's CPU time, in which other load does not
    count; on a GPU the time until it has finished."""

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    def measure() -> float:
        begin = now()
        for _ in range(repeat):
            action()
        return now() - begin

    return measure


def interleaved(measures: Mapping[str, Callable[[], float]], rounds: int) -> Sequence[Round]:
    """What each of `measures` returns in each round, after a first round that is not counted.

    They take turns, so that other load on the machine hits them alike. Each round starts with another one,
    and every second round runs backwards: none always follows the same one.
    """
    names = list(measures)
    measured = []
    collects = gc.isenabled()
    gc.disable()
    gc.freeze()  # so that collecting between rounds looks at new objects only
    try:
        for i in range(rounds + 1):
            gc.collect()
            first = i % len(names)
            order = names[first:] + names[:first]
            if i % 2:
                order.reverse()
            measured.append({name: measures[name]() for name in order})
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
    return measured[1:]


def peak_bytes(action: Action, device: torch.device = CPU) -> int:
    """The most memory that PyTorch's allocator holds during `action`, beyond what it held before.

    On the CPU from the profiler's records, exact and with temporaries inside operations; on CUDA from the
    allocator's counter of the bytes that were asked for.
    """
    gc.collect()  # garbage freed during the action would count as negative
    if device.type == "cuda":
        action()  # cuBLAS and cuDNN allocate their workspaces once
        gc.collect()
        before: int = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        action()
    events = records.profiler.kineto_results.events()
    allocations = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in allocations))
