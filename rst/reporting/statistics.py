"""From the records of finished runs to a table: runs.csv, curves.csv, statistics over seeds.

Test error is 100·(1 − accuracy) in percent, at the last epoch. A table is a function of runs.csv and the rows
asked for: the same runs.csv gives the same table. `rst.reporting.pages` writes it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from rst.files import write_text

SHARPNESS = ("loss", "lambda_max", "in_ball", "along")  # see rst/reporting/sharpness.py

# The leading columns of runs.csv; the others (choices.*, later additions) are text and follow by name. Types
# are fixed, not inferred: read as a number, the id 1e234567 would be infinite.
_COLUMNS = {
    "string": "id name command finished commit host device device_name ranks "
    "versions.python versions.torch versions.cuda versions.rst",
    "boolean": "dirty",
    "Int64": "schema seed epochs steps sam_steps propagations skipped_steps best_epoch peak_memory_bytes "
    "threads",
    "float64": "expected_propagations propagations_std test_accuracy best_test_accuracy test_loss "
    "train_accuracy train_loss seconds.train seconds.evaluate seconds.data seconds.total images_per_second",
}
_TYPES = {column: dtype for dtype, columns in _COLUMNS.items() for column in columns.split()}
_CURVE_TYPES = {"id": "string", "epoch": "Int64", "propagations": "Int64"} | dict.fromkeys(
    ("train_loss", "train_accuracy", "test_loss", "test_accuracy"), "float64"
)
# How a run's sharpness was measured: columns of sharpness.csv, and with "sharpness." before them of runs.
HOW_SHARP = ("images", "directions", "commit", "dirty", "versions.torch", "host", "device_name")
_SHARPNESS_TYPES = (
    dict.fromkeys(("id", "finished", "curve", *HOW_SHARP), "string")
    | dict.fromkeys(("images", "directions"), "Int64")
    | dict.fromkeys(("rho", *SHARPNESS), "float64")
)
# What a table may show of a row. Its CSV holds everything.
METRICS = (
    "test_error",
    "interval",
    "difference_to_reference",
    "difference_to_baseline",
    "eta",
    "eta_expected",
    "time",
    "best_epoch",
    *SHARPNESS,
    "published",
)
MIN_SEEDS = 3  # a spread over fewer says next to nothing: marked †, and no difference is claimed from it


def runs_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row a run, nested values as dotted columns (`seconds.train`), the same for any order of `records`.
    Of two records with one id the one finished last stays."""
    frame = pd.json_normalize(list(records))
    others = sorted(set(frame.columns) - set(_TYPES))
    frame = frame.reindex(columns=[*_TYPES, *others]).astype(_TYPES | dict.fromkeys(others, "string"))
    frame = frame.replace("", pd.NA)  # a CSV cell cannot tell "" from a missing value
    frame = frame.sort_values(["finished", "id"]).drop_duplicates("id", keep="last")
    choices = [column for column in others if column.startswith("choices.")]
    return frame.sort_values([*choices, "seed", "id"], ignore_index=True)


def write_runs(frame: pd.DataFrame, path: Path) -> None:
    """Write runs.csv atomically: floats in their shortest exact form, missing values as empty cells."""
    text = frame.to_csv(index=False, lineterminator="\n")
    write_text(path, text)


def read_runs(path: Path) -> pd.DataFrame:
    """The frame given to `write_runs`, equal in every value and type. A column that is younger than the file
    is empty."""
    frame = _read_text(path)
    frame = frame.reindex(columns=[*_TYPES, *(name for name in frame if name not in _TYPES)])
    return frame.astype(_TYPES)


def curves_frame(metrics: Mapping[str, Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
    """From the epochs' metrics of each run id: a line an epoch, by id and epoch. Propagations are counted
    from the run's start, losses in nats."""
    lines = [{"id": run, **epoch} for run, epochs in metrics.items() for epoch in epochs]
    frame = pd.DataFrame(lines).reindex(columns=[*_CURVE_TYPES]).astype(_CURVE_TYPES)
    return frame.sort_values(["id", "epoch"], ignore_index=True)


def sharpness_frame(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """From the runs' sharpness.json: a line a run. `curve` is text, the numbers parted by spaces; `finished`
    says when the run that was measured finished."""
    lines = [{**record, "curve": " ".join(map(repr, record["curve"]))} for record in records]
    frame = pd.json_normalize(lines).reindex(columns=[*_SHARPNESS_TYPES]).astype(_SHARPNESS_TYPES)
    return frame.sort_values("id", ignore_index=True)


def read_sharpness(path: Path) -> pd.DataFrame:
    """The frame given to `write_runs`, equal in every value and type."""
    return _read_text(path).astype(_SHARPNESS_TYPES)


def write_curves(frame: pd.DataFrame, path: Path) -> None:
    """Write curves.csv as `write_runs` writes runs.csv."""
    write_runs(frame, path)


def read_curves(path: Path) -> pd.DataFrame:
    """The frame given to `write_curves`, equal in every value and type."""
    return _read_text(path).astype(_CURVE_TYPES)


def _read_text(path: Path) -> pd.DataFrame:
    # Numbers by way of text: pandas' own parser may round the last digit.
    types = defaultdict(lambda: "string", dirty="boolean")
    return pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])


@dataclass(frozen=True)
class Estimate:
    """Mean, sample standard deviation and half width of the 95 % t-interval of n values; nan where n is too
    small to give them."""

    mean: float
    std: float
    half_width: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def is_evidence(self) -> bool:
        """Not for n < 3, nor where all values are equal: on a few hundred test images equal differences are
        common, and their interval of width 0 is no evidence."""
        return self.n >= MIN_SEEDS and self.std > 1e-9

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0; never where it is no evidence."""
        return self.is_evidence and abs(self.mean) > self.half_width


def estimate(values: Iterable[float]) -> Estimate:
    """mean ± t(0.975, n−1)·s/√n with s² = Σ(x − mean)²/(n−1). A nan among the values shows as nan."""
    x = pd.array(list(values), dtype="Float64").to_numpy(np.float64, na_value=np.nan)
    if x.size < 2:
        return Estimate(float(x[0]) if x.size else np.nan, np.nan, np.nan, x.size)
    std = float(x.std(ddof=1))
    return Estimate(float(x.mean()), std, float(stats.t.ppf(0.975, x.size - 1)) * std / x.size**0.5, x.size)


def paired_difference(values: pd.Series, reference: pd.Series) -> Estimate:
    """`values` − `reference`, both indexed by seed, over the seeds that both have."""
    common = sorted(set(values.index) & set(reference.index))
    return estimate(values.loc[common] - reference.loc[common])


@dataclass(frozen=True)
class Statistics:
    """`frame` has a line for each `Row`, in their order, with numeric columns (errors in percent, differences
    in percentage points); `setting` names data, model and epochs, `column` the same in short; `provenance`
    says where the numbers come from; `metrics` are those of `METRICS` to show, None for the usual ones."""

    title: str
    setting: str
    column: str
    frame: pd.DataFrame
    provenance: list[str]
    reference: str
    baseline: str
    metrics: tuple[str, ...] | None
    split: str = "test"  # the images that the error is of: test or validation


def build_table(
    title: str,
    setting: str,
    rows: Sequence[Any],
    runs: pd.DataFrame,
    reference: str = "SAM",
    baseline: str = "SGD",
    *,
    column: str = "",
    failures: Mapping[str, str] = MappingProxyType({}),
    metrics: Sequence[str] | None = None,
    split: str = "test",
) -> Statistics:
    """The statistics of each row over those of its runs that `runs` has, those of sharpness where it has the
    columns of `SHARPNESS`, joined by id. Differences are to the rows labelled
    `reference` and `baseline`, times relative to `baseline`'s.

    A row is complete, partial, failed (no run finished, and at least one failed), or not run.

    Args:
        column: the setting in short; without it, `setting` itself.
        failures: why runs failed, in a line, by run id. Those in `runs` have finished since.
        metrics: what of `METRICS` is shown, in this order.
        split: what the error is of, "test" or "validation".

    Raises ValueError for two rows with one label, a label that no row has, an unknown metric, a run of
    another seed than its row says.
    """
    labels = [row.label for row in rows]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two rows with one label: {', '.join(sorted(repeated))}")
    if unknown := {reference, baseline} - set(labels):
        raise ValueError(f"no row is labelled {', '.join(sorted(unknown))}; rows: {', '.join(labels)}")
    if unknown := set(metrics or ()) - set(METRICS):
        raise ValueError(f"unknown metrics: {', '.join(sorted(unknown))}; choose from {', '.join(METRICS)}")
    found = {}
    for row in rows:
        group = runs[runs["id"].isin([*row.runs.values()])].set_index("seed").sort_index()
        if not group["id"].to_dict().items() <= row.runs.items():
            raise ValueError(f"row {row.label!r}: the seeds of its runs are not those asked for: {row.runs}")
        found[row.label] = group
    frame = pd.DataFrame([_line(row, found, failures, reference, baseline) for row in rows])
    used = pd.concat([group.reset_index().assign(label=label) for label, group in found.items()])
    shown = None if metrics is None else tuple(metrics)
    sources = provenance(used, frame)
    return Statistics(title, setting, column or setting, frame, sources, reference, baseline, shown, split)


def _line(
    row: Any, found: dict[str, pd.DataFrame], failures: Mapping[str, str], reference: str, baseline: str
) -> dict[str, Any]:
    group, asked = found[row.label], len(row.runs)
    unfinished = {seed: run for seed, run in sorted(row.runs.items()) if seed not in group.index}
    failed = {seed: " ".join(failures[run].split()) for seed, run in unfinished.items() if run in failures}
    error = 100 * (1 - group["test_accuracy"])
    statistics = {"test_error_percent": estimate(error)}
    for name in (reference, baseline):
        other = found[name].iloc[: 0 if name == row.label else None]  # no difference to itself
        theirs = 100 * (1 - other["test_accuracy"])
        statistics[f"difference_to_{name}"] = paired_difference(error, theirs)
    statistics["eta"] = estimate(group["propagations"] / group["steps"])
    statistics["eta_expected"] = estimate(group["expected_propagations"] / group["steps"])
    statistics["train_seconds"] = estimate(group["seconds.train"])
    for name in SHARPNESS:
        if name in group:
            statistics[name] = estimate(group[name].dropna())
    statistics["best_epoch_error_percent"] = estimate(100 * (1 - group["best_test_accuracy"]))
    status = ("failed" if failed else "not run") if group.empty else "partial" if unfinished else "complete"
    recorded = ("commit", "dirty", "versions.torch", "versions.cuda", "device", "device_name", "host")
    return {
        "label": row.label,
        "method": _distinct(group, "choices.method"),
        "train_steps": group["steps"].max() if len(group) else np.nan,
        "status": status,
        "n_expected": asked,
        **{f"{name}.{part}": x for name, value in statistics.items() for part, x in asdict(value).items()},
        f"time_relative_to_{baseline}": _relative_time(group, found[baseline]),
        "published_error_percent": np.nan if row.published is None else row.published,
        "published_source": row.source,
        "seeds": " ".join(map(str, group.index)),
        "first_failure": next(iter(failed.values()), ""),
        "failures": _by_reason(failed),
        **{column: _distinct(group, column) for column in recorded},
        "first_finished": group["finished"].min(),
        "last_finished": group["finished"].max(),
        "runs": " ".join(group["id"]),
        "command": row.command,
    }


def _by_reason(failed: Mapping[int, str]) -> str:
    seeds: dict[str, list[str]] = {}
    for seed, reason in failed.items():
        seeds.setdefault(reason, []).append(str(seed))
    return "; ".join(f"seed{'s' * (len(s) > 1)} {' '.join(s)}: {reason}" for reason, s in seeds.items())


def _relative_time(group: pd.DataFrame, baseline: pd.DataFrame) -> float:
    both = pd.concat([group, baseline])
    kind = both["device"].str.split(":").str[0]  # cuda:0 and cuda:1 of one name are equals
    machines = both[["host", "device_name", "ranks", "threads"]].assign(kind=kind).drop_duplicates()
    if group.empty or baseline.empty or len(machines) > 1 or machines.isna().any(axis=None):
        return np.nan
    # A median, since a shared machine has slow hours; nan where no seed is shared.
    return float((group["seconds.train"] / baseline["seconds.train"]).median())


def _distinct(runs: pd.DataFrame, column: str) -> str:
    """The values of `column` in `runs`, a missing one as none."""
    values = set(runs[column].astype("string").fillna("none")) if column in runs else set()
    return "; ".join(sorted(values))


def _spread(name: str, frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The one value of `columns`, or each value with the rows that have it."""
    keys = [column.split(".")[-1] for column in columns]
    labels: dict[str, dict[str, None]] = {}
    for label, *values in frame[["label", *columns]].astype("string").fillna("none").itertuples(index=False):
        text = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
        labels.setdefault(text, {})[label] = None
    if len(labels) == 1:
        return f"{name}: {next(iter(labels))}."
    parts = [f"{text} ({', '.join(labels[text])})" for text in sorted(labels)]
    return f"{name}, MIXED: {'; '.join(parts)}."


def provenance(runs: pd.DataFrame, frame: pd.DataFrame) -> list[str]:
    """Where the numbers come from that `frame`, lines of `frame`, has of `runs`, with their `label`:
    how many runs, of when, their seeds, code, software and machine. What differs is said of each row."""
    if runs.empty:
        return ["No run has finished."]
    days = sorted({runs["finished"].min()[:10], runs["finished"].max()[:10]})
    return [
        f"Runs: {runs['id'].nunique()}, finished {' to '.join(days)} (UTC).",
        _spread("Sample", frame[frame["seeds"] != ""], ["test_error_percent.n", "seeds"]),
        _spread("Code", runs, ["commit", "dirty"]),
        _spread("Software", runs, [f"versions.{part}" for part in ("python", "torch", "cuda", "rst")]),
        _spread("Machine", runs, ["host", "device", "device_name", "ranks", "threads"]),
        *_sharpness_provenance(runs),
    ]


def _sharpness_provenance(runs: pd.DataFrame) -> list[str]:
    measured = runs[runs["sharpness.images"].notna()] if "sharpness.images" in runs else runs[:0]
    return (
        [_spread("Sharpness", measured, [f"sharpness.{name}" for name in HOW_SHARP])] if len(measured) else []
    )


def estimate_of(line: pd.Series | dict[Any, Any], name: str) -> Estimate:
    """The estimate that a line of `frame` holds in its columns `name`.mean, .std, .half_width, .n."""
    return Estimate(*(line[f"{name}.{part}"] for part in ("mean", "std", "half_width", "n")))
