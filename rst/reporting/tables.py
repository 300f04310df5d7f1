"""A table: what is asked for, and what the records say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rst.files import write_atomically, write_text
from rst.reporting import pages
from rst.reporting.records import SHARPNESS, Records
from rst.reporting.statistics import LOSSES, Summary, estimate, on_one_machine, paired_difference, values
from rst.schedule import Schedule


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    Args:
        command: reproduces it.
        runs: the run id of each seed.
        published: test error in percent, which needs a `source`.
        epochs_factor: its epochs over those of the table's baseline.
        folds: where a seed is trained on part seed modulo `folds` of the data, that number.
    """

    label: str
    command: str
    runs: Mapping[int, str]
    published: float | None = None
    source: str | None = None
    epochs_factor: float = 1.0
    folds: int | None = None

    def __post_init__(self) -> None:
        if self.published is not None and not self.source:
            raise ValueError(f"row {self.label!r}: the published value {self.published} needs a source")

    @property
    def units(self) -> dict[int, list[str]]:
        """The runs of each unit that rows are paired by: a seed or, with `folds`, a part of the data."""
        units: dict[int, list[str]] = {}
        for seed, run in self.runs.items():
            units.setdefault(self._unit(seed), []).append(run)
        return units

    def _unit(self, seed: int) -> int:
        return seed % self.folds if self.folds else seed

    @property
    def first_run(self) -> str:
        """The id of its first seed's run, whose settings but the seed are those of all."""
        return next(iter(self.runs.values()))

    def values(self, metric: str, records: pd.DataFrame) -> pd.Series:
        """A metric by unit: the mean of a unit's runs that the records have it of. Propagations per step are
        per step of the baseline, so that equal η is equal cost."""
        of_seeds = values(metric, self.runs, records)
        factor = self.epochs_factor if metric in ("eta", "eta_expected") else 1.0
        return factor * of_seeds.groupby(self._unit).mean()


@dataclass(frozen=True)
class Column:
    """One setting, in which all rows of a table are compared.

    Args:
        name: short, such as "noise-0.2", for a folder and a heading where the table has several columns.
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
    """Differences are to the row labelled `reference`, times relative to that labelled `baseline`. `metrics`
    are those of `rst.reporting.pages.METRICS` that the page shows, None for the usual ones.

    Raises:
        ValueError: for two rows with one label, a label that no row has, or an unknown metric.
    """

    name: str
    title: str
    reference: str
    baseline: str
    columns: list[Column]
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.metrics or ()) - set(pages.METRICS):
            raise ValueError(
                f"unknown metrics {', '.join(sorted(unknown))}; choose from {', '.join(pages.METRICS)}"
            )
        for column in self.columns:
            labels = [row.label for row in column.rows]
            if twice := {label for label in labels if labels.count(label) > 1}:
                raise ValueError(f"two rows with one label: {', '.join(sorted(twice))}")
            if unknown := {self.reference, self.baseline} - set(labels):
                raise ValueError(
                    f"no row is labelled {', '.join(sorted(unknown))}; rows: {', '.join(labels)}"
                )


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
        schedules: by label, of the rows that have one; drawn for `total_steps` steps with the coin of `seed`.
        for_print: also write the figures as PDF and the table as LaTeX.
    """
    from rst.reporting import figures  # here, as matplotlib takes a second, and a plan draws nothing

    folder = folder / table.name
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [summarize(table, column, records.joined, failures) for column in table.columns]
    drawn = {"schedules": figures.schedules(schedules, total_steps, seed)} if schedules else {}
    for summary in summaries:
        place = pages.place(summary, summaries)
        (folder / place).mkdir(exist_ok=True)
        of_column = figures.of_column(summary, records.curves)
        drawn |= {f"{place}{name}": figure for name, figure in of_column.items()}
    texts = {"README.md": pages.page(summaries, drawn), "table.csv": to_csv(summaries)}
    if for_print:
        texts["table.tex"] = pages.to_latex(summaries)
    for name, text in texts.items():
        write_text(folder / name, text)
    files = [folder / name for name in texts]
    for name, figure in drawn.items():
        for suffix in ("png", "pdf") if for_print else ("png",):
            files.append(folder / f"{name}.{suffix}")
            write_atomically(files[-1], partial(figure.savefig, format=suffix))
    ours = {folder / "table.tex", *folder.rglob("*.png"), *folder.rglob("*.pdf")}
    for path in ours.difference(files):  # of rows that have changed since
        path.unlink(missing_ok=True)
    return files


def summarize(table: Table, column: Column, records: pd.DataFrame, failures: Mapping[str, str]) -> Summary:
    """The statistics of each row over those of its runs that the records (`Records.joined`) have. A row is
    complete, partial, failed (no run finished and at least one failed) or not run."""
    rows = {row.label: row for row in column.rows}
    reference, baseline = rows[table.reference], rows[table.baseline]
    frame = pd.DataFrame([_line(row, reference, baseline, records, failures) for row in column.rows])
    names = (table.title, column.name, column.setting, column.split, table.reference, table.baseline)
    return Summary(*names, table.metrics, frame, "part" if baseline.folds else "seed")


def to_csv(summaries: Sequence[Summary]) -> str:
    """All that is known of each row of each column, numbers in full precision."""
    lines = [summary.frame.assign(column=summary.name, setting=summary.setting) for summary in summaries]
    frame = pd.concat(lines)
    first = ["column", "label"]
    return frame[[*first, *frame.columns.drop(first)]].to_csv(index=False, lineterminator="\n")


def _line(
    row: Row, reference: Row, baseline: Row, records: pd.DataFrame, failures: Mapping[str, str]
) -> dict[str, Any]:
    group = records[records["id"].isin([*row.runs.values()])]
    ids = set(group["id"])
    finished = {seed: run for seed, run in sorted(row.runs.items()) if run in ids}
    failed = {seed: failures[run] for seed, run in row.runs.items() if run in failures.keys() - ids}
    status = "partial" if finished else "failed" if failed else "not run"
    measured = {
        name: row.values(name, records)
        for name in ("test_error", *LOSSES, "eta", "eta_expected", "best_epoch_error", *SHARPNESS)
    }
    for other in (reference, baseline):
        theirs = other.values("test_error", records[:0] if other is row else records)
        measured[f"difference_to_{other.label}"] = paired_difference(measured["test_error"], theirs)
    estimates = {
        f"{name}.{part}": number
        for name, of_seeds in measured.items()
        for part, number in asdict(estimate(of_seeds)).items()
    }
    return {
        "label": row.label,
        "method": _distinct(group, "choices.method"),
        "status": "complete" if len(finished) == len(row.runs) else status,
        "n_expected": len(row.units),
        **estimates,
        "time": _relative_time(row, baseline, records),
        "published_error": np.nan if row.published is None else row.published,
        "published_source": row.source,
        "seeds": " ".join(map(str, finished)),
        "failures": _by_reason(failed),
        **{name: _distinct(group, name) for name in pages.RECORDED},
        "first_finished": group["finished"].min(),
        "last_finished": group["finished"].max(),
        "runs": " ".join(finished.values()),
        "command": row.command,
    }


def _by_reason(failed: Mapping[int, str]) -> str:
    seeds: dict[str, list[str]] = {}
    for seed, reason in sorted(failed.items()):
        seeds.setdefault(" ".join(reason.split()), []).append(str(seed))
    return "; ".join(f"seed{'s' * (len(s) > 1)} {' '.join(s)}: {reason}" for reason, s in seeds.items())


def _relative_time(row: Row, baseline: Row, records: pd.DataFrame) -> float:
    """Training seconds over the baseline's of the same unit: the median, as a shared machine has slow hours.
    nan where they are not from one machine."""
    both = records[records["id"].isin([*row.runs.values(), *baseline.runs.values()])]
    if not on_one_machine(both):
        return np.nan
    ours, theirs = (asked.values("seconds.train", records) for asked in (row, baseline))
    return float((ours / theirs).median())


def _distinct(runs: pd.DataFrame, column: str) -> str:
    """The values of `column` in `runs`, a missing one as none."""
    return "; ".join(sorted(set(runs[column].astype("string").fillna("none")))) if column in runs else ""
