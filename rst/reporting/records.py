"""A protocol's results folder: the records that its tables are made of, and the index of all such folders."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from filelock import FileLock

from rst.reporting.pages import pipes
from rst.reporting.statistics import (
    HOW_SHARP,
    SHARPNESS,
    curves_frame,
    read_curves,
    read_runs,
    read_sharpness,
    runs_frame,
    sharpness_frame,
    write_curves,
    write_runs,
)


class Records(NamedTuple):
    """runs.csv, curves.csv and sharpness.csv of a results folder."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    sharpness: pd.DataFrame

    @property
    def joined(self) -> pd.DataFrame:
        """The runs with their sharpness, where any was measured."""
        if self.sharpness.empty:
            return self.runs
        how = {name: f"sharpness.{name}" for name in HOW_SHARP}
        measured = self.sharpness[["id", *SHARPNESS, *HOW_SHARP]].rename(columns=how)
        return self.runs.merge(measured, on="id", how="left")


class Finished(NamedTuple):
    """A completed run: result.json, the lines of metrics.jsonl, and sharpness.json where there is one."""

    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    sharpness: dict[str, Any] | None


def collect(folder: Path, finished: Iterable[Finished], lock_folder: Path) -> Records:
    """Add the runs to the records in `folder`, in place of older records of theirs. Returns all that the
    files then hold. A lock in `lock_folder` lets several processes do so at once."""
    lock_folder.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_folder / f".{folder.name}-results.lock"):
        frame, curves, sharpness = recorded_in(folder)
        runs = list(finished)
        if runs:
            older: list[Any] = frame.to_dict("records")
            frame = runs_frame([*older, *(run.result for run in runs)])
            new = curves_frame({run.result["id"]: run.metrics for run in runs})
            curves = _updated(curves, new).sort_values(["id", "epoch"], ignore_index=True)
        measured = sharpness_frame(run.sharpness for run in runs if run.sharpness)
        if len(measured) or len(sharpness):
            # Not what was measured of a run that has been done again since.
            sharpness = _updated(sharpness, measured).merge(frame[["id", "finished"]])
            sharpness = sharpness.sort_values("id", ignore_index=True)
            write_runs(sharpness, folder / "sharpness.csv")
        write_runs(frame, folder / "runs.csv")
        write_curves(curves, folder / "curves.csv")
    return Records(frame, curves, sharpness)


def _updated(older: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """With the new rows of a run in place of its older ones."""
    return pd.concat([older[~older["id"].isin(new["id"])], new])


def recorded_in(folder: Path) -> Records:
    """What a results folder has; empty frames for files that are not there."""
    runs, curves, sharpness = (folder / f"{name}.csv" for name in ("runs", "curves", "sharpness"))
    return Records(
        read_runs(runs) if runs.exists() else runs_frame([]),
        read_curves(curves) if curves.exists() else curves_frame({}),
        read_sharpness(sharpness) if sharpness.exists() else sharpness_frame([]),
    )


def index(results: Path) -> str:
    """The results folder's README.md: of each protocol's folder its tables with their files, runs, commits
    and dates, and links to the benchmarks, all of it read from what lies there."""
    parts = [
        "# Results",
        "Written with the tables. `make reproduce-tables PROTOCOL=… TABLE=…` runs what is missing of a table "
        "(`conf/table/`) under a protocol (`conf/protocol/`); one that is not listed here has not been run.",
    ]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        names = sorted(path.stem for path in folder.glob("*.md") if path.with_suffix(".csv").exists())
        if names and folder.name == "benchmark":  # of machines, not of runs
            parts += ["## benchmark", _links([folder / f"{name}.md" for name in names], results)]
        elif names:
            data = _links([folder / f"{name}.csv" for name in ("runs", "curves", "sharpness")], results)
            lines = [_index_line(folder, name, names) for name in names]
            pages = _links([folder / "FINDINGS.md", folder / "PILOT.md"], results)
            parts += [f"## {folder.name}", f"In words: {pages}" if pages else "", pipes(lines)]
            parts += [f"Runs and epochs: {data}" if data else ""]
    return "\n\n".join(filter(None, parts)) + "\n"


def _index_line(folder: Path, name: str, names: list[str]) -> dict[str, str]:
    """Title of the table `name`, links to its files, and its provenance."""

    def is_its_figure(path: Path) -> bool:  # a_b.png is table a's, unless there is a table a_b
        owners = [other for other in names if f"{path.stem}_".startswith(f"{other}_")]
        return path.suffix in (".png", ".pdf") and max(owners, key=len, default="") == name

    files = [folder / f"{name}.{suffix}" for suffix in ("md", "csv", "tex")]
    figures = sorted(filter(is_its_figure, folder.iterdir()))
    frame = pd.read_csv(files[1], dtype="string", keep_default_na=False)
    commits = sorted({commit for cell in frame["commit"] if cell for commit in cell.split("; ")})
    dates = sorted(date[:10] for date in [*frame["first_finished"], *frame["last_finished"]] if date)
    return {
        "Table": files[0].read_text().splitlines()[0].removeprefix("# "),
        "Files": _links(files, folder.parent),
        "Figures": _links(figures, folder.parent),
        "Runs": f"{sum(map(len, frame['runs'].str.split()))} of {sum(map(int, frame['n_expected']))}",
        "Commit": ", ".join(commits) + ", uncommitted changes" * any("True" in x for x in frame["dirty"]),
        "Finished (UTC)": " to ".join(sorted({dates[0], dates[-1]})) if dates else "not run",
    }


def _links(paths: Sequence[Path], results: Path) -> str:
    return ", ".join(f"[{p.name}]({p.relative_to(results).as_posix()})" for p in paths if p.exists())
