"""Figures made from tables, curves and schedules, each as PNG and PDF: readable in print and to colour-blind
readers, the same bytes every time."""

import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import patheffects, style, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from scipy.optimize import isotonic_regression

from rst.files import write_atomically
from rst.reporting.sharpness import ALPHAS
from rst.reporting.statistics import MIN_SEEDS, Statistics, estimate_of
from rst.schedule import Schedule, expected_propagations, propagations_std, uniform

# Okabe and Ito's palette, less its yellow, which is too light for lines on white: a colour for each method.
# Each row has its marker, for print and for colour-blind readers.
BLACK, VERMILION, SKY = "#000000", "#D55E00", "#56B4E9"
COLOURS = {
    "sgd": BLACK,
    "sam": VERMILION,
    "asam": "#E69F00",
    "gnp": "#CC79A7",
    "rst": "#0072B2",
    "grst": "#009E73",
}
MARKERS = "osD^vPX*<>hp"
# Of the curves, which are many of one method: black and vermilion are the baseline's and the reference's.
CURVE_COLOURS = ["#0072B2", "#009E73", "#E69F00", "#CC79A7", SKY]
DASHES = ["-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2))]
GAP = 0.045  # of η between neighbouring points: room for a line of upright text; less in a crowd
CROWD = 25  # rows that fit into the usual width
FOOT = 0.13  # of the axes' height, below the lowest interval: room for the lines to each row's η
ROWS_A_PANEL = 12  # as many curves as the eye can follow
MARKER_GAP = 0.17
FEW_STEPS, BINS = 300, 50  # steps up to which each is drawn; above, bins of steps
# The matplotlib defaults, whatever the user's settings; TrueType fonts, as publishers ask.
STYLE: Any = ["default", {"pdf.fonttype": 42}]


def spread(x: np.ndarray, gap: float) -> np.ndarray:
    """The positions closest to x (least squares), in the order given, at least `gap` apart."""
    steps = gap * np.arange(len(x))
    return isotonic_regression(x - steps).x + steps if len(x) else x


def pareto(cost: np.ndarray, error: np.ndarray) -> list[int]:
    """The indices, by cost, of the points with less error than every other of the same or lower cost."""
    front: list[int] = []
    for i in np.lexsort((error, cost)):
        if not front or error[i] < error[front[-1]]:
            front.append(int(i))
    return front


def error_against_propagations(table: Statistics, stem: Path) -> Figure:
    """Write test error (mean, 95 % t-interval) against the measured average propagation count η.

    Rows of nearly the same η stand side by side, lowest error first, each joined to its own η on the axis.
    The Pareto front is of rows with at least 3 seeds, compared at *expected* η: between rows of one
    expected η the measured one differs only by the coin.
    """
    frame = _finished(table)
    cost = frame["eta_expected.mean"].fillna(frame["eta.mean"]).round(2)
    frame = frame.assign(cost=cost).sort_values(["cost", "test_error_percent.mean"], kind="stable")
    eta, error = frame["eta.mean"].to_numpy(), frame["test_error_percent.mean"].to_numpy()
    half, n = frame["test_error_percent.half_width"].to_numpy(), list(frame["test_error_percent.n"])
    ends = np.nan_to_num(half)
    low, high = (error - ends).min(initial=np.inf), error + ends
    crowd = max(len(frame), 1)
    x = spread(eta, min(GAP, 0.8 / crowd))
    enough = np.flatnonzero(np.array(n) >= MIN_SEEDS)
    front = enough[pareto(frame["cost"].to_numpy()[enough], error[enough])]
    with style.context(STYLE):
        figure = Figure(figsize=(8 * max(1, crowd / CROWD), 5.5), dpi=150)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.09, 0.15, 0.89, 0.75))
        texts = []
        for i, method in enumerate(frame["method"]):
            colour, fill = COLOURS.get(method, SKY), None if i in front else "white"
            marker = MARKERS[frame.index[i] % len(MARKERS)]  # its place in the table, whatever has run
            bar = None if np.isnan(half[i]) else half[i]
            drawn: dict[str, Any] = {"fmt": marker, "color": colour, "mfc": fill, "ms": 7, "capsize": 3}
            axes.errorbar(x[i], error[i], bar, label=frame["label"].iloc[i], zorder=3, **drawn)
            shown = _named(frame)[i]
            text = axes.annotate(shown, (x[i], high[i]), (0, 7), textcoords="offset points", fontsize=9)
            text.set(rotation=90, ha="center", va="bottom", zorder=4, annotation_clip=False)
            text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
            texts.append(text)
        if len(frame):
            pixels = axes.get_window_extent().height
            tops = [text.get_window_extent(canvas.get_renderer()).height / pixels for text in texts]
            # The least height with room for every label above its interval.
            height = max(((high - low) / np.maximum(0.95 - FOOT - np.array(tops), 0.1)).max(), 0.1)
            bottom = low - FOOT * height
            axes.set_ylim(bottom, bottom + height)
            for i in range(len(x)):
                foot = [bottom, bottom + 0.06 * height, error[i] - ends[i]]
                axes.plot([eta[i], x[i], x[i]], foot, color="0.7", lw=0.8, zorder=1)
            lead = axes.lines[-1]
            (line,) = axes.plot(x[front], error[front], "--", color="0.4", lw=1.2, zorder=2)
            names = [f"Pareto front of the means (filled; n ≥ {MIN_SEEDS})"]
            names += ["leads to the row's η (rows of like η: lowest error first)"]
            figure.legend([line, lead], names, loc="lower center", ncols=2, frameon=False, fontsize=9)
        axes.set_xlim(min(0.93, x.min(initial=1) - GAP), max(2.07, x.max(initial=2) + GAP))
        axes.set_xticks(np.linspace(1, 2, 11))
        axes.grid(axis="y", color="0.93")
        axes.set_axisbelow(True)
        axes.set_xlabel("average propagation count η (forward-backward passes per step)")
        axes.set_ylabel(f"{table.split} error (%), mean and 95 % interval")
        axes.set_title(_title(table, frame, width=110), fontsize=9)
        _write(figure, stem)
    return figure


def schedule_figure(schedules: Mapping[str, Schedule], total_steps: int, seed: int, stem: Path) -> Figure:
    """Write p(t) of each distinct schedule against progress t/T, with the SAM steps that the coin of `seed`
    takes, `uniform(seed, t) < p(t)`: a line each, below p(t). Above 300 steps 50 bins show their share and
    the mean p(t). Equal schedules share a panel.
    """
    coin = np.array([uniform(seed, t) for t in range(total_steps)])
    panels: dict[bytes, tuple[list[str], Schedule, np.ndarray]] = {}
    for label, schedule in schedules.items():
        p = np.array([schedule(t, total_steps) for t in range(total_steps)])
        panels.setdefault(p.tobytes(), ([], schedule, p))[0].append(label.replace(" ", "\N{NO-BREAK SPACE}"))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    few = total_steps <= FEW_STEPS
    edges = np.linspace(0, total_steps, (total_steps if few else BINS) + 1).round().astype(int)
    with style.context(STYLE):
        size = (max(2.6 * columns, 5.2), 2.1 * lines + 0.9)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (labels, schedule, p) in zip(grid.flat, panels.values(), strict=False):
            taken = coin < p
            mean, share = (np.add.reduceat(x, edges[:-1]) / np.diff(edges) for x in (p, taken.astype(float)))
            if few:
                middles, look = (np.flatnonzero(taken) + 0.5) / total_steps, {"color": VERMILION, "lw": 0.6}
                axes.eventplot(middles, lineoffsets=-0.12, linelengths=0.14, label="SAM steps taken", **look)
            else:
                look = {"color": VERMILION, "alpha": 0.35, "lw": 0}
                axes.stairs(share, edges / total_steps, fill=True, label="share of SAM steps taken", **look)
            axes.stairs(mean, edges / total_steps, baseline=None, color=BLACK, lw=1.2, label="p(t)")
            expected = expected_propagations(schedule, total_steps) - total_steps
            count = f"{taken.sum()} SAM steps, expected {expected:.1f}"
            count += f" ± {propagations_std(schedule, total_steps):.1f}"
            name = textwrap.fill(", ".join(labels), 42)
            axes.set_title(f"{name}\nmean p = {expected / total_steps:.3f}\n{count}", fontsize=7)
            axes.set(xlim=(0, 1), ylim=(-0.22 if few else -0.03, 1.05))
            axes.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            axes.tick_params(labelsize=8)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        bins = "" if few else f", in {BINS} bins"
        figure.supxlabel(f"progress t/T (T = {total_steps} steps{bins}; seed {seed})", fontsize=9)
        figure.supylabel("probability of a SAM step", fontsize=9)
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
        _write(figure, stem)
    return figure


def training_curves(table: Statistics, curves: pd.DataFrame, stem: Path) -> Figure:
    """Write test error and training loss of each row against epochs and against propagations, which is where
    rows of unequal cost compare: mean over the seeds that reached the epoch, with a band of ± one standard
    deviation, on logarithmic scales. Above 12 rows the panels repeat, each with reference and baseline.
    """
    looks = _looks(table)
    for i, look in enumerate(looks.values()):
        # As fractions of the axes' diagonal; staggered, or they hide each other.
        look["markevery"] = (i % ROWS_A_PANEL * MARKER_GAP / ROWS_A_PANEL, MARKER_GAP)
    with style.context(STYLE):
        figure, panels = _panels(table, curves, height=7.5)
        for panel, rows in panels:
            grid = panel.subplots(2, 2, sharex="col", sharey="row")
            for label, row in rows.iterrows():
                runs = curves[curves["id"].isin(row["runs"].split())]
                _draw_curves(grid, runs, {"label": row["shown"], **looks[str(label)]})
            grid[0, 0].set_ylabel(f"{table.split} error (%), mean ± std")
            grid[1, 0].set_ylabel("training loss (nats), mean ± std")
            grid[1, 0].set_xlabel("epoch")
            grid[1, 1].set_xlabel("propagations (forward-backward passes)")
            for axes in grid.flat:
                axes.grid(color="0.93")
                axes.set_axisbelow(True)
                _logarithmic(axes)
            handles = grid[0, 0].get_legend_handles_labels()
            look = {"frameon": False, "fontsize": 8, "handlelength": 4}
            panel.legend(*handles, loc="outside lower center", ncols=4, **look)
        _write(figure, stem)
    return figure


def sharpness_figure(table: Statistics, sharpness: pd.DataFrame, stem: Path) -> Figure:
    """Write test error against λ_max (means, ± one standard deviation), and what the training loss gains
    along filter-normalised random directions (mean over seeds), for the rows of which runs were measured; the
    others are named, and so is a number of runs measured that is not all. Above 12 rows the panels repeat at
    the same scales, each with reference and baseline."""
    looks = _looks(table)
    with style.context(STYLE):
        figure, panels = _panels(table, sharpness, height=4.8)
        grids = [panel.subplots(1, 2) for panel, _ in panels]
        for grid in grids[1:]:
            for axes, first in zip(grid, grids[0], strict=True):
                axes.sharex(first)
                axes.sharey(first)
        for (panel, rows), (points, lines) in zip(panels, grids, strict=True):
            for label, row in rows.iterrows():
                measured, n = row["lambda_max.n"], row["test_error_percent.n"]
                few = f" (sharpness of {measured})" if measured < n else ""
                look = {"label": row["shown"] + few, **looks[str(label)]}
                error, top = estimate_of(row, "test_error_percent"), estimate_of(row, "lambda_max")
                dot = {key: value for key, value in look.items() if key != "ls"}
                bars = {"xerr": np.nan_to_num(top.std), "yerr": np.nan_to_num(error.std)}
                points.errorbar(top.mean, error.mean, **bars, lw=0.8, ms=6, **dot)
                curves = sharpness[sharpness["id"].isin(row["runs"].split())]["curve"]
                mean = np.mean([np.array(text.split(), dtype=float) for text in curves], axis=0)
                lines.plot(ALPHAS, mean, lw=1.2, ms=4, markevery=0.2, **look)
            points.set_xlabel("λ_max of the training loss's Hessian, mean ± std")
            points.set_ylabel(f"{table.split} error (%), mean ± std")
            lines.set_xlabel("distance α along a filter-normalised random direction d")
            lines.set_ylabel("L(θ + α·d) − L(θ) (nats)")
            for axes in (points, lines):
                axes.grid(color="0.93")
                axes.set_axisbelow(True)
            handles = lines.get_legend_handles_labels()
            panel.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        without = table.frame.loc[table.frame["lambda_max.n"] == 0, "label"]
        if len(without):
            note = textwrap.fill(f"not measured: {', '.join(without)}", 140)
            figure.supxlabel(note, fontsize=8)
        _write(figure, stem)
    return figure


def _looks(table: Statistics) -> dict[str, dict[str, Any]]:
    """Of each row by its place in the table, whatever has run. 5 colours and 4 dashes: no two of 20 rows look
    alike."""
    looks: dict[str, dict[str, Any]] = {
        table.reference: {"color": VERMILION, "marker": MARKERS[1]},
        table.baseline: {"color": BLACK, "marker": MARKERS[0]},
    }
    for i, label in enumerate(label for label in table.frame["label"] if label not in looks):
        colour, marker = CURVE_COLOURS[i % len(CURVE_COLOURS)], MARKERS[2 + i % (len(MARKERS) - 2)]
        looks[label] = {"color": colour, "ls": DASHES[i % len(DASHES)], "marker": marker}
    return looks


def _panels(
    table: Statistics, of_runs: pd.DataFrame, height: float
) -> tuple[Figure, list[tuple[SubFigure, pd.DataFrame]]]:
    """A figure with a panel for each 12 of the rows with a run in `of_runs`, reference and baseline in all of
    them. Of each panel its rows, by label; `shown` is what to call them. `height`: of a panel, in inches."""
    frame, known = _finished(table), set(of_runs["id"])
    frame = frame[frame["runs"].map(lambda runs: not known.isdisjoint(runs.split())).astype(bool)]
    always = [table.baseline, table.reference]
    chunks = _chunks([label for label in frame["label"] if label not in always], ROWS_A_PANEL - 2)
    figure = Figure(figsize=(10, height * len(chunks)), dpi=120, layout="constrained")
    figure.suptitle(_title(table, frame, width=150), fontsize=9)
    panels = figure.subfigures(len(chunks), 1, squeeze=False).flat
    drawn = frame.assign(shown=_named(frame)).set_index("label")
    rows = [drawn[drawn.index.isin([*always, *chunk])] for chunk in chunks]
    return figure, list(zip(panels, rows, strict=True))


def _chunks(labels: list[str], most: int) -> list[list[str]]:
    """As few parts as possible of at most `most`, of nearly equal length; of nothing, one empty part."""
    parts = max(1, -(-len(labels) // most))
    return [chunk.tolist() for chunk in np.array_split(np.array(labels, dtype=object), parts)]


def _draw_curves(grid: np.ndarray, curves: pd.DataFrame, look: dict[str, Any]) -> None:
    """A row's mean and band: test error above, training loss below; by epoch left, by propagations right."""
    curves = curves.assign(test_error=100 * (1 - curves["test_accuracy"]))
    epochs = curves.drop(columns="id").astype("float64").groupby("epoch")
    mean, std = epochs.mean(), epochs.std()
    for line, name in zip(grid, ("test_error", "train_loss"), strict=True):
        low, high = mean[name] - std[name], mean[name] + std[name]
        measured = mean[name].notna()  # not every epoch need be evaluated
        for axes, x in zip(line, (mean.index.to_series(), mean["propagations"]), strict=True):
            axes.plot(x[measured], mean[name][measured], lw=1.2, ms=4, **look)
            band = (of[measured] for of in (x, low, high))
            axes.fill_between(*band, color=look["color"], alpha=0.1, lw=0)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _finished(table: Statistics) -> pd.DataFrame:
    return table.frame[table.frame["test_error_percent.n"] > 0]


def _title(table: Statistics, frame: pd.DataFrame, width: int) -> str:
    """Title, setting and seeds; `width` is the number of characters that fit in a line."""
    n = frame["test_error_percent.n"]
    seeds = f", n = {' to '.join(map(str, sorted({n.min(), n.max()})))} seeds" if len(n) else ""
    return f"{table.title}\n{textwrap.fill(table.setting + seeds, width)}"


def _named(frame: pd.DataFrame) -> list[str]:
    """The rows' labels, with n where it is not the usual one."""
    n = frame["test_error_percent.n"]
    return [
        label if k == n.max() else f"{label} (n = {k})" for label, k in zip(frame["label"], n, strict=True)
    ]


def _write(figure: Figure, stem: Path) -> None:
    """Write <stem>.png and <stem>.pdf, without the entries that name matplotlib's version or the date."""
    without: dict[str, Any] = {
        "png": {"Software": None},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    }
    for suffix, metadata in without.items():
        path = stem.with_name(f"{stem.name}.{suffix}")
        write_atomically(path, partial(figure.savefig, format=suffix, metadata=metadata))
