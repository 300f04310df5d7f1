"""The records of finished runs, which tables are made from: runs.csv, curves.csv and sharpness.csv of a
protocol's results folder.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from filelock import FileLock

from rst.files import write_text

# Columns that stay text even where all of their values look like numbers.
TEXT = ("commit", "host", "ranks", "versions.python", "versions.torch", "versions.cuda", "versions.rst")
CURVES = ("id", "epoch", "propagations", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
SHARPNESS = ("loss", "lambda_max", "in_ball", "along")  # see rst/reporting/sharpness.py
# What sharpness.csv says of how it was measured; in `Records.joined` these are called sharpness.images etc.
HOW_SHARP = ("images", "directions", "rho", "commit", "dirty", "versions.torch", "host", "device_name")


class Finished(NamedTuple):
    """A completed run: result.json, the lines of metrics.jsonl, and sharpness.json where there is one."""

    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    sharpness: dict[str, Any] | None


class Records(NamedTuple):
    """`runs` has a line a run, `curves` a line an epoch of a run (propagations counted from the run's start),
    `sharpness` a line a run that was measured."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    sharpness: pd.DataFrame

    @property
    def joined(self) -> pd.DataFrame:
        """The runs, with their sharpness where any was measured."""
        measured = self.sharpness[["id", *SHARPNESS, *HOW_SHARP]]
        measured = measured.rename(columns={name: f"sharpness.{name}" for name in HOW_SHARP})
        return self.runs.merge(measured, on="id", how="left")


def records_of(finished: Iterable[Finished]) -> Records:
    """The records of these runs. Nested values become dotted columns, such as `seconds.train`."""
    finished = list(finished)
    runs = [_flat(run.result) for run in finished]
    curves = [{"id": run.result["id"], **line} for run in finished for line in run.metrics]
    measured = [_flat(run.sharpness) for run in finished if run.sharpness]
    return Records(
        _frame(runs, [*dict.fromkeys(["id", "finished", "seed", *(name for line in runs for name in line)])]),
        _frame(curves, CURVES),
        _frame(measured, ["id", "finished", *HOW_SHARP, *SHARPNESS]),
    )


def recorded_in(folder: Path) -> Records:
    """The records in `folder`; none where a file is not there."""
    empty = records_of([])._asdict()
    paths = {name: folder / f"{name}.csv" for name in empty}
    return Records(*(_read(path) if path.exists() else empty[name] for name, path in paths.items()))


def collect(folder: Path, finished: Iterable[Finished]) -> Records:
    """Add the runs to the records in `folder`, in place of older records of theirs. Returns all that the
    files then hold. Several processes may do so at once."""
    with FileLock(folder / ".lock"):
        new = records_of(finished)
        runs, curves, sharpness = map(_updated, recorded_in(folder), new)
        # Of a run that has been repeated since, the sharpness recorded is that of other weights.
        sharpness = sharpness.merge(runs[["id", "finished"]])
        choices = sorted(runs.filter(like="choices.").columns)
        _write(runs.sort_values([*choices, "seed", "id"]), folder / "runs.csv")
        _write(curves.sort_values(["id", "epoch"]), folder / "curves.csv")
        _write(sharpness.sort_values("id"), folder / "sharpness.csv")
        return recorded_in(folder)


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _updated(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([old[~old["id"].isin(new["id"])], new])


def _frame(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """With the types that a reader of the CSV file finds."""
    frame = pd.DataFrame(lines, columns=list(columns), dtype=object)  # as floats, integers would end in .0
    return _read(io.StringIO(_csv(frame)))


def _read(source: Path | io.StringIO) -> pd.DataFrame:
    types = dict.fromkeys(TEXT, "string")
    options: Any = {"dtype_backend": "numpy_nullable", "keep_default_na": False, "na_values": [""]}
    return pd.read_csv(source, dtype=types, low_memory=False, **options)


def _write(frame: pd.DataFrame, path: Path) -> None:
    if len(frame) or path.exists():
        write_text(path, _csv(frame))


def _csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, lineterminator="\n")
