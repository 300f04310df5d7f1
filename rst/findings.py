"""What a protocol's tables say of the paper's claims, in one page made of their numbers alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from rst.rendering import pipes
from rst.tables import SHARPNESS, Estimate, Table, estimate, paired_difference

TABLES = ("schedules", "constant", "gamma")  # what the page is made of
FAMILIES = ("constant", "piecewise rising", "linear rising", "trigonometric rising")  # at one p
UNDECIDED = "undecided at this scale"


@dataclass(frozen=True)
class Finding:
    claim: str
    measured: str
    verdict: str  # supported, not supported, or UNDECIDED


class Runs:
    """The runs of tables, by label and seed."""

    def __init__(self, tables: dict[str, Table], runs: pd.DataFrame) -> None:
        self.tables, self.runs = tables, runs.set_index("id")

    def values(self, table: str, label: str, column: str) -> pd.Series:
        """Of each seed of a row. The column "error" is the test error in percent."""
        frame = self.tables[table].frame
        ids = " ".join(frame.loc[frame["label"] == label, "runs"]).split()
        rows = self.runs.loc[ids].set_index("seed")
        return 100 * (1 - rows["test_accuracy"]) if column == "error" else rows[column].dropna()

    def gap(self, table: str, label: str, other: str) -> Estimate:
        """Test error of `label` less that of `other`, paired by seed."""
        return paired_difference(self.values(table, label, "error"), self.values(table, other, "error"))

    def gaps(self, table: str, labels: Sequence[str], other: str) -> dict[str, Estimate]:
        return {label: self.gap(table, label, other) for label in labels if label != other}


def findings(tables: dict[str, Table], runs: pd.DataFrame) -> str:
    """The page, as Markdown. `tables` are those of `TABLES`, of one setting each; `runs` as `build_table` has
    them, with sharpness joined where it was measured."""
    known = Runs(tables, runs)
    schedules = tables["schedules"]
    gain = known.gap("schedules", "SAM", "SGD")
    margin = max(-gain.mean, 0.0) / 2
    found = [
        Finding("SAM generalises better than SGD", f"SAM − SGD {_points(gain)}", _below(gain, 0.0)),
        *_comparable(known, margin),
        *_matched(known, margin),
        *_late(known),
        *_flatter(known),
        _time(known),
    ]
    n = " to ".join(map(str, sorted(set(schedules.frame["test_error_percent.n"]))))
    parts = [
        "# Findings",
        f"{schedules.setting}, n = {n} seeds a row. Differences are of test error in "
        "percentage points, paired by seed, with 95 % t-intervals, not corrected for their number; negative "
        "is better. An interval that includes 0 decides nothing. Tables: "
        + ", ".join(f"[{name}]({name}.md)" for name in tables)
        + ".",
        pipes([{"Claim": f.claim, "Measured": f.measured, "Verdict": f.verdict} for f in found]),
        f"*Comparable* and *matches* mean: the interval lies below half of SAM's gain over SGD as measured, "
        f"{margin:.2f} points; *not supported*: it lies above. Images, network and training are small, so a "
        "verdict holds for this setting and no other.",
        "## Choosing a schedule",
        _choosing(known),
        "## Where the numbers come from",
        " ".join(schedules.provenance),
    ]
    return "\n\n".join(parts) + "\n"


def _comparable(known: Runs, margin: float) -> list[Finding]:
    found = []
    for family in FAMILIES:
        gap = known.gap("schedules", f"{family} p = 0.5", "SAM")
        name = family.removesuffix(" rising")
        found.append(
            Finding(
                f"RST at η ≈ 1.5 is comparable with SAM: {name}",
                f"RST − SAM {_points(gap)}",
                _below(gap, margin),
            )
        )
    return found


def _matched(known: Runs, margin: float) -> list[Finding]:
    """G-RST at each γ."""
    labels = [x for x in known.tables["gamma"].frame["label"] if x.startswith("p = 0.5") and "RST" not in x]
    found = []
    for label in labels:
        gap = known.gap("gamma", label, "SAM")
        name = label.partition(", ")[2]
        found.append(
            Finding(
                f"G-RST at η ≈ 1.5 matches or beats SAM: {name}",
                f"G-RST − SAM {_points(gap)}",
                "supported: beats" if _below(gap, 0.0) == "supported" else _below(gap, margin),
            )
        )
    return found


def _late(known: Runs) -> list[Finding]:
    found = []
    for p in ("0.5", "0.25"):
        gap = known.gap("schedules", f"piecewise rising p = {p}", f"constant p = {p}")
        found.append(
            Finding(
                f"A budget spent late beats one spread evenly, p = {p}",
                f"piecewise − constant {_points(gap)}",
                _below(gap, 0.0),
            )
        )
        gap = known.gap("schedules", f"piecewise rising p = {p}", f"piecewise falling p = {p}")
        found.append(
            Finding(
                f"Late beats early, p = {p}", f"piecewise rising − falling {_points(gap)}", _below(gap, 0.0)
            )
        )
    return found


def _flatter(known: Runs) -> list[Finding]:
    if not set(SHARPNESS) <= set(known.runs.columns):
        return [Finding("SAM's minima are flatter", "not measured", "not run")]
    found = []
    for column, name in zip(SHARPNESS, ("λ_max", "L(θ + ε) − L(θ)"), strict=True):
        for label, short in (("SAM", "SAM"), ("linear rising p = 0.5", "RST linear")):
            ratio = _log_ratio(known, label, column)
            low, high = map(math.exp, ratio.interval)
            text = f"{name} of {short} / SGD's {math.exp(ratio.mean):.2f} [{low:.2f}, {high:.2f}]"
            text += f" (n = {ratio.n})"
            found.append(Finding(f"{short}'s minima are flatter: {name}", text, _below(ratio, 0.0)))
    return found


def _log_ratio(known: Runs, label: str, column: str) -> Estimate:
    """Of a row to SGD's, paired by seed. Sharpness is positive and spreads by factors."""
    ours, theirs = (known.values("schedules", name, column) for name in (label, "SGD"))
    if (ours <= 0).any() or (theirs <= 0).any():
        return estimate([])
    return paired_difference(np.log(ours), np.log(theirs))


def _time(known: Runs) -> Finding:
    """Seconds a step against η, each row's mean relative to SGD's."""
    frame = known.tables["schedules"].frame
    ratios = frame["time_relative_to_SGD"] / frame["eta.mean"]
    others = ratios[frame["label"] != "SGD"].dropna()
    if others.empty:
        return Finding("Time follows η", "not measured", "not run")
    low, middle, high = others.min(), others.median(), others.max()
    text = f"(time / SGD's) / η: median {middle:.2f}, from {low:.2f} to {high:.2f} over {len(others)} rows"
    verdict = UNDECIDED if abs(middle - 1) <= 0.15 else "not supported"
    verdict = "supported" if low >= 0.85 and high <= 1.15 else verdict
    return Finding("Training time follows η (within 15 %)", text, verdict)


def _choosing(known: Runs) -> str:
    """From the numbers: at each p what is better or worse than the simplest, and what to do then."""
    sentences = []
    to_simplest: dict[str, Estimate] = {}  # each choice less constant p with γ = 1
    frame = known.tables["schedules"].frame
    for p in ("0.25", "0.5"):
        even, end = f"constant p = {p}", f" p = {p}"
        labels = [x for x in frame["label"] if x == even or x.endswith((f" rising{end}", f" falling{end}"))]
        errors = {label: estimate(known.values("schedules", label, "error")).mean for label in labels}
        best = min(errors, key=lambda label: errors[label])
        to_even = known.gaps("schedules", labels, even)
        to_sgd = known.gaps("schedules", labels, "SGD")
        to_simplest |= to_even
        sentences.append(
            f"At p = {p} (η ≈ {1 + float(p):g}) the lowest mean error of {len(labels)} schedules is "
            f"{best.removesuffix(end)}'s, {errors[best]:.2f} %; constant has {errors[even]:.2f} %. By an "
            f"interval that excludes 0, better than constant: {_those(to_even, 'supported', end)}; worse: "
            f"{_those(to_even, 'not supported', end)}; better than SGD: {_those(to_sgd, 'supported', end)}."
        )
    rising = [x for x in frame["label"] if " rising " in x]
    later = [_below(known.gap("schedules", x, x.replace("rising", "falling")), 0.0) for x in rising]
    sentences.append(
        f"Of {len(later)} pairs of one schedule rising and falling, rising is better in "
        f"{later.count('supported')}, worse in {later.count('not supported')} and undecided in "
        f"{later.count(UNDECIDED)}."
    )
    gammas = [x for x in known.tables["gamma"].frame["label"] if x.startswith("p = 0.5, ")]
    (plain,) = [x for x in gammas if "RST" in x]
    to_plain = known.gaps("gamma", gammas, plain)
    to_simplest |= to_plain
    start = "p = 0.5, "
    sentences.append(
        f"At constant p = 0.5, better than γ = 1: {_those(to_plain, 'supported', start)}; worse: "
        f"{_those(to_plain, 'not supported', start)}."
    )
    m = len(to_simplest)
    wide = {label: _widened(gap, m) for label, gap in to_simplest.items()}
    sentences.append(
        f"What stands when the intervals are widened for these {m} comparisons with the simplest choice, "
        f"constant p and γ = 1 (Bonferroni): prefer to it {_those(wide, 'supported')}; avoid "
        f"{_those(wide, 'not supported')}."
    )
    return " ".join(sentences)


def _those(gaps: dict[str, Estimate], verdict: str, common: str = "") -> str:
    """The labels of those that are below 0, or above it, without what all of them have in common."""
    labels = [label.replace(common, "") for label, gap in gaps.items() if _below(gap, 0.0) == verdict]
    return ", ".join(label.replace(", ", " with ") for label in labels) or "none"


def _widened(gap: Estimate, m: int) -> Estimate:
    """With the t-interval of level 1 − 0.05/m in place of 95 %'s: all m hold together with 95 %."""
    if gap.n < 2:
        return gap
    wider = stats.t.ppf(1 - 0.025 / m, gap.n - 1) / stats.t.ppf(0.975, gap.n - 1)
    return replace(gap, half_width=gap.half_width * float(wider))


def _below(gap: Estimate, bound: float) -> str:
    """Whether the interval lies below `bound`, above it, or around it."""
    low, high = gap.interval
    if gap.is_evidence and high < bound:
        return "supported"
    return "not supported" if gap.is_evidence and low > bound else UNDECIDED


def _points(gap: Estimate) -> str:
    low, high = gap.interval
    return f"{gap.mean:+.2f} [{low:+.2f}, {high:+.2f}] (n = {gap.n})".replace("-", "−")
