"""Tables as Markdown, CSV and LaTeX. A report is one table, or several of the same rows, a setting each."""

import math
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from rst.files import write_text
from rst.reporting.statistics import METRICS, MIN_SEEDS, SHARPNESS, Estimate, Statistics, estimate_of

LATEX_METRICS = ("test_error", "interval", "difference_to_reference", "eta", "time")
_COUNTED = rf"^(test_error|difference|{'|'.join(SHARPNESS)}).*\.n$"
SETTINGS_ACROSS = 3  # of a LaTeX matrix: what a page's width holds
HEADING = 11  # characters of a line of a LaTeX table's heading: no wider than the cells below it

_CLAIM = f"n ≥ {MIN_SEEDS} and not all equal; not corrected for the number of rows"
_DIFFERENCE = (
    "Difference: this row's error minus the other's of the same seed, over the seeds both have (n where they "
    "are not all of the row's; negative is better), and its 95 % t-interval. Only where * stands does the "
    f"interval exclude 0 ({_CLAIM}); elsewhere no difference is established."
)
_ETA = "η: average propagation count, forward-backward passes per step: 1 for SGD, 2 for SAM."
_NOTES = {
    "test_error": "{Split} error: mean ± sample standard deviation s over n seeds, at the last epoch.",
    "interval": "Interval: 95 % t-interval of the mean, ± t(0.975, n−1)·s/√n.",
    "difference_to_reference": _DIFFERENCE,
    "difference_to_baseline": _DIFFERENCE,
    "eta": _ETA,
    "eta_expected": _ETA,
    "time": "Time: training seconds over {baseline}'s of the same seed, the median over seeds; given for the "
    "same host, device, ranks and thread count only.",
    "loss": "L(θ): mean cross entropy on training images without augmentation, network in evaluation mode; "
    "mean ± s of the runs measured.",
    "lambda_max": "λ_max: largest eigenvalue of the Hessian of L.",
    "in_ball": "L(θ + ε) − L(θ): what SAM's perturbation of the run's ρ adds.",
    "along": "L(θ ± d/2) − L(θ): what half a filter-normalised random direction d adds. Unlike λ_max and ε "
    "it does not depend on the scale of weights that a BatchNorm follows.",
    "best_epoch": "Best epoch: chosen on the {split} data, hence too low; the last epoch is the result.",
}
SHARPNESS_NAMES = dict(zip(SHARPNESS, ("L(θ)", "λ_max", "L(θ + ε) − L(θ)", "L(θ ± d/2) − L(θ)"), strict=True))
_MATRIX = (
    "{Split} error in percent at the last epoch: mean ± sample standard deviation over n seeds. Only where * "
    "stands does the 95 % t-interval of the difference to {reference}, paired by seed, exclude 0 "
    f"({_CLAIM} and settings); elsewhere no difference to it is established."
)
_SYMBOLS = (
    "α:alpha β:beta γ:gamma δ:delta ε:epsilon η:eta θ:theta λ:lambda μ:mu π:pi ρ:rho σ:sigma "
    "±:pm ×:times ·:cdot √:surd ≥:geq ≤:leq →:rightarrow †:dagger"
)
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"${character}$" for character in "<>|"},
    **{pair[0]: f"$\\{pair[2:]}$" for pair in _SYMBOLS.split()},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "*": "$^{*}$",
    "[": "{[}",  # at a row's start it would be an argument of the \\ before
    "²": "$^2$",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "⁄": "/",  # the fraction bar that ½ is decomposed to
}


def write_report(tables: Sequence[Statistics], path: Path) -> None:
    """Write `to_markdown`, `to_csv` or `to_latex` of the report, as `path` ends in .md, .csv or .tex. LaTeX's
    label is `tab:<folder>-<stem>`. Other endings raise ValueError."""
    if path.suffix == ".md":
        text = to_markdown(tables)
    elif path.suffix == ".csv":
        text = to_csv(tables)
    elif path.suffix == ".tex":
        text = to_latex(tables, f"tab:{path.absolute().parent.name}-{path.stem}")
    else:
        raise ValueError(f"{path}: a table is written as .md, .csv or .tex")
    write_text(path, text)


def to_markdown(tables: Sequence[Statistics]) -> str:
    """Title, setting, a GitHub pipe table, the notes needed to read it, and the provenance. Of several
    settings first the matrix of test errors, rows × settings, then each setting's table."""
    first, common = _check(tables), _common(tables)
    if len(tables) == 1:
        notes = [*_definitions(first, METRICS), *_remarks(first), *common]
        return "\n\n".join([f"# {first.title}", first.setting, _full(first), _bullets(notes)]) + "\n"
    general = [_worded(_MATRIX, first), *_definitions(first, METRICS)]
    parts = [f"# {first.title}", pipes(_matrix(tables)), _bullets(general)]
    if common:
        parts += ["Of every setting:", _bullets(common)]
    for table in tables:
        own = [*_remarks(table), *(line for line in table.provenance if line not in common)]
        parts += [f"## {table.column}", table.setting, _full(table), _bullets(own)]
    return "\n\n".join(filter(None, parts)) + "\n"


def to_csv(tables: Sequence[Statistics]) -> str:
    """`Statistics.frame` of each setting below the other's, the numbers in full precision; first a column
    `setting` (in short), last `conditions` (the setting in full)."""
    _check(tables)
    text = ""
    for table in tables:
        frame = table.frame.assign(conditions=table.setting)
        frame.insert(0, "setting", table.column)
        text += frame.to_csv(index=False, lineterminator="\n", header=not text)
    return text


def to_latex(tables: Sequence[Statistics], label: str) -> str:
    """A `table` environment in ASCII that needs no package but booktabs: the rows of the one setting, or the
    matrix of test errors. Notes and provenance stand below it, the commands above in comments."""
    first, common = _check(tables), _common(tables)
    if len(tables) == 1:
        caption, blocks = f"{first.title}. {first.setting}.", [_lines(first, LATEX_METRICS)]
        notes = [*_definitions(first, LATEX_METRICS), *_remarks(first), *common]
    else:
        caption = f"{first.title}: {first.split} error (%)."
        starts = range(0, len(tables), SETTINGS_ACROSS)
        blocks = [_matrix(tables[i : i + SETTINGS_ACROSS]) for i in starts]
        notes = [_worded(_MATRIX, first), *common]
        for table in tables:
            own = [*_remarks(table), *(line for line in table.provenance if line not in common)]
            notes.append(" ".join([f"{table.column}: {table.setting}.", *own]))
    commands = [
        f"{line['label']}: {line['command']}" for table in tables for line in table.frame.to_dict("records")
    ]
    comments = [f"% {text}".encode("ascii", "backslashreplace").decode() for text in dict.fromkeys(commands)]
    lines = [
        r"% Needs \usepackage{booktabs}. The rows' commands:",
        *comments,
        r"\begin{table}",
        r"\centering",
        r"\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\label{{{re.sub('[^A-Za-z0-9:.-]', '-', label)}}}",
        "\n\\par\\medskip\n".join(map(_tabular, blocks)),
        r"\par\medskip\raggedright",
        *(escape_latex(note) for note in notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """ASCII that LaTeX sets as `text`: special characters escaped, symbols in math mode, accents left out. An
    unknown character shows as [U+…]."""

    def escape(character: str) -> str:
        if character in _LATEX:
            return _LATEX[character]
        if character.isascii():
            return character
        plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
        return f"{{[}}U+{ord(character):04X}]" if plain == character else escape_latex(plain)

    return "".join(map(escape, text))


def _tabular(lines: list[dict[str, str]]) -> str:
    wrapped = [map(escape_latex, textwrap.wrap(head, HEADING, break_long_words=False)) for head in lines[0]]
    heads = [r"\shortstack{" + r"\\".join(head) + "}" for head in wrapped]
    body = [" & ".join(map(escape_latex, line.values())) + r" \\" for line in lines]
    body = [line.replace(" $^{*}$", r"\rlap{$^{*}$}") for line in body]  # digits stay below digits
    begin, end = rf"\begin{{tabular}}{{@{{}}l{'r' * (len(heads) - 1)}@{{}}}}", r"\end{tabular}"
    parts = [begin, r"\toprule", " & ".join(heads) + r" \\", r"\midrule", *body, r"\bottomrule", end]
    return "\n".join(parts)


def _check(tables: Sequence[Statistics]) -> Statistics:
    """The first of the report's tables. ValueError unless all have its title, rows and metrics."""
    if not tables:
        raise ValueError("a report needs at least one table")
    kinds = {(t.title, *t.frame["label"], t.reference, t.baseline, t.metrics, t.split) for t in tables}
    columns = [table.column for table in tables]
    if len(kinds) > 1 or len(set(columns)) < len(columns):
        raise ValueError(
            "the tables of a report have one title, the same rows, references and metrics, and each its own "
            f"column; got {', '.join(f'{table.title!r} in {table.column!r}' for table in tables)}"
        )
    return tables[0]


def _common(tables: Sequence[Statistics]) -> list[str]:
    return [line for line in tables[0].provenance if all(line in table.provenance for table in tables)]


def _worded(note: str, table: Statistics) -> str:
    names = {"reference": table.reference, "baseline": table.baseline}
    return note.format(split=table.split, Split=table.split.capitalize(), **names)


def _definitions(table: Statistics, usual: Sequence[str]) -> list[str]:
    shown = [_worded(_NOTES[m], table) for m in _shown(table, usual) if m in _NOTES]
    return list(dict.fromkeys(shown))


def _remarks(table: Statistics) -> list[str]:
    """What is particular in this table: failed runs, times not given, few seeds."""
    frame, remarks = table.frame, []
    for line in frame[frame["failures"] != ""].to_dict("records"):
        remarks.append(f"{line['label']} failed: {line['failures']}.")
    no_time = (frame["seeds"] != "") & frame[f"time_relative_to_{table.baseline}"].isna()
    if "time" in (table.metrics or METRICS) and no_time.any():
        blank = ", ".join(frame.loc[no_time, "label"])
        remarks.append(f"No time for {blank}: no {table.baseline} of these seeds on the same machine.")
    if frame.filter(regex=_COUNTED).isin(range(1, MIN_SEEDS)).any(axis=None):
        remarks.append(f"† fewer than {MIN_SEEDS} seeds: no ground for a comparison.")
    return remarks


def _full(table: Statistics) -> str:
    """The Markdown table of a setting. A row that failed says why in its first cell."""
    lines = _lines(table, METRICS)
    for line, row in zip(lines, table.frame.to_dict("records"), strict=True):
        if head := next((head for head, text in line.items() if text == "failed"), None):
            line[head] = f"failed: {row['first_failure']}"
        line["Command"] = f"`{row['command']}`"
    return pipes(lines)


def pipes(lines: list[dict[str, str]]) -> str:
    """A GitHub pipe table."""
    escaped = [{k.replace("|", r"\|"): v.replace("|", r"\|") for k, v in line.items()} for line in lines]
    return tabulate(escaped, headers="keys", tablefmt="pipe", disable_numparse=True)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _matrix(tables: Sequence[Statistics]) -> list[dict[str, str]]:
    """Of each row the test error in each setting, marked * where it differs from the reference's."""
    lines = [{"Method": label} for label in tables[0].frame["label"]]
    for table in tables:
        for cells, line in zip(lines, table.frame.to_dict("records"), strict=True):
            star = " *" * estimate_of(line, f"difference_to_{table.reference}").excludes_zero
            cells[table.column] = _error(line) + star
    return lines


def _lines(table: Statistics, usual: Sequence[str]) -> list[dict[str, str]]:
    """Of each row its label and the metrics shown, each under its heading."""
    return [
        {"Method": line["label"], **dict(_cell(table, line, metric) for metric in _shown(table, usual))}
        for line in table.frame.to_dict("records")
    ]


def _shown(table: Statistics, usual: Sequence[str]) -> list[str]:
    """The metrics that are shown: those asked for, else the usual ones, sharpness where it was measured."""
    if table.metrics:
        return list(table.metrics)
    measured = [name for name in SHARPNESS if table.frame.get(f"{name}.n", pd.Series(dtype=int)).any()]
    return [name for name in usual if name not in SHARPNESS or name in measured]


def _cell(table: Statistics, line: dict[Any, Any], metric: str) -> tuple[str, str]:
    """Heading and text of one of `METRICS`."""
    error, time = estimate_of(line, "test_error_percent"), line[f"time_relative_to_{table.baseline}"]
    best, published = estimate_of(line, "best_epoch_error_percent"), line["published_error_percent"]
    known = "unknown" if np.isnan(published) else f"{published:g} ({line['published_source']})"
    heading, text = {
        "test_error": (f"{table.split.capitalize()} error, last epoch (%)", _error(line)),
        "interval": ("95 % interval", _interval(error) or "–"),
        "difference_to_reference": _difference(line, table.reference),
        "difference_to_baseline": _difference(line, table.baseline),
        "eta": ("η measured", f"{line['eta.mean']:.3f}"),
        "eta_expected": ("η expected", f"{line['eta_expected.mean']:.3f}"),
        "time": (f"Time / {table.baseline}'s", "" if np.isnan(time) else f"{time:.2f}"),
        "best_epoch": (f"Best epoch (%), chosen on {table.split} data", _mean(best)),
        **{name: (heading, _sharpness(line, name)) for name, heading in SHARPNESS_NAMES.items()},
        "published": ("Published (%)", known),
    }[metric]
    return heading, text if error.n or metric == "published" else line["status"]


def _error(line: dict[Any, Any]) -> str:
    error, partial = estimate_of(line, "test_error_percent"), line["status"] == "partial"
    asked = f" of {line['n_expected']}" if partial else ""
    return f"{_mean(error)} {_count(error, asked)}" if error.n else line["status"]


def _difference(line: dict[Any, Any], name: str) -> tuple[str, str]:
    gap = estimate_of(line, f"difference_to_{name}")
    count = _count(gap) if gap.n < line["test_error_percent.n"] else ""
    parts = [points(gap), count, "*" * gap.excludes_zero]
    return f"Difference to {name} (points)", " ".join(filter(None, parts)) if gap.n else "–"


def _sharpness(line: dict[Any, Any], name: str) -> str:
    """Three significant digits of the mean, and the standard deviation to the same place."""
    if f"{name}.n" not in line or not (value := estimate_of(line, name)).n:
        return "not measured"
    digits = max(0, 2 - math.floor(math.log10(abs(value.mean)))) if value.mean else 2
    spread = f" ± {value.std:.{digits}f}" if value.n > 1 else ""
    count = f" {_count(value)}" if value.n < line["test_error_percent.n"] else ""
    return f"{value.mean:.{digits}f}{spread}{count}"


def points(gap: Estimate) -> str:
    """A difference in percentage points with its interval, where there is one."""
    return " ".join(filter(None, [_number(gap.mean, "+"), _interval(gap, "+")]))


def _number(x: float, sign: str = "") -> str:
    return f"{round(x, 2) + 0.0:{sign}.2f}".replace("-", "−")  # + 0.0: no negative zero


def _mean(value: Estimate) -> str:
    return _number(value.mean) + (f" ± {value.std:.2f}" if value.n > 1 else "")


def _interval(value: Estimate, sign: str = "") -> str:
    return f"[{', '.join(_number(end, sign) for end in value.interval)}]" if value.n > 1 else ""


def _count(value: Estimate, asked: str = "") -> str:
    return f"(n = {value.n}{asked}{' †' * (value.n < MIN_SEEDS)})"
