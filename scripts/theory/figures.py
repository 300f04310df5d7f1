"""The figures of results/theory."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rst.reporting.statistics import estimate

from .page import rows_of, series
from .rate import SCHEDULES

COLOURS = {1.0: "#D55E00", 0.75: "#E69F00", 0.5: "#0072B2", 0.25: "#009E73", 0.0: "#000000"}  # by p
OF_SCHEDULES = {"SGD": "#000000", "constant": "#0072B2", "rising": "#009E73", "falling": "#E69F00"}
MARKERS = "osD^v"
LEVEL = "bars: 95 % intervals"


def strength(results: pd.DataFrame) -> Figure:
    """Mean gradient, and what its mean square has beyond that, against the strength: seen and predicted."""
    figure, (mean, noise) = _panels(2)
    line = np.array([0.0, 0.42])
    mean.plot(line, -line / 3, color="0.4", lw=1, zorder=1)
    mean.plot(line, 0 * line, color="0.4", lw=1, ls="--", zorder=1)
    mean.annotate("−pγρ/3", (0.33, -0.102), fontsize=8)
    mean.annotate("0, symmetric noise", (0.21, 0.004), fontsize=8)
    for row in rows_of(results):
        look = _look(row.p, row.noise == "skewed")
        mean.errorbar(row.strength, row.bias, 1.96 * row.bias_se, **look)
        seen = row.square - row.bias_predicted**2
        noise.errorbar(row.strength, seen, 1.96 * row.square_se, **look)
        predicted = row.square_predicted - row.bias_predicted**2
        noise.plot(row.strength, predicted, "_", color="0.2", ms=14, zorder=1)
    mean.set(ylabel="mean ∇f", title="the bias depends on pγρ alone")
    noise.set(ylabel="mean (∇f − predicted bias)²", title="the noise (— predicted)")
    _legend(figure, [_handle(f"p = {p:g}", COLOURS[p], marker=_marker(p)) for p in sorted(set(results["p"]))])
    for axes in (mean, noise):
        axes.set_xlabel("strength pγρ")
    return _titled(figure, f"½θ², RST with plain SGD, α = 0.005, filled: skewed noise; {LEVEL}")


def rate(rates: pd.DataFrame, floors: pd.DataFrame) -> Figure:
    """Mean ‖∇f‖² against the number of steps, and the floor against the strength."""
    figure, (whole, late, floor) = _panels(3)
    for i, schedule in enumerate(SCHEDULES):
        for fixed in (False, True):
            rows = series(rates, schedule, fixed)
            look: dict[str, Any] = {"color": OF_SCHEDULES[schedule], "ls": "--" if fixed else "-"}
            for axes, name in ((whole, "mean"), (late, "late")):
                errors = 1.96 * rows[f"{name}_se"]
                axes.errorbar(rows["steps"], rows[name], errors, marker=MARKERS[i], ms=4, lw=1.1, **look)
    for axes in (whole, late):
        steps = np.array([rates["steps"].min(), rates["steps"].max()])
        top = 1.5 * rates["mean" if axes is whole else "late"].max()
        axes.plot(steps, top * (steps / steps[0]) ** -0.5, color="0.6", lw=1, zorder=1)
        axes.annotate("slope −½", (2 * steps[0], top * 0.8), fontsize=8)
        axes.set(yscale="log", xlabel="steps T")
        axes.set_xscale("log", base=2)
    whole.set(ylabel="mean ‖∇f‖²", title="whole run")
    late.set(title="second half of the run")
    line = np.array([0.04, 0.45])
    scale = np.exp(np.log(floors["floor"] / floors["strength"] ** 2).mean())
    floor.plot(line, scale * line**2, color="0.6", lw=1, zorder=1)
    floor.annotate("slope 2", (0.2, 1.7 * scale * 0.04), fontsize=8, ha="right")
    for row in rows_of(floors):
        moving = row.schedule in SCHEDULES
        look = _look(0.5 if moving else float(row.schedule), filled=not moving)
        floor.errorbar(row.strength, row.floor, 1.96 * row.floor_se, **look)
    floor.set(xscale="log", yscale="log", xlabel="strength pγρ", ylabel="‖mean ∇f‖²", title="the floor")
    floor.set_xticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
    floor.set_xticks([], minor=True)
    handles = [_handle(name, colour, line="-") for name, colour in OF_SCHEDULES.items()]
    handles += [_handle(r"ρ ∝ $T^{-1/2}$", "0.4", line="-"), _handle("ρ = 0.8", "0.4", line="--")]
    handles += [_handle(f"floor: p = {p:g}", COLOURS[p], marker=_marker(p)) for p in (0.25, 0.5, 1.0)]
    hollow = _handle("floor: falling, rising", COLOURS[0.5], marker=_marker(0.5))
    hollow.set_markerfacecolor("white")
    handles.append(hollow)
    _legend(figure, handles)
    return _titled(figure, f"two-layer tanh network, batches of 8, RST with plain SGD; {LEVEL}")


def images(runs: pd.DataFrame) -> Figure:
    """Test loss of every run against pγ, and each setting's mean with its interval."""
    figure, (axes,) = _panels(1, width=6.5)
    for (_, gamma), rows in runs.groupby(["p", "gamma"]):
        is_grst, x = gamma != 1, rows["strength"].iloc[0]
        look: dict[str, Any] = {
            "color": "#009E73" if is_grst else "#0072B2",
            "marker": "s" if is_grst else "o",
        }
        axes.plot([x] * len(rows), rows["test_loss"], ls="", ms=3, alpha=0.5, mew=0, **look)
        mean = estimate(rows["test_loss"])
        axes.errorbar(x, mean.mean, mean.high - mean.mean, ms=8, capsize=4, mfc="white", zorder=3, **look)
        if is_grst:
            axes.annotate(f"γ = {gamma:g}", (x, mean.mean), (9, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.1)  # for the label of the last point
    axes.set(xlabel="pγ (ρ = 0.2)", ylabel="test loss (nats)")
    names = {"#0072B2": "γ = 1: p from 0 (SGD) to 1 (SAM)", "#009E73": "p = ½: G-RST"}
    markers = ("o", "s")
    handles = [
        _handle(name, colour, marker=marker)
        for (colour, name), marker in zip(names.items(), markers, strict=True)
    ]
    _legend(figure, handles)
    n = runs["seed"].nunique()
    return _titled(figure, f"ResNet-8 on 1,000 CIFAR-10 images, {n} seeds, each run and means; {LEVEL}")


def _panels(n: int, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * n, 4.0), dpi=150, layout="constrained")
    panels = list(figure.subplots(1, n, squeeze=False)[0])
    for axes in panels:
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    return figure, panels


def _look(p: float, filled: bool) -> dict[str, Any]:
    colour = COLOURS[p]
    return {"color": colour, "marker": _marker(p), "mfc": colour if filled else "white", "ms": 5, "lw": 1.2}


def _marker(p: float) -> str:
    return MARKERS[sorted(COLOURS).index(p)]


def _handle(label: str, colour: str, line: str = "", marker: str = "o") -> Line2D:
    return Line2D([], [], color=colour, ls=line, marker="" if line else marker, label=label)


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=8
    )


def _titled(figure: Figure, title: str) -> Figure:
    for axes in figure.axes:
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(9)
        axes.title.set_fontsize(9)
    figure.suptitle(title, fontsize=9)
    return figure
