"""The tables of results/theory/README.md, made from its records."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rst.reporting.pages import pipes
from rst.reporting.statistics import estimate

from .rate import RHO, SCHEDULES, SHORTEST

Records = Mapping[str, pd.DataFrame]
NAMES = ("strength", "rate", "floor")
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def recorded(folder: Path) -> dict[str, pd.DataFrame]:
    return {name: pd.read_csv(folder / f"{name}.csv", dtype={"schedule": str}) for name in NAMES}


def rows_of(frame: pd.DataFrame) -> list[Any]:
    """Its rows, with the columns as attributes."""
    return list(frame.itertuples())


def tables(records: Records, image_runs: pd.DataFrame) -> dict[str, str]:
    """By the name of the block in the page that each one fills."""
    made = records["strength"].iloc[0]
    return {
        "strength": _strength(records["strength"]),
        "slopes": _slopes(records["rate"]),
        "floor": _floor(records["floor"]),
        "images": _images(image_runs),
        "provenance": f"Commit {made['commit']}, PyTorch {made['torch']}, {made['device']}.",
    }


def series(rates: pd.DataFrame, schedule: str, fixed: bool) -> pd.DataFrame:
    """The runs of a schedule by their length, with ρ fixed or ∝ T^−½: at the shortest one it is the same."""
    rho = RHO if fixed else RHO * np.sqrt(SHORTEST / rates["steps"])
    right = np.isclose(rates["rho"], rho) if schedule != "SGD" else not fixed
    return rates[(rates["schedule"] == schedule) & right].sort_values("steps")


def slope(rows: pd.DataFrame, name: str) -> tuple[float, float]:
    """Least-squares slope of log `name` against log T, and its standard error from those of the points."""
    x, y = np.log(rows["steps"].to_numpy(float)), np.log(rows[name].to_numpy(float))
    weights = (x - x.mean()) / np.square(x - x.mean()).sum()
    relative = (rows[f"{name}_se"] / rows[name]).to_numpy(float)
    return float(weights @ y), math.sqrt(float(np.square(weights) @ np.square(relative)))


def _strength(results: pd.DataFrame) -> str:
    lines: list[dict[str, str]] = []
    for row in rows_of(results):
        line = {"p, γ, ρ": f"{row.p:g}, {row.gamma:.3g}, {row.rho:g}", "noise": row.noise}
        line |= {"pγρ": f"{row.strength:g}", "mean ∇f": _seen(row.bias, row.bias_se, 4)}
        line |= {
            "predicted": _number(row.bias_predicted, 4),
            "mean ‖∇f‖²": _seen(row.square, row.square_se, 5),
        }
        line |= {"predicted ": _number(row.square_predicted, 5), "bound": f"{row.bound:.3f}"}
        lines.append(line)
    return pipes(lines)


def _slopes(rates: pd.DataFrame) -> str:
    longest = f"2{str(round(math.log2(rates['steps'].max()))).translate(SUPERSCRIPT)}"
    lines: list[dict[str, str]] = []
    for schedule in SCHEDULES:
        for fixed, rho in ((False, "∝ T^−½"), (True, "0.8")):
            rows = series(rates, schedule, fixed)
            if rows.empty:
                continue
            line = {"p(t)": schedule, "ρ": "–" if schedule == "SGD" else rho}
            for name, heading, digits in (("mean", "whole run", 2), ("late", "second half", 3)):
                value, error = slope(rows, name)
                last = rows.iloc[-1]
                line[f"slope, {heading}"] = _seen(value, error, 3)
                seen = (1000 * last[name], 1000 * last[f"{name}_se"])
                line[f"10³ ‖∇f‖² at T = {longest}, {heading}"] = _seen(*seen, digits)
            lines.append(line)
    return pipes(lines)


def _floor(floors: pd.DataFrame) -> str:
    lines: list[dict[str, str]] = []
    for row in rows_of(floors.sort_values(["strength", "rho"], kind="stable")):
        squared = row.strength**2
        line = {"p": row.schedule.removesuffix(".0"), "γ": f"{row.gamma:g}", "ρ": f"{row.rho:g}"}
        line |= {"pγρ": f"{row.strength:.3g}", "floor · 10³": _seen(1000 * row.floor, 1000 * row.floor_se, 3)}
        line |= {"floor/(pγρ)² · 10³": _seen(1000 * row.floor / squared, 1000 * row.floor_se / squared, 1)}
        line |= {"mean ‖∇f‖² beyond SGD's · 10³": _seen(1000 * row.excess, 1000 * row.excess_se, 3)}
        lines.append(line)
    return pipes(lines)


def _images(runs: pd.DataFrame) -> str:
    lines: list[dict[str, str]] = []
    for (strength, p, gamma), rows in runs.groupby(["strength", "p", "gamma"]):
        of = estimate(rows["test_loss"])
        name = " (SGD)" * (p == 0) + " (SAM)" * (p == 1)
        line = {"pγ": f"{strength:g}", "p": f"{p:g}{name}", "γ": f"{gamma:g}", "n": str(of.n)}
        lines.append(
            line | {"test loss": f"{of.mean:.3f}", "95 % interval": f"{of.low:.3f} to {of.high:.3f}"}
        )
    return pipes(lines)


def _seen(value: float, error: float, digits: int) -> str:
    return f"{_number(value, digits)} ± {error:.{digits}f}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")
