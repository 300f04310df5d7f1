"""Figures made from a column's summary, its curves and its schedules. They are legible in print and to
colour-blind readers: the colours are Okabe and Ito's, and rows do not differ in colour alone."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rst.reporting.pages import points
from rst.reporting.records import SHARPNESS
from rst.reporting.statistics import MIN_SEEDS, SHARPNESS_NAMES, Summary, estimate_of
from rst.schedule import Schedule, expected_propagations, probabilities, propagations_std, uniform

COLOURS = {  # by method
    "sgd": "#000000",
    "sam": "#D55E00",
    "asam": "#E69F00",
    "gnp": "#CC79A7",
    "rst": "#0072B2",
    "grst": "#009E73",
}
CYCLE = ["#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"]  # for the curves of many rows of one method
DASHES = ["-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2))]
MARKERS = "osD^vPX<>hp"
CURVES_A_PANEL = 10  # as many as the eye can follow, beside the reference's and the baseline's
BINS = 50  # of a schedule's steps
FAR = 10  # times the median of how far intervals reach


def marker_of(method: str, enough: bool) -> dict[str, Any]:
    """How a method's marker looks: hollow where there are not `enough` seeds, `MIN_SEEDS`."""
    colour = COLOURS.get(method, CYCLE[-1])
    return {"color": colour, "mfc": colour if enough else "white"}


def of_column(summary: Summary, curves: pd.DataFrame) -> dict[str, Figure]:
    """The figures, by name, of the rows that have finished runs; none where no row has."""
    frame = summary.frame[summary.frame["test_error.n"] > 0]
    if frame.empty:
        return {}
    figures = {"forest": forest(summary, frame), "curves": training_curves(summary, frame, curves)}
    if _about(frame).is_unique:
        figures["error"] = error(summary, frame)
    if (_about(frame).groupby(_family(frame)).nunique() > 1).sum() >= 3:  # methods at several costs
        figures["cost"] = cost(summary, frame)
    measured = frame[frame["lambda_max.n"] > 0]
    if len(measured):
        figures["sharpness"] = sharpness(measured)
    for figure in figures.values():
        n = sorted({frame["test_error.n"].min(), frame["test_error.n"].max()})
        setting = f"{summary.setting}, n = {' to '.join(map(str, n))} {summary.unit}s"
        title = f"{summary.title}: {summary.name}".removesuffix(": ")
        width = int(15 * figure.get_figwidth())  # characters that fit in a line
        figure.suptitle(f"{title}\n{textwrap.fill(setting, width)}", fontsize=8)
    return figures


def forest(summary: Summary, frame: pd.DataFrame) -> Figure:
    """Each row's difference to the reference with its 95 % interval, by measured η and then from the lowest
    up. Vertical lines mark the reference and the baseline. Of a row that is `FAR` from the others, an arrow
    shows where it is."""
    name = f"difference_to_{summary.reference}"
    frame = _with_pairs(frame, summary)
    frame = frame.assign(gap=frame[f"{name}.mean"].fillna(0.0)).sort_values("gap", kind="stable")
    figure, (axes,), places = _by_eta(frame, width=8.0)
    gaps = frame.set_index("label")["gap"]
    sides = ["left", "right"] if gaps.get(summary.baseline, 0.0) > 0 else ["right", "left"]
    # One line where they are the same row; labels of lines that are close do not touch.
    lines = {summary.baseline: ("--", sides[0]), summary.reference: ("-", sides[1])}
    is_far, edge = _far(frame, name)
    for label, (dash, side) in lines.items():
        if label in set(frame["label"][~is_far]):
            axes.axvline(gaps[label], ls=dash, lw=0.9, color="0.4", zorder=1)
            axes.text(gaps[label], 1.01, label, transform=axes.get_xaxis_transform(), ha=side, fontsize=8)
    texts = []
    for y, far, row in zip(places, is_far, frame.to_dict("records"), strict=True):
        enough = row["test_error.n" if row["label"] == summary.reference else f"{name}.n"] >= MIN_SEEDS
        look = marker_of(row["method"], enough)
        gap = estimate_of(row, name)
        if far:
            axes.plot(np.copysign(edge, row["gap"]), y, ">" if row["gap"] > 0 else "<", ms=7, **look)
        else:
            axes.plot(row["gap"], y, "o", ms=6, zorder=3, **look)
        if enough and not far:
            axes.plot([gap.low, gap.high], [y, y], color=look["color"], lw=1.5)
        text = "reference" if row["label"] == summary.reference else points(gap)
        texts.append(text + " †" * (not enough))
    numbers = axes.twinx()
    numbers.set_ylim(axes.get_ylim())
    numbers.set_yticks(places, texts, fontsize=8)
    numbers.tick_params(length=0)
    numbers.spines[:].set_visible(False)
    level = ", 95 % interval" if (frame[f"{name}.n"] >= MIN_SEEDS).any() else ""
    level += "; arrows: beyond the axis" if is_far.any() else ""
    axes.set_xlabel(f"difference in {summary.split} error to {summary.reference} (points){level}")
    return figure


def sharpness(frame: pd.DataFrame) -> Figure:
    """The four measures of sharpness, mean ± standard deviation, by measured η; logarithmic scales."""
    figure, panels, places = _by_eta(frame, width=10.0, panels=len(SHARPNESS))
    for axes, name in zip(panels, SHARPNESS, strict=True):
        for y, (_, row) in zip(places, frame.iterrows(), strict=True):
            mean, std = row[f"{name}.mean"], np.nan_to_num(row[f"{name}.std"])
            axes.errorbar(mean, y, xerr=std, fmt="o", ms=5, lw=1.2, **marker_of(row["method"], True))
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
        axes.set_title(SHARPNESS_NAMES[name], fontsize=9)
    figure.supxlabel("mean ± standard deviation, logarithmic scales", fontsize=9)
    return figure


def error(summary: Summary, frame: pd.DataFrame) -> Figure:
    """The error's mean and 95 % interval against the measured η, for rows that do not share it: those would
    hide each other."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for _, row in frame.iterrows():
        mean, enough = row["test_error.mean"], row["test_error.n"] >= MIN_SEEDS
        half = np.nan_to_num(row["test_error.high"] - mean) if enough else 0.0
        look = marker_of(row["method"], enough)
        axes.errorbar(row["eta.mean"], mean, half, fmt="o", ms=6, lw=1.2, **look)
        axes.annotate(_named(row), (row["eta.mean"], mean), (6, 6), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"η, propagations (forward-backward passes) per step of {summary.baseline}")
    axes.set_ylabel(f"{summary.split} error (%), mean and 95 % interval")
    axes.set_xlim(min(0.95, 0.95 * frame["eta.mean"].min()), max(2.15, 1.05 * frame["eta.mean"].max()))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return figure


def cost(summary: Summary, frame: pd.DataFrame) -> Figure:
    """Difference to the reference with its 95 % interval against the measured η. Rows whose labels begin
    alike ("LookSAM, every 2" and "LookSAM, every 4") are one method: one marker, joined by a line."""
    name = f"difference_to_{summary.reference}"
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.4", lw=0.9)
    frame = _with_pairs(frame, summary)
    is_far, edge = _far(frame, name)
    if is_far.any():
        axes.set_ylim(-edge, edge)
    for i, (family, rows) in enumerate(frame.groupby(_family(frame), sort=False)):
        rows = rows.sort_values("eta.mean")
        gaps = [estimate_of(row, name) for row in rows.to_dict("records")]
        mean = np.nan_to_num([gap.mean for gap in gaps])  # 0: the reference itself
        enough = np.array([gap.n >= MIN_SEEDS for gap in gaps]) | (rows["label"] == summary.reference)
        half = np.where(enough, np.nan_to_num([gap.high - gap.mean for gap in gaps]), 0.0)
        anchors = {"SGD": "black", "SAM": COLOURS["sam"]}
        look: dict[str, Any] = {"color": anchors.get(str(family), CYCLE[i % len(CYCLE)])}
        look |= {"ls": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)], "lw": 1.0, "ms": 6}
        label = f"{family} (beyond the axis)" if is_far[rows.index].any() else family
        axes.errorbar(rows["eta.mean"], mean, half, elinewidth=0.7, label=label, **look)
        axes.plot(rows["eta.mean"][~enough], mean[~enough], **look | {"ls": "", "mfc": "white"})
    axes.set_xlabel(f"η, propagations (forward-backward passes) per step of {summary.baseline}")
    axes.set_ylabel(f"difference in {summary.split} error to {summary.reference} (points), 95 % interval")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def _far(frame: pd.DataFrame, name: str) -> tuple[pd.Series, float]:
    """Which of the differences `name` are `FAR` from 0, and how far an axis must reach for the others."""
    ends = frame[[f"{name}.low", f"{name}.high", f"{name}.mean"]].abs().max(axis=1).fillna(0.0)
    is_far = frame[f"{name}.mean"].abs() > FAR * ends[ends > 0].quantile(interpolation="lower")
    return is_far, 1.15 * ends[~is_far].max()


def _with_pairs(frame: pd.DataFrame, summary: Summary) -> pd.DataFrame:
    """The rows that have a difference to the reference, and the reference itself."""
    has_difference = frame[f"difference_to_{summary.reference}.mean"].notna()
    return frame[has_difference | (frame["label"] == summary.reference)]


def _family(frame: pd.DataFrame) -> pd.Series:
    """What a row's label begins with, before a comma or a factor on its epochs; where another method begins
    so, too (RST and G-RST), with the label's end."""
    names = frame["label"].str.split(", | × ", regex=True).str[0]
    first = frame.groupby(names, sort=False)["method"].transform("first")
    return names.where(frame["method"] == first, names + ", " + frame["label"].str.split(", ").str[-1])


def training_curves(summary: Summary, frame: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Training loss, and the error where it was measured more than once a run, against epochs and against
    propagations, on logarithmic scales: the mean over seeds with a band of ± one standard deviation. Rows of
    similar η share a panel, reference and baseline are in each."""
    anchors = frame["label"].isin([summary.reference, summary.baseline])
    panels: list[pd.DataFrame] = []
    for _, rows in frame[~anchors].groupby(_about(frame[~anchors])):
        if panels and len(panels[-1]) + len(rows) <= CURVES_A_PANEL:
            panels[-1] = pd.concat([panels[-1], rows])
        else:
            panels.append(rows)
    looks = _looks(summary)
    curves = curves[curves["id"].isin(" ".join(frame["runs"]).split())]
    curves = curves.assign(error=100 * (1 - curves["test_accuracy"]))
    measured = {"train_loss": "training loss (nats)"}
    if (curves.groupby("id")["error"].count() > 1).any():
        measured = {"error": f"{summary.split} error (%)"} | measured
    height = (1.0 + 2.75 * len(measured)) * max(1, len(panels))
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    parts = figure.subfigures(max(1, len(panels)), 1, squeeze=False).flat
    for part, rows in zip(parts, panels or [frame[:0]], strict=True):
        grid = part.subplots(len(measured), 2, sharex="col", sharey="row", squeeze=False)
        lines = dict(zip(measured, grid, strict=True))
        for _, row in pd.concat([frame[anchors], rows]).iterrows():
            runs = curves[curves["id"].isin(row["runs"].split())]
            _draw_curves(lines, runs, {**looks[row["label"]], "label": _named(row)})
        for name, heading in measured.items():
            lines[name][0].set_ylabel(heading)
        grid[-1, 0].set_xlabel("epoch")
        grid[-1, 1].set_xlabel("propagations")
        for axes in grid.flat:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
        handles = grid[0, 0].get_legend_handles_labels()
        part.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=4)
    return figure


def schedules(by_label: Mapping[str, Schedule], total_steps: int, seed: int) -> Figure:
    """p(t) of each distinct schedule against progress t/T, and the share of steps that are SAM steps by the
    coin of `seed`, `uniform(seed, t) < p(t)`, in 50 bins. Equal schedules share a panel. A p(t) that turns
    more than twice a bin is drawn as its mean in each."""
    coin = np.array([uniform(seed, t) for t in range(total_steps)])
    panels: dict[bytes, tuple[list[str], Schedule, np.ndarray]] = {}
    for label, schedule in by_label.items():
        p = probabilities(schedule, total_steps)
        panels.setdefault(p.tobytes(), ([], schedule, p))[0].append(label)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    edges = np.unique(np.linspace(0, total_steps, BINS + 1).round().astype(int))
    figure = Figure(figsize=(max(2.6 * columns, 5.2), 2.1 * lines + 0.9), dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (labels, schedule, p) in zip(grid.flat, panels.values(), strict=False):
        taken = coin < p
        share = np.add.reduceat(taken.astype(float), edges[:-1]) / np.diff(edges)
        bars = {"color": COLOURS["sam"], "alpha": 0.35, "lw": 0, "label": f"SAM steps, seed {seed}'s coin"}
        axes.stairs(share, edges / total_steps, fill=True, **bars)
        of_p = {"color": "black", "lw": 1.2, "label": "p(t)"}
        if np.count_nonzero(np.diff(np.sign(np.diff(p)))) > 2 * BINS:
            means = np.add.reduceat(p, edges[:-1]) / np.diff(edges)
            axes.stairs(means, edges / total_steps, baseline=None, **of_p)
        else:
            axes.plot(np.arange(total_steps) / total_steps, p, **of_p)
        expected = expected_propagations(schedule, total_steps) - total_steps
        count = f"{taken.sum()} SAM steps, expected {expected:.1f}"
        count += f" ± {propagations_std(schedule, total_steps):.1f}"
        name = textwrap.fill(", ".join(label.replace(" ", "\N{NO-BREAK SPACE}") for label in labels), 42)
        axes.set_title(f"{name}\n{count}", fontsize=7)
        axes.set(xlim=(0, 1), ylim=(-0.03, 1.05), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.tick_params(labelsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(f"progress t/T (T = {total_steps} steps)", fontsize=9)
    figure.supylabel("probability of a SAM step", fontsize=9)
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def _by_eta(frame: pd.DataFrame, width: float, panels: int = 1) -> tuple[Figure, list[Axes], list[float]]:
    """A line a row, those of similar η under a heading, the same in each panel. Returns the figure, its
    panels, and each row's place on their y axes."""
    groups = {eta: rows.index for eta, rows in frame.groupby(_about(frame), sort=True)}
    places: dict[Any, float] = {}
    names: list[str] = []
    for eta, index in groups.items():
        names.append(f"η {'=' if eta in (1, 2) else '≈'} {eta:g}")
        for row in index:
            places[row] = len(names)
            names.append(_named(frame.loc[row]))
    figure = Figure(figsize=(width, 0.24 * len(names) + 0.9), dpi=150, layout="constrained")
    grid = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    grid[0].set_ylim(len(names) - 0.3, -0.7)
    grid[0].set_yticks(range(len(names)), names, fontsize=8)
    headings = set(range(len(names))) - set(places.values())
    for place in headings:
        grid[0].get_yticklabels()[place].set_fontweight("bold")
    for axes in grid:
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["left", "right", "top"]].set_visible(False)
    return figure, list(grid), [places[row] for row in frame.index]


def _about(frame: pd.DataFrame) -> pd.Series:
    """The measured η to the next 0.05: what the coin moves is less."""
    return (20 * frame["eta.mean"]).round() / 20


def _named(row: pd.Series) -> str:
    """The row's label, with its number of seeds where that is not the number asked for."""
    n = row["test_error.n"]
    return row["label"] if n == row["n_expected"] else f"{row['label']} (n = {n})"


def _looks(summary: Summary) -> dict[str, dict[str, Any]]:
    """Colour, dash and marker by label, whatever has run; no two of 20 rows look alike."""
    looks: dict[str, dict[str, Any]] = {
        summary.reference: {"color": COLOURS["sam"], "marker": MARKERS[1]},
        summary.baseline: {"color": COLOURS["sgd"], "marker": MARKERS[0]},
    }
    for i, label in enumerate(label for label in summary.frame["label"] if label not in looks):
        colour, marker = CYCLE[i % len(CYCLE)], MARKERS[2 + i % (len(MARKERS) - 2)]
        looks[label] = {"color": colour, "ls": DASHES[i % len(DASHES)], "marker": marker}
    return looks


def _draw_curves(lines: Mapping[str, np.ndarray], curves: pd.DataFrame, look: dict[str, Any]) -> None:
    epochs = curves.drop(columns="id").astype(float).groupby("epoch")
    mean, std = epochs.mean(), epochs.std()
    for name, line in lines.items():
        measured = mean.index[mean[name].notna()]  # the error is not measured after every epoch
        y, spread = mean.loc[measured, name], std.loc[measured, name]
        for axes, x in zip(line, (measured, mean.loc[measured, "propagations"]), strict=True):
            axes.plot(x, y, lw=1.2, ms=4, markevery=0.15 if len(x) > 1 else 1, **look)
            axes.fill_between(x, y - spread, y + spread, color=look["color"], alpha=0.1, lw=0)


def _plain_ticks(axis: Any) -> None:
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
