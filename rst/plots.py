"""Figures made from tables: readable in print and to colour-blind readers, the same bytes every time."""

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from rst.checkpoint import write_atomically
from rst.tables import MIN_SEEDS, Table

# Okabe and Ito's palette: a colour for each method. Each row has its marker, for print and for colour-blind
# readers.
COLOURS = {
    "sgd": "#000000",
    "sam": "#D55E00",
    "asam": "#E69F00",
    "gnp": "#CC79A7",
    "rst": "#0072B2",
    "grst": "#009E73",
}
MARKERS = "osD^vPX*<>hp"
GAP = 0.045  # of η between neighbouring points: room for a line of upright text
FOOT = 0.13  # of the axes' height, below the lowest interval: room for the lines to each row's η


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


def error_against_propagations(table: Table, path: Path) -> Figure:
    """Write a PNG of test error (mean, 95 % t-interval) against the measured average propagation count η.

    Rows of nearly the same η stand side by side, lowest error first, each joined to its own η on the axis.
    The Pareto front is of rows with at least 3 seeds, compared at *expected* η: between rows of one
    expected η the measured one differs only by the coin.
    """
    frame = table.frame[table.frame["status"] != "not run"]
    cost = frame["eta_expected.mean"].fillna(frame["eta.mean"]).round(2)
    frame = frame.assign(cost=cost).sort_values(["cost", "test_error_percent.mean"], kind="stable")
    eta, error = frame["eta.mean"].to_numpy(), frame["test_error_percent.mean"].to_numpy()
    half, n = frame["test_error_percent.half_width"].to_numpy(), list(frame["test_error_percent.n"])
    ends = np.nan_to_num(half)
    low, high = (error - ends).min(initial=np.inf), error + ends
    x = spread(eta, GAP)
    enough = np.flatnonzero(np.array(n) >= MIN_SEEDS)
    front = enough[pareto(frame["cost"].to_numpy()[enough], error[enough])]
    with style.context("default"):
        figure = Figure(figsize=(8, 5.5), dpi=150)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.09, 0.15, 0.89, 0.75))
        texts = []
        for i, (label, method) in enumerate(zip(frame["label"], frame["method"], strict=True)):
            colour, fill = COLOURS.get(method, "#56B4E9"), None if i in front else "white"
            marker = MARKERS[frame.index[i] % len(MARKERS)]  # its place in the table, whatever has run
            bar = None if np.isnan(half[i]) else half[i]
            drawn: dict[str, Any] = {"fmt": marker, "color": colour, "mfc": fill, "ms": 7, "capsize": 3}
            axes.errorbar(x[i], error[i], bar, label=label, zorder=3, **drawn)
            shown = label if n[i] == max(n) else f"{label} (n = {n[i]})"
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
        axes.set_ylabel("test error (%), mean and 95 % interval")
        seeds = f", n = {' to '.join(map(str, sorted({min(n), max(n)})))} seeds" if n else ""
        setting = textwrap.fill(table.setting + seeds, 110)  # characters that fit above the axes
        axes.set_title(f"{table.title}\n{setting}", fontsize=9)
        data = io.BytesIO()
        # Without the entry that names matplotlib's version.
        figure.savefig(data, format="png", metadata={"Software": None})
    write_atomically(path, lambda file: file.write(data.getvalue()))
    return figure
