"""Estimates over runs that are paired by seed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

MIN_SEEDS = 3  # fewer are marked † and decide nothing
LEVEL = 0.95
ROUNDING = 1e-9  # a standard deviation below it is that of equal values
SHARPNESS_NAMES = {
    "loss": "L(θ)",
    "lambda_max": "λ_max",
    "in_ball": "L(θ + ε) − L(θ)",
    "along": "L(θ ± d/2) − L(θ)",
}
LOSSES = {
    "test_loss": "{Split} loss (nats)",
    "calibrated_test_loss": "{Split} loss, calibrated (nats)",
    "train_loss": "Training loss (nats)",
}

# Metrics computed from the columns of runs.csv. Any of its other columns is a metric, too.
DERIVED = {
    "test_error": lambda runs: 100 * (1 - runs["test_accuracy"]),
    "best_epoch_error": lambda runs: 100 * (1 - runs["best_test_accuracy"]),
    "eta": lambda runs: runs["propagations"] / runs["steps"],
    "eta_expected": lambda runs: runs["expected_propagations"] / runs["steps"],
    "seconds_per_propagation": lambda runs: runs["seconds.train"] / runs["propagations"],
}


@dataclass(frozen=True)
class Estimate:
    """Mean, sample standard deviation and 95 % t-interval of n values; nan where n is too small to give them.
    Equal values, which are common on few test images, give no interval: they would claim certainty."""

    mean: float = np.nan
    std: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0


def estimate(values: Iterable[float]) -> Estimate:
    """mean ± t(0.975, n−1)·s/√n with s² = Σ(x − mean)²/(n−1)."""
    x = np.array(list(values), dtype=float)
    if x.size < 2:
        return Estimate(mean=float(x[0]), n=1) if x.size else Estimate()
    mean, std = float(x.mean()), float(x.std(ddof=1))
    low, high = (
        stats.t.interval(LEVEL, x.size - 1, mean, stats.sem(x)) if std > ROUNDING else (np.nan, np.nan)
    )
    return Estimate(mean, std, float(low), float(high), x.size)


def values(metric: str, runs: Mapping[int, str], records: pd.DataFrame) -> pd.Series:
    """A metric's value by seed, of those of the `runs` (seed → id) that the records have it of.

    Args:
        metric: of `DERIVED`, or a column of the records.
    """
    asked = records[records["id"].isin(list(runs.values()))].set_index("id")
    try:
        of_id = DERIVED[metric](asked) if metric in DERIVED else asked[metric]
    except KeyError:  # a column that these records are older than
        return pd.Series(dtype=float)
    seeds = {run: seed for seed, run in runs.items()}
    return of_id.dropna().astype(float).rename(seeds).sort_index()


def paired_difference(ours: pd.Series, theirs: pd.Series) -> pd.Series:
    """`ours` − `theirs`, both indexed by seed, for the seeds that both have."""
    return (ours - theirs).dropna()


def holm(p: Iterable[float]) -> np.ndarray:
    """Holm's step-down adjustment (Holm 1979): rejecting where the result is below α keeps the probability of
    any false rejection among these tests below α."""
    raw = np.array(list(p), dtype=float)
    order = np.argsort(raw)
    steps = np.maximum.accumulate(raw[order] * np.arange(raw.size, 0, -1))
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def on_one_machine(runs: pd.DataFrame) -> bool:
    """Whether all of these runs had the same host, device, ranks and threads, so that times compare."""
    if runs.empty:
        return False
    machines = runs[["host", "device", "device_name", "ranks", "threads"]].drop_duplicates()
    return len(machines) == 1 and bool(machines.notna().all(axis=None))


@dataclass(frozen=True)
class Summary:
    """What the records say of one column of a table.

    Args:
        name: of the column; "" where the table has no other.
        frame: a line a row, in the table's order. An estimate takes five columns, such as `test_error.mean`,
            `.std`, `.low`, `.high` and `.n`. Errors are in percent, differences in percentage points.
        metrics: those that a page shows; None for the usual ones.
        unit: what n counts: "seed", or "part" of the data, where each seed has one of its own.
    """

    title: str
    name: str
    setting: str
    split: str
    reference: str
    baseline: str
    metrics: tuple[str, ...] | None
    frame: pd.DataFrame
    unit: str = "seed"


def estimate_of(line: Mapping[Any, Any], name: str) -> Estimate:
    """The estimate `name` in a line of `Summary.frame`."""
    return Estimate(*(line[f"{name}.{field.name}"] for field in fields(Estimate)))
