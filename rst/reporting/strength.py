"""Does only the product p·γ·ρ matter? A protocol's rows by the strength of their regularization."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rst.reporting.figures import COLOURS, marker_of
from rst.reporting.statistics import LOSSES, MIN_SEEDS, estimate, paired_difference
from rst.reporting.tables import Table

METRICS = {"test_error": "Test error (points)"}
METRICS |= {name: heading.format(Split="Test") for name, heading in LOSSES.items()}
MARKERS = {"early": "v", "even": "o", "late": "^"}  # by when most of the SAM steps are


class Strength(NamedTuple):
    """p̄·γ·ρ, and one of `MARKERS`."""

    product: float
    when: str


def comparable(tables: Sequence[Table], strengths: Mapping[str, Strength]) -> list[Table]:
    """Single-column tables whose reference is another row than the baseline and has a strength, in the first
    one's setting.

    Args:
        strengths: by run id.
    """

    def is_relative(table: Table) -> bool:
        (reference,) = (row for row in table.columns[0].rows if row.label == table.reference)
        whole = strengths.get(reference.first_run)
        return table.reference != table.baseline and whole is not None and whole.product > 0

    tables = [table for table in tables if len(table.columns) == 1 and is_relative(table)]
    return [table for table in tables if table.columns[0].setting == tables[0].columns[0].setting]


def points(tables: Sequence[Table], strengths: Mapping[str, Strength], records: pd.DataFrame) -> pd.DataFrame:
    """A line for each row of the `comparable` tables that has a strength, and seeds that the baseline has,
    too: its label, method and strength relative to the reference's, and the estimate of each metric's
    difference to the baseline, paired by seed or part. What several tables have counts once.

    Args:
        strengths: by run id.
    """
    lines = {}
    for table in tables:
        rows = {row.label: row for row in table.columns[0].rows}
        baseline = rows[table.baseline]
        whole = strengths[rows[table.reference].first_run].product
        for row in rows.values():
            runs = records[records["id"].isin(list(row.runs.values()))]
            if row is baseline or runs.empty or (strength := strengths.get(row.first_run)) is None:
                continue
            line = {"label": row.label, "method": runs["choices.method"].iloc[0], "when": strength.when}
            line["strength"] = strength.product / whole
            for metric in METRICS:
                gap = paired_difference(row.values(metric, records), baseline.values(metric, records))
                line |= {f"{metric}.{part}": x for part, x in asdict(estimate(gap)).items()}
            if line["test_error.n"]:
                lines[row.first_run] = line
    return pd.DataFrame(lines.values())


def figure(frame: pd.DataFrame, baseline: str, reference: str) -> Figure:
    """Each metric that was measured, as a difference to the baseline with its 95 % interval, against the
    strength; rows of one strength side by side."""
    measured = [metric for metric in METRICS if frame[f"{metric}.n"].any()]
    lines = -(-len(measured) // 2)
    drawn = Figure(figsize=(9, 3.6 * lines + 0.4), dpi=150, layout="constrained")
    panels = list(drawn.subplots(lines, 2, squeeze=False).flat)
    for axes in panels[len(measured) :]:
        axes.set_axis_off()
    frame = frame.sort_values(["strength", "label"], kind="stable")
    alike = frame.groupby(frame["strength"].round(2))["label"]
    x = frame["strength"] + 0.014 * (alike.cumcount() - (alike.transform("size") - 1) / 2)
    for axes, metric in zip(panels, measured, strict=False):
        axes.axhline(0, color="0.4", lw=0.9, ls="--")
        for at, row in zip(x, frame.to_dict("records"), strict=True):
            mean, half = row[f"{metric}.mean"], row[f"{metric}.high"] - row[f"{metric}.mean"]
            enough = row[f"{metric}.n"] >= MIN_SEEDS
            look = marker_of(row["method"], enough) | {"fmt": MARKERS[row["when"]], "ms": 4.5, "lw": 1}
            axes.errorbar(at, mean, np.nan_to_num(half) if enough else 0.0, **look)
        axes.set_title(f"{METRICS[metric]}, difference to {baseline}", fontsize=9)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    drawn.supxlabel(
        f"p·γ·ρ relative to that of {reference} (equal ones side by side); 95 % intervals", fontsize=9
    )
    names = {name: name.upper().replace("GRST", "G-RST") for name in COLOURS if name in set(frame["method"])}
    handles = [Line2D([], [], color=COLOURS[k], marker="s", ls="", label=name) for k, name in names.items()]
    handles += [
        Line2D([], [], color="0.4", marker=m, ls="", label=f"SAM steps {k}") for k, m in MARKERS.items()
    ]
    drawn.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    return drawn
