"""Pages about tables, in Markdown, and tables in LaTeX."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from rst.files import write_text
from rst.reporting.records import HOW_SHARP, SHARPNESS
from rst.reporting.statistics import LOSSES, MIN_SEEDS, SHARPNESS_NAMES, Estimate, Summary, estimate_of

USUAL = ("test_error", "difference_to_reference", "eta", "time")
DETAILS = (
    "interval",
    "difference_to_baseline",
    *LOSSES,
    "eta_expected",
    "best_epoch",
    *SHARPNESS,
    "published",
)
METRICS = USUAL + DETAILS
HEADLINES = {
    "forest": "{split} error, difference to {reference} with its 95 % interval, by propagation count",
    "error": "{split} error against propagation count",
    "cost": "{split} error against propagation count, difference to {reference}, a line a method",
}
FIGURES = {
    "curves": "curves of training: means over {unit}s, bands of ± one standard deviation, logarithmic scales",
    "sharpness": "sharpness of the minima: means ± standard deviations",
}
READING = {  # by metric
    "test_error": "{Split} error at the last epoch: mean ± sample standard deviation over n {unit}s.",
    "difference_to_reference": "Differences are this row's error minus {reference}'s of the same {unit}; "
    "negative is better. Their 95 % t-intervals are not corrected for the number of rows.",
    "eta": "η: propagations (forward-backward passes) per step of {baseline}, 1 for SGD and 2 for SAM.",
    "time": "Time: training seconds relative to {baseline}'s of the same {unit} (median), where both are "
    "from one machine.",
}
MATRIX = (
    "{Split} error (%) at the last epoch: mean ± sample standard deviation over n {unit}s. * marks a "
    "difference to {reference}, paired by {unit}, whose 95 % t-interval excludes 0, not corrected for the "
    "number of comparisons."
)
READING_DETAILS = "Interval: 95 % t-interval of the mean."
READING_BEST_EPOCH = "The best epoch's error is too low: {split} data chose it."
READING_SHARPNESS = (
    "L(θ): mean cross entropy on training images without augmentation, with the network in evaluation mode. "
    "λ_max: largest eigenvalue of its Hessian, comparable only at similar L(θ). L(θ + ε) − L(θ): increase by "
    "SAM's perturbation at the protocol's ρ. L(θ ± d/2) − L(θ): increase along half a filter-normalised "
    "random direction d; unlike λ_max and ε it does not depend on the scale of weights that BatchNorm "
    "follows."
)
# Of each row's runs, the distinct values of these columns of the records say where the numbers come from.
SOURCES = {
    "Code": ("commit", "dirty"),
    "Software": tuple(f"versions.{name}" for name in ("python", "torch", "cuda", "rst")),
    "Machine": ("host", "device", "device_name", "ranks", "threads"),
    "Sharpness": tuple(f"sharpness.{name}" for name in HOW_SHARP),
}
RECORDED = [name for names in SOURCES.values() for name in names]
LATEX = str.maketrans(
    {"±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$", "†": r"$\dagger$"}
    | {letter: rf"$\{name}$" for letter, name in zip("γηλρ", ("gamma", "eta", "lambda", "rho"), strict=True)}
)


def page(summaries: Sequence[Summary], figures: Collection[str]) -> str:
    """A table's README.md. First, of several columns, all errors side by side; then, of each, the figures of
    `HEADLINES` and the metrics asked for, by default those of `USUAL`; then the other figures and metrics,
    commands and provenance.

    Args:
        figures: the names of those there are, such as "forest", or "noise-0.2/forest" of a column.
    """
    first, several = summaries[0], len(summaries) > 1

    def images(summary: Summary, names: Mapping[str, str]) -> list[str]:
        there = {place(summary, summaries) + name: alt for name, alt in names.items()}
        return [f"![{_worded(alt, summary)}]({path}.png)" for path, alt in there.items() if path in figures]

    parts = [f"# {first.title}"]
    if several:
        parts += [pipes(_matrix(summaries)), _worded(MATRIX, first)]
    for summary in summaries:
        parts += [f"## {summary.name}"] * several + [f"{summary.setting}.", *images(summary, HEADLINES)]
        parts += [pipes(cells(summary, summary.metrics or USUAL)), *_remarks(summary)]
        parts += [reading(summary)] * (summary is first)
    if "schedules" in figures:
        parts += ["## Schedules", "![p(t) of each schedule, and a coin's SAM steps](schedules.png)"]
    for summary in summaries:
        parts += [f"## Details{f': {summary.name}' * several}", *images(summary, FIGURES)]
        if summary.metrics is None:
            shown = _details(summary)
            notes = [READING_DETAILS] + [_worded(READING_BEST_EPOCH, summary)] * ("best_epoch" in shown)
            parts += [pipes(cells(summary, shown)), " ".join(notes)]
            parts += [READING_SHARPNESS] * (SHARPNESS[0] in shown)
        commands = zip(summary.frame["label"], summary.frame["command"], strict=True)
        parts += [pipes([{"Method": label, "Command": f"`{command}`"} for label, command in commands])]
        parts += ["\n".join(f"- {line}" for line in provenance(summary.frame))]
    return "\n\n".join(parts) + "\n"


def place(summary: Summary, summaries: Sequence[Summary]) -> str:
    """Where a column's figures are in the table's folder: of several columns, each has a folder."""
    return f"{summary.name}/" if len(summaries) > 1 else ""


def reading(summary: Summary) -> str:
    """How to read those of the usual metrics that the page shows."""
    shown = summary.metrics or USUAL
    return _worded(" ".join(text for metric, text in READING.items() if metric in shown), summary)


def cells(summary: Summary, metrics: Sequence[str]) -> list[dict[str, str]]:
    """A line a row of the table: its label and these of `METRICS`, as text under their headings."""
    lines = []
    for row in summary.frame.to_dict("records"):
        texts = {"Method": row["label"]}
        for metric in metrics:
            heading, text = _cell(summary, row, metric)
            texts[heading] = text if row["test_error.n"] or metric == "published" else row["status"]
        lines.append(texts)
    return lines


def _cell(summary: Summary, row: dict[Any, Any], metric: str) -> tuple[str, str]:
    """Heading and text."""
    split, error = summary.split, estimate_of(row, "test_error")

    def difference(label: str) -> str:
        gap = estimate_of(row, f"difference_to_{label}")
        return f"{points(gap)}{_count(gap, error.n)}" if gap.n else "–"

    match metric:
        case "test_error":
            return (
                f"{split.capitalize()} error (%)",
                f"{spread(error)}{_count(error, row['n_expected'], True)}",
            )
        case "interval":
            return "95 % interval (%)", interval(error) or "–"
        case "difference_to_reference":
            return f"Difference to {summary.reference} (points)", difference(summary.reference)
        case "difference_to_baseline":
            return f"Difference to {summary.baseline} (points)", difference(summary.baseline)
        case "eta" | "eta_expected":
            mean = row[f"{metric}.mean"]
            text = "unknown" if np.isnan(mean) else f"{mean:.3f}"
            return {"eta": "η", "eta_expected": "η expected"}[metric], text
        case "time":
            few = " †" * (error.n < MIN_SEEDS)
            text = "–" if np.isnan(row["time"]) else f"{row['time']:.2f}{few}"
            return f"Time / {summary.baseline}'s", text
        case "best_epoch":
            best = estimate_of(row, "best_epoch_error")
            return f"Best epoch (%), chosen on {split} data", spread(best)
        case "published":
            value, source = row["published_error"], row["published_source"]
            return "Published (%)", "unknown" if np.isnan(value) else f"{value:g} ({source})"
        case _:
            value = estimate_of(row, metric)
            text = f"{_significant(value)}{_count(value, error.n)}" if value.n else "not measured"
            return _worded((SHARPNESS_NAMES | LOSSES)[metric], summary), text


def pipes(lines: Sequence[Mapping[str, str]]) -> str:
    """A GitHub table."""
    escaped = [{k.replace("|", r"\|"): v.replace("|", r"\|") for k, v in line.items()} for line in lines]
    return tabulate(escaped, headers="keys", tablefmt="pipe", disable_numparse=True)


def to_latex(summaries: Sequence[Summary]) -> str:
    """A `tabular` for the package booktabs: a column's usual metrics or, of several columns, the matrix of
    errors. What to say of it in a caption stands above it in comments."""
    first = summaries[0]
    several = len(summaries) > 1
    frame = pd.DataFrame(_matrix(summaries) if several else cells(first, first.metrics or USUAL))
    style = frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    tabular = style.to_latex(hrules=True, column_format="l" + "r" * (frame.shape[1] - 1))
    settings = [f"{summary.name}: {summary.setting}".removeprefix(": ") for summary in summaries]
    note = _worded(MATRIX, first) if several else reading(first)
    comments = [f"% {line}\n" for line in (first.title, *settings, note, *provenance(first.frame))]
    return "".join(comments) + tabular.translate(LATEX)


def fill(page: Path, marker: str, block: str) -> None:
    """Put `block` between the page's lines <!-- marker --> and <!-- end -->.

    Raises:
        ValueError: the page has no such lines.
    """
    text = page.read_text()
    start, end = f"<!-- {marker} -->\n", "<!-- end -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{page} has no lines {start.strip()} and {end}")
    write_text(page, f"{before}{start}{block}\n{end}{after}")


def points(value: Estimate) -> str:
    """A difference in percentage points, with its interval where it has one."""
    return " ".join(filter(None, [_number(value.mean, "+"), interval(value, "+")]))


def spread(value: Estimate) -> str:
    return _number(value.mean) + (f" ± {value.std:.2f}" if value.n > 1 else "")


def interval(value: Estimate, sign: str = "") -> str:
    ends = f"[{_number(value.low, sign)}, {_number(value.high, sign)}]"
    return "" if np.isnan(value.low) else ends


def _number(x: float, sign: str = "") -> str:
    return f"{round(x, 2) + 0.0:{sign}.2f}".replace("-", "−")  # + 0.0: no negative zero


def _significant(value: Estimate) -> str:
    """Three significant digits of the mean, the standard deviation to the same place."""
    digits = max(0, 2 - math.floor(math.log10(abs(value.mean)))) if value.mean else 2
    return f"{value.mean:.{digits}f}" + (f" ± {value.std:.{digits}f}" if value.n > 1 else "")


def _count(value: Estimate, asked: int, always: bool = False) -> str:
    """(n = 5 of 8); nothing where it is as many as asked, unless `always`."""
    of = f" of {asked}" if value.n < asked else ""
    text = f" (n = {value.n}{of}{' †' * (value.n < MIN_SEEDS)})"
    return text if of or always else ""


def _matrix(summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """The error of each row in each column, with * where it differs from the reference's."""
    lines = [{"Method": label} for label in summaries[0].frame["label"]]
    for summary in summaries:
        rows = summary.frame.to_dict("records")
        for line, row, text in zip(lines, rows, cells(summary, ["test_error"]), strict=True):
            gap = estimate_of(row, f"difference_to_{summary.reference}")
            differs = gap.n >= MIN_SEEDS and (gap.low > 0 or gap.high < 0)
            line[summary.name] = [*text.values()][1] + " *" * differs
    return lines


def _details(summary: Summary) -> list[str]:
    """Those of `DETAILS` that were measured of any row, where older records may lack them; the best epoch
    where there is more than the last."""
    frame, later = summary.frame, {*SHARPNESS, "calibrated_test_loss"}
    shown = [name for name in DETAILS if name not in later or frame[f"{name}.n"].any()]
    if frame["best_epoch_error.mean"].equals(frame["test_error.mean"]):
        shown.remove("best_epoch")
    return shown


def _remarks(summary: Summary) -> list[str]:
    frame, remarks = summary.frame, []
    for label, reason in zip(frame["label"], frame["failures"], strict=True):
        remarks += [f"{label} failed: {reason}."] * bool(reason)
    without = frame.loc[(frame["test_error.n"] > 0) & frame["time"].isna(), "label"]
    if len(without):
        remarks.append(
            f"No time: {', '.join(without)} (no {summary.baseline} of these {summary.unit}s on one machine)."
        )
    if frame["test_error.n"].between(1, MIN_SEEDS - 1).any():
        remarks.append(
            f"† Fewer than {MIN_SEEDS} {summary.unit}s, hollow in figures: no ground for a comparison."
        )
    halves = (frame["status"] == "partial") & (frame["test_error.n"] == frame["n_expected"])
    if halves.any():
        remarks.append(f"{', '.join(frame.loc[halves, 'label'])}: some of its runs have not finished.")
    rows = frame.to_dict("records")
    several = [row["label"] for row in rows if len(row["runs"].split()) > row["test_error.n"]]
    if several:
        remarks.append(f"{', '.join(several)}: a {summary.unit}'s value is the mean of several runs.")
    return remarks


def provenance(frame: pd.DataFrame) -> list[str]:
    """How many runs there are and when they finished; their seeds, code, software and machine, and for what
    differs between rows, which rows have what."""
    frame = frame[frame["test_error.n"] > 0]
    if frame.empty:
        return ["No run has finished."]
    runs = {run for cell in frame["runs"] for run in cell.split()}
    days = sorted({frame["first_finished"].min()[:10], frame["last_finished"].max()[:10]})
    lines = [f"Runs: {len(runs)}, finished {' to '.join(days)} (UTC)."]
    for name, columns in {"Seeds": ("seeds",), **SOURCES}.items():
        rows: dict[str, list[str]] = {}
        for line in frame.to_dict("records"):
            said = ", ".join(f"{column.split('.')[-1]} {line[column]}" for column in columns)
            if name != "Sharpness" or line["lambda_max.n"]:
                rows.setdefault(said.removeprefix("seeds "), []).append(line["label"])
        each = rows if len(rows) == 1 else [f"{said} ({', '.join(labels)})" for said, labels in rows.items()]
        lines += [f"{name}{', MIXED' * (len(rows) > 1)}: {'; '.join(each)}."] * bool(rows)
    return lines


def _worded(note: str, summary: Summary) -> str:
    names = {"reference": summary.reference, "baseline": summary.baseline, "unit": summary.unit}
    return note.format(split=summary.split, Split=summary.split.capitalize(), **names)
