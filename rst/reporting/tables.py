"""What a table asks for: its columns, their rows, and the runs of each row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rst.files import write_text
from rst.reporting.figures import (
    error_against_propagations,
    schedule_figure,
    sharpness_figure,
    training_curves,
)
from rst.reporting.pages import to_csv, to_markdown
from rst.reporting.records import Records
from rst.reporting.statistics import METRICS as METRICS
from rst.reporting.statistics import build_table
from rst.schedule import Schedule


@dataclass(frozen=True)
class Row:
    """A method with its settings: the command that reproduces it, the run id of each seed, and the published
    test error in percent, which needs a source."""

    label: str
    command: str
    runs: Mapping[int, str]
    published: float | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.published is not None and not self.source:
            raise ValueError(f"row {self.label!r}: the published value {self.published} needs a source")


@dataclass(frozen=True)
class Column:
    """One setting, in which all rows of a table are compared.

    Args:
        name: short, such as "noise-0.2"; "" where a table has one column.
        setting: in full: protocol, data, model, augmentation, epochs, batch size.
        rows: the same labels in every column of a table.
        split: the images that the error is measured on, "test" or "validation".
    """

    name: str
    setting: str
    rows: list[Row]
    split: str = "test"


@dataclass(frozen=True)
class Table:
    """Differences are to the row labelled `reference`, times relative to `baseline`'s. `metrics` are those of
    `METRICS` to show, None for the usual ones."""

    name: str
    title: str
    reference: str
    baseline: str
    columns: list[Column]
    metrics: tuple[str, ...] | None = None


def write_table(
    table: Table,
    records: Records,
    failures: Mapping[str, str],
    schedules: Mapping[str, Schedule],
    total_steps: int,
    seed: int,
    folder: Path,
    for_print: bool = False,
) -> list[Path]:
    """Write the table's page, its CSV and its figures to `folder`/<name of the table>. Returns the files.

    Args:
        failures: why runs failed, in a line, by run id.
        schedules: of each row's label, drawn for `total_steps` steps with the coin of `seed`.
        for_print: also the figures as PDF and the table as LaTeX.
    """
    folder = folder / table.name
    folder.mkdir(parents=True, exist_ok=True)
    report = [
        build_table(
            table.title,
            column.setting,
            column.rows,
            records.joined,
            table.reference,
            table.baseline,
            column=column.name,
            failures=failures,
            metrics=table.metrics,
            split=column.split,
        )
        for column in table.columns
    ]
    write_text(folder / "README.md", to_markdown(report))
    write_text(folder / "table.csv", to_csv(report))
    for column in report:
        place = folder if len(report) == 1 else folder / re.sub(r"[^A-Za-z0-9_.=-]+", "-", column.column)
        place.mkdir(exist_ok=True)
        error_against_propagations(column, place / "error")
        training_curves(column, records.curves, place / "curves")
        if set(" ".join(column.frame["runs"]).split()) & set(records.sharpness["id"]):
            sharpness_figure(column, records.sharpness, place / "sharpness")
    schedule_figure(schedules, total_steps, seed, folder / "schedules")
    return sorted(path for path in folder.rglob("*") if path.is_file())
