"""From the records of finished runs to a table: runs.csv, statistics over seeds, Markdown and CSV.

Test error is 100·(1 − accuracy) in percent, at the last epoch. A table is a function of runs.csv and the rows
asked for: the same runs.csv gives the same table, byte for byte.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from rst.checkpoint import write_atomically

# The leading columns of runs.csv; the others (choices.*, later additions) are text and follow by name. Types
# are fixed, not inferred: read as a number, the id 1e234567 would be infinite.
_COLUMNS = {
    "string": "id name command finished commit host device device_name "
    "versions.python versions.torch versions.cuda versions.rst",
    "boolean": "dirty",
    "Int64": "schema seed epochs steps sam_steps propagations best_epoch peak_memory_bytes threads",
    "float64": "expected_propagations propagations_std test_accuracy best_test_accuracy test_loss "
    "train_accuracy train_loss seconds.train seconds.evaluate seconds.data seconds.total images_per_second",
}
_TYPES = {column: dtype for dtype, columns in _COLUMNS.items() for column in columns.split()}
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
    write_atomically(path, lambda file: file.write(text.encode()))


def read_runs(path: Path) -> pd.DataFrame:
    """The frame given to `write_runs`, equal in every value and type."""
    # Numbers by way of text: pandas' own parser may round the last digit.
    types = defaultdict(lambda: "string", dirty="boolean")
    frame = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
    return frame.astype({name: dtype for name, dtype in _TYPES.items() if name in frame})


@dataclass(frozen=True)
class Estimate:
    """Mean, sample standard deviation and half width of the 95 % t-interval of n values; nan where n is too
    small to give them."""

    mean: float
    std: float
    half_width: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0. Never for n < 3, nor where all values are equal: on a few hundred
        test images equal differences are common, and their interval of width 0 is no evidence."""
        return self.n >= MIN_SEEDS and self.std > 1e-9 and abs(self.mean) > self.half_width


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
class Row:
    """A row asked for: its label, the command that reproduces it, the ids of its runs (one a seed), and the
    published test error in percent, which needs a source."""

    label: str
    command: str
    runs: Sequence[str]
    published: float | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.published is not None and not self.source:
            raise ValueError(f"row {self.label!r}: the published value {self.published} needs a source")


@dataclass(frozen=True)
class Table:
    """`frame` has a line for each `Row`, in their order, with numeric columns (errors in percent, differences
    in percentage points); `setting` names data, model and epochs; `provenance` says where the numbers come
    from."""

    title: str
    setting: str
    frame: pd.DataFrame
    provenance: list[str]
    reference: str
    baseline: str


def build_table(
    title: str,
    setting: str,
    rows: Sequence[Row],
    runs: pd.DataFrame,
    reference: str = "SAM",
    baseline: str = "SGD",
) -> Table:
    """The statistics of each row over those of its runs that `runs` has. Differences are to the rows labelled
    `reference` and `baseline`, times relative to `baseline`'s.

    Raises ValueError for two rows with one label, a label that no row has, two runs of one seed in a row.
    """
    labels = [row.label for row in rows]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two rows with one label: {', '.join(sorted(repeated))}")
    if unknown := {reference, baseline} - set(labels):
        raise ValueError(f"no row is labelled {', '.join(sorted(unknown))}; rows: {', '.join(labels)}")
    found = {row.label: runs[runs["id"].isin([*row.runs])].set_index("seed").sort_index() for row in rows}
    for label, group in found.items():
        if not group.index.is_unique:
            raise ValueError(f"row {label!r} has two runs of one seed: {', '.join(group['name'])}")
    frame = pd.DataFrame([_line(row, found, reference, baseline) for row in rows])
    used = pd.concat([group.reset_index().assign(label=label) for label, group in found.items()])
    return Table(title, setting, frame, _provenance(used, frame), reference, baseline)


def _line(row: Row, found: dict[str, pd.DataFrame], reference: str, baseline: str) -> dict[str, Any]:
    group, asked = found[row.label], len(set(row.runs))
    error = 100 * (1 - group["test_accuracy"])
    statistics = {"test_error_percent": estimate(error)}
    for name in (reference, baseline):
        other = found[name].iloc[: 0 if name == row.label else None]  # no difference to itself
        theirs = 100 * (1 - other["test_accuracy"])
        statistics[f"difference_to_{name}"] = paired_difference(error, theirs)
    statistics["eta"] = estimate(group["propagations"] / group["steps"])
    statistics["eta_expected"] = estimate(group["expected_propagations"] / group["steps"])
    statistics["train_seconds"] = estimate(group["seconds.train"])
    statistics["best_epoch_error_percent"] = estimate(100 * (1 - group["best_test_accuracy"]))
    return {
        "label": row.label,
        "method": _distinct(group, "choices.method"),
        "status": "not run" if group.empty else "partial" if len(group) < asked else "complete",
        "n_expected": asked,
        **{f"{name}.{part}": x for name, value in statistics.items() for part, x in asdict(value).items()},
        f"time_relative_to_{baseline}": _relative_time(group, found[baseline]),
        "published_error_percent": np.nan if row.published is None else row.published,
        "published_source": row.source,
        "seeds": " ".join(map(str, group.index)),
        "commits": _distinct(group, "commit"),
        "dirty": _distinct(group, "dirty"),
        "runs": " ".join(group["id"]),
        "command": row.command,
    }


def _relative_time(group: pd.DataFrame, baseline: pd.DataFrame) -> float:
    both = pd.concat([group, baseline])
    kind = both["device"].str.split(":").str[0]  # cuda:0 and cuda:1 of one name are equals
    machines = both[["host", "device_name", "threads"]].assign(kind=kind).drop_duplicates()
    if group.empty or baseline.empty or len(machines) > 1 or machines.isna().any(axis=None):
        return np.nan
    return estimate(group["seconds.train"]).mean / estimate(baseline["seconds.train"]).mean


def _distinct(runs: pd.DataFrame, column: str) -> str:
    values = set(runs[column].dropna()) if column in runs else set()
    return "/".join(sorted(map(str, values)))


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


def _provenance(runs: pd.DataFrame, frame: pd.DataFrame) -> list[str]:
    if runs.empty:
        return ["No run has finished."]
    days = sorted({runs["finished"].min()[:10], runs["finished"].max()[:10]})
    return [
        f"Runs: {runs['id'].nunique()}, finished {' to '.join(days)} (UTC).",
        _spread("Sample", frame[frame["status"] != "not run"], ["test_error_percent.n", "seeds"]),
        _spread("Code", runs, ["commit", "dirty"]),
        _spread("Software", runs, [f"versions.{part}" for part in ("python", "torch", "cuda", "rst")]),
        _spread("Machine", runs, ["host", "device", "device_name", "threads"]),
    ]


def to_markdown(table: Table) -> str:
    """Title, setting, a GitHub pipe table, the notes needed to read it, and the provenance."""
    cells = [_cells(table, line) for line in table.frame.to_dict("records")]
    body = tabulate(cells, headers="keys", tablefmt="pipe", disable_numparse=True)
    notes = "\n".join(f"- {note}" for note in [*_notes(table), *table.provenance])
    return f"# {table.title}\n\n{table.setting}\n\n{body}\n\n{notes}\n"


def write_table(table: Table, path: Path) -> None:
    """Write `to_markdown` to a path that ends in .md; to one in .csv `table.frame`, the numbers in full
    precision, one column each. Other endings raise ValueError."""
    if path.suffix == ".md":
        text = to_markdown(table)
    elif path.suffix == ".csv":
        text = table.frame.to_csv(index=False, lineterminator="\n")
    else:
        raise ValueError(f"{path}: a table is written as .md or .csv")
    write_atomically(path, lambda file: file.write(text.encode()))


def estimate_of(line: pd.Series | dict[Any, Any], name: str) -> Estimate:
    """The estimate that a line of `Table.frame` holds in its columns `name`.mean, .std, .half_width, .n."""
    return Estimate(*(line[f"{name}.{part}"] for part in ("mean", "std", "half_width", "n")))


def _cells(table: Table, line: dict[Any, Any]) -> dict[str, str]:
    error, time = estimate_of(line, "test_error_percent"), line[f"time_relative_to_{table.baseline}"]
    asked = f" of {line['n_expected']}" if line["status"] == "partial" else ""
    cells = {
        "Test error, last epoch (%)": f"{_mean(error)} {_count(error, asked)}",
        "95 % interval": _interval(error) or "–",
    }
    for name in dict.fromkeys((table.reference, table.baseline)):
        gap = estimate_of(line, f"difference_to_{name}")
        parts = [_number(gap.mean, "+"), _interval(gap, "+"), _count(gap), "*" * gap.excludes_zero]
        cells[f"Difference to {name} (points)"] = " ".join(filter(None, parts)) if gap.n else "–"
    cells |= {
        "η measured": f"{line['eta.mean']:.3f}",
        "η expected": f"{line['eta_expected.mean']:.3f}",
        f"Time / {table.baseline}'s": "" if np.isnan(time) else f"{time:.2f}",
        "Best epoch (%), chosen on test data": _mean(estimate_of(line, "best_epoch_error_percent")),
    }
    if line["status"] == "not run":
        cells = dict.fromkeys(cells, "not run")
    published = line["published_error_percent"]
    published = "unknown" if np.isnan(published) else f"{published:g} ({line['published_source']})"
    cells = {"Method": line["label"], **cells, "Published (%)": published, "Command": f"`{line['command']}`"}
    return {name.replace("|", "\\|"): text.replace("|", "\\|") for name, text in cells.items()}


def _number(x: float, sign: str = "") -> str:
    return f"{round(x, 2) + 0.0:{sign}.2f}".replace("-", "−")  # + 0.0: no negative zero


def _mean(value: Estimate) -> str:
    return _number(value.mean) + (f" ± {value.std:.2f}" if value.n > 1 else "")


def _interval(value: Estimate, sign: str = "") -> str:
    ends = (value.mean - value.half_width, value.mean + value.half_width)
    return f"[{', '.join(_number(end, sign) for end in ends)}]" if value.n > 1 else ""


def _count(value: Estimate, asked: str = "") -> str:
    return f"(n = {value.n}{asked}{' †' * (value.n < MIN_SEEDS)})"


def _notes(table: Table) -> list[str]:
    frame, base = table.frame, table.baseline
    done = frame[frame["status"] != "not run"]
    notes = [
        "Test error: mean ± sample standard deviation s over n seeds, at the last epoch; interval: 95 % "
        "t-interval of the mean, ± t(0.975, n−1)·s/√n.",
        "Difference: this row's error minus the other's of the same seed, over the seeds both have (negative "
        "is better), and its 95 % t-interval. Only where * stands does the interval exclude 0 (n ≥ 3 and not "
        "all equal; not corrected for the number of rows); elsewhere no difference is established.",
        "η: average propagation count, forward-backward passes per step: 1 for SGD, 2 for SAM.",
        f"Time: training seconds over {base}'s, given for the same host, device and thread count only.",
        "Best epoch: chosen on the test data, hence too low; the last epoch is the result.",
    ]
    if blank := ", ".join(done.loc[done[f"time_relative_to_{base}"].isna(), "label"]):
        notes.append(f"No time for {blank}: {base} has no runs on the same machine.")
    if frame.filter(regex=r"^(test_error|difference).*\.n$").isin(range(1, MIN_SEEDS)).any(axis=None):
        notes.append(f"† fewer than {MIN_SEEDS} seeds: no ground for a comparison.")
    return notes
