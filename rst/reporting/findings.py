"""What a protocol's tables say of the paper's claims, in one page made of their numbers alone."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from rst.reporting.pages import SHARPNESS_NAMES, pipes, points
from rst.reporting.statistics import (
    Estimate,
    Statistics,
    estimate,
    estimate_of,
    paired_difference,
    provenance,
)

TABLES = ("schedules", "constant", "gamma")  # what the page is made of
UNDECIDED = "undecided at this scale"
NOT_RUN = "not run"
TIME = 0.15  # within which time must follow η
SHARP = {name: SHARPNESS_NAMES[name] for name in ("lambda_max", "in_ball", "along")}


class Runs:
    """The runs of tables, by label and seed."""

    def __init__(self, tables: dict[str, Statistics], runs: pd.DataFrame) -> None:
        self.tables = tables
        self.ids = {name: one.frame.set_index("label")["runs"].str.split() for name, one in tables.items()}
        self.runs = runs.assign(error=100 * (1 - runs["test_accuracy"])).set_index("id")

    def labels(self, table: str, eta: float) -> list[str]:
        """Of the rows whose expected η is about this one."""
        frame = self.tables[table].frame
        return frame.loc[(frame["eta_expected.mean"] - eta).abs() < 0.01, "label"].to_list()

    def values(self, table: str, label: str, column: str) -> pd.Series:
        """Of each seed of a row, where it is known. The column "error" is the test error in percent."""
        if column not in self.runs:
            return pd.Series(dtype=float)
        rows = self.runs.loc[self.ids[table][label], ["seed", column]]
        return rows.set_index("seed")[column].dropna()

    def gap(self, table: str, label: str, other: str) -> Estimate:
        """Test error of `label` less that of `other`, paired by seed."""
        return paired_difference(self.values(table, label, "error"), self.values(table, other, "error"))

    def gaps(self, table: str, labels: list[str], other: str) -> dict[str, Estimate]:
        return {label: self.gap(table, label, other) for label in labels if label != other}

    def to_half(self, table: str, label: str) -> Estimate:
        """Test error of `label` less the middle of SAM's and SGD's, paired by seed."""
        sam, sgd = (self.values(table, name, "error") for name in ("SAM", "SGD"))
        return paired_difference(self.values(table, label, "error"), (sam + sgd) / 2)


def findings(tables: dict[str, Statistics], runs: pd.DataFrame, noise: pd.DataFrame | None = None) -> str:
    """The page, as Markdown.

    Args:
        tables: those of `TABLES`, of one setting each, all rows complete.
        runs: as `build_table` has them, with sharpness joined where it was measured.
        noise: label_noise.csv of protocol quick, where there is one.

    Raises KeyError where the tables have not the rows that the page is about.
    """
    known = Runs(tables, runs)
    schedules = tables["schedules"]
    even = "constant p = 0.5"
    equal = [label for label in known.labels("schedules", 1.5) if label != even]
    gammas = [label for label in known.labels("gamma", 1.5) if "RST" not in label]
    errors = _of_errors(known)
    found = [
        *(_finding(f.claim, f"{f.what}: {points(f.gap)}", f.gap.n, _below(f.gap)) for f in errors),
        *_flatter(known),
        _time(known),
    ]
    of_error = {f.what: f.gap for f in errors}
    rows = {f"RST {label}": ("schedules", label) for label in [even, *equal]}
    rows |= {f"G-RST {label}": ("gamma", label) for label in gammas}
    to_half = {name: known.to_half(*row) for name, row in rows.items()}
    strict = [name for name, row in rows.items() if _within_half(known, *row)]
    parts = [
        "# Findings",
        f"{schedules.setting}, n = {_n(schedules.frame)} seeds a row, all of one training set: the intervals "
        "are of initialisation, data order, augmentation and coin. Differences are of test error in "
        "percentage points, negative is better; brackets hold 95 % t-intervals, paired by seed. Tables: "
        + ", ".join(f"[{name}]({name}.md)" for name in tables)
        + ".",
        pipes(found),
        "Late, early, evenly: piecewise rising, piecewise falling, constant p. "
        + _flat_or_sharp(known, [even, *equal])
        + " Times are of runs side by side (interleaved: `make benchmark`). A verdict holds for this setting "
        "and no other.",
        "## At half of SAM's extra cost",
        "RST is comparable with SAM: the error lies below the middle of SGD's and SAM's, so that more than "
        "half of SAM's gain is kept (not supported: above it). G-RST matches or beats SAM: that, and not "
        "worse than SAM. All by intervals that exclude 0.",
        pipes([{"At η ≈ 1.5": name} | _against_sam(known, *row) for name, row in rows.items()]),
        "By another rule, that the interval to SAM's error ends below half of SAM's mean gain, supported: "
        f"{', '.join(strict) or 'none'}. Widened for their number (Bonferroni), what stands of the "
        f"{len(of_error)} differences of error above: {_standing(of_error, 'supported')}; of these "
        f"{len(to_half)} rows below the middle: {_standing(to_half, 'supported')}.",
        "## Choosing a schedule",
        _choosing(known, even, equal),
        "## On another task",
        "Not run." if noise is None else _on_noise(noise),
        " ".join(_sources(tables, runs)),
    ]
    return "\n\n".join(parts) + "\n"


def _finding(claim: str, measured: str, n: int, verdict: str) -> dict[str, str]:
    """A line of the page. The verdict begins with supported, not supported, UNDECIDED or NOT_RUN."""
    return {"Claim": claim, "Measured": measured, "n": str(n), "Verdict": verdict}


def _sources(tables: dict[str, Statistics], runs: pd.DataFrame) -> list[str]:
    """The provenance of all tables together, in which a run of two of them counts once."""
    frame = pd.concat([table.frame for table in tables.values()])
    ids = frame.set_index("label")["runs"].str.split().explode().rename("id").reset_index()
    return provenance(ids.merge(runs, on="id"), frame)


class _OfError(NamedTuple):
    """A claim that one error is below another."""

    claim: str
    what: str
    gap: Estimate


def _of_errors(known: Runs) -> list[_OfError]:
    found = [_OfError("SAM generalises better than SGD", "SAM − SGD", known.gap("schedules", "SAM", "SGD"))]
    for p in ("0.5", "0.25"):
        for other, how in (("constant", "evenly"), ("piecewise falling", "early")):
            gap = known.gap("schedules", f"piecewise rising p = {p}", f"{other} p = {p}")
            claim = f"SAM steps late beat SAM steps {how}, p = {p}"
            found.append(_OfError(claim, f"late − {how} at p = {p}", gap))
    return found


def _against_sam(known: Runs, table: str, label: str) -> dict[str, str]:
    to_sam, to_half = known.gap(table, label, "SAM"), known.to_half(table, label)
    verdict = _below(to_half)
    if _below(known.gap(table, "SAM", "SGD")) != "supported":
        verdict = f"{UNDECIDED}: SAM itself is not shown to gain"
    elif table == "gamma" and _below(to_sam) == "not supported":
        verdict = "not supported: worse than SAM"
    elif verdict != "not supported":
        own = {"supported": ": better than SAM", "not supported": ", but worse than SAM"}
        verdict += own.get(_below(to_sam), "")
    return {
        "Error − SAM's": points(to_sam),
        "Error − the middle": points(to_half),
        "n": str(to_half.n),
        "Verdict": verdict,
    }


def _within_half(known: Runs, table: str, label: str) -> bool:
    """Whether the interval to SAM's error ends below half of SAM's mean gain, taken as known."""
    to_sam, gain = known.gap(table, label, "SAM"), known.gap(table, "SAM", "SGD")
    return gain.excludes_zero and to_sam.is_evidence and to_sam.interval[1] < -gain.mean / 2


def _flatter(known: Runs) -> list[dict[str, str]]:
    found = []
    for column, name in SHARP.items():
        ratio = _log_ratio(known, "SAM", column)
        claim = f"SAM's minima are flatter than SGD's: {name}"
        if ratio is None:
            found.append(_finding(claim, "not measured", 0, NOT_RUN))
        else:
            found.append(_finding(claim, f"ratio: {_factor(ratio)}", ratio.n, _below(ratio)))
    return found


def _flat_or_sharp(known: Runs, labels: list[str]) -> str:
    """Of these rows how many are flatter than SGD, and which are sharper, by each measure."""
    parts = []
    for column, name in SHARP.items():
        ratios = {x: ratio for x in labels if (ratio := _log_ratio(known, x, column)) is not None}
        flatter = sum(_below(ratio) == "supported" for ratio in ratios.values())
        sharper = _those(ratios, "not supported")
        counted = f"{flatter} of {len(ratios)} (sharper: {sharper})" if ratios else "not measured"
        parts.append(f"by {name} {counted}")
    loss = _log_ratio(known, "SAM", "loss")
    unequal = f" SAM's training loss is {_factor(loss)} times SGD's." if loss else ""
    return (
        f"Schedules at η ≈ 1.5 flatter than SGD by an interval that excludes 0: {', '.join(parts)}.{unequal}"
    )


def _log_ratio(known: Runs, label: str, column: str) -> Estimate | None:
    """The logarithm of a row's sharpness over SGD's, paired by seed: sharpness is positive and spreads by
    factors. None where there is none of both, or one that is not positive."""
    ours, theirs = (known.values("schedules", name, column) for name in (label, "SGD"))
    if (ours <= 0).any() or (theirs <= 0).any() or not set(ours.index) & set(theirs.index):
        return None
    return paired_difference(np.log(ours), np.log(theirs))


def _time(known: Runs) -> dict[str, str]:
    """Seconds over SGD's against η: of each seed the mean logarithm over rows, and of these the interval."""
    claim = f"Training time follows η within {100 * TIME:.0f} % on average"
    frame = known.tables["schedules"].frame.set_index("label")
    labels = [x for x in frame.index[frame["time_relative_to_SGD"].notna()] if x != "SGD"]
    sgd = known.values("schedules", "SGD", "seconds.train")
    excess = {}
    for label in labels:
        eta = known.values("schedules", label, "propagations") / known.values("schedules", label, "steps")
        seconds = known.values("schedules", label, "seconds.train")
        excess[label] = np.log((seconds / sgd / eta).astype(float))
    if not excess:
        return _finding(claim, "no times of one machine", 0, NOT_RUN)
    of_seeds = estimate(pd.DataFrame(excess).mean(axis=1))
    rows = pd.DataFrame(excess).median()
    low, high = of_seeds.interval
    measured = (
        f"(time / SGD's) / η: {_factor(of_seeds)}; medians of {len(rows)} rows {math.exp(rows.min()):.2f} to "
        f"{math.exp(rows.max()):.2f}"
    )
    bound = math.log(1 + TIME)
    if of_seeds.is_evidence and -bound < low and high < bound:
        return _finding(claim, measured, of_seeds.n, "supported")
    outside = of_seeds.is_evidence and (high < -bound or low > bound)
    return _finding(claim, measured, of_seeds.n, "not supported" if outside else UNDECIDED)


def _choosing(known: Runs, half: str, equal: list[str]) -> str:
    """From the numbers: at each η what is better or worse than the simplest, and what to do then."""
    quarter = "constant p = 0.25"
    others = {half: equal, quarter: [x for x in known.labels("schedules", 1.25) if x != quarter]}
    sentences = []
    to_simplest: dict[str, Estimate] = {}  # each choice less constant p with γ = 1
    for even, eta in ((quarter, 1.25), (half, 1.5)):
        labels = [even, *others[even]]
        errors = {label: estimate(known.values("schedules", label, "error")).mean for label in labels}
        best = min(errors, key=lambda label: errors[label])
        to_even = known.gaps("schedules", labels, even)
        to_sgd = known.gaps("schedules", labels, "SGD")
        to_simplest |= to_even
        lowest = "" if best == even else f", difference {points(to_even[best])}"
        better = sum(_below(gap) == "supported" for gap in to_sgd.values())
        sentences.append(
            f"At η ≈ {eta} the lowest mean error of {len(labels)} schedules is that of {best}, "
            f"{errors[best]:.2f} % ({even}: {errors[even]:.2f} %{lowest}). By an interval that excludes 0, "
            f"better than SGD: {better} of them; better than constant: {_those(to_even, 'supported')}; "
            f"worse: {_those(to_even, 'not supported')}."
        )
    rising = [x for x in [*others[quarter], *equal] if " rising " in x]
    later = {x: known.gap("schedules", x, x.replace("rising", "falling")) for x in rising}
    verdicts = [_below(gap) for gap in later.values()]
    sentences.append(
        f"Of {len(later)} pairs of one schedule rising and falling, rising is better in "
        f"{verdicts.count('supported')}, worse in {verdicts.count('not supported')} and undecided in "
        f"{verdicts.count(UNDECIDED)}; widened for {len(later)} comparisons, better in "
        f"{_standing(later, 'supported')}."
    )
    gammas = known.labels("gamma", 1.5)
    (plain,) = [x for x in gammas if "RST" in x]
    to_plain = known.gaps("gamma", gammas, plain)
    to_simplest |= to_plain
    sentences.append(
        f"At constant p = 0.5, better than γ = 1: {_those(to_plain, 'supported')}; worse: "
        f"{_those(to_plain, 'not supported')}."
    )
    sentences.append(
        f"Widened for the {len(to_simplest)} comparisons with constant p and γ = 1: to be preferred to it: "
        f"{_standing(to_simplest, 'supported')}; to be avoided: {_standing(to_simplest, 'not supported')}."
    )
    return " ".join(sentences)


def _on_noise(noise: pd.DataFrame) -> str:
    """Of each row at which share of random labels it is better or worse than SGD, and than SAM."""
    shares = noise["setting"].str.extract(r"label_noise=([\d.]+)")[0].astype(float)
    labels = list(dict.fromkeys(noise["label"]))
    pairs = [(x, other) for other in ("SGD", "SAM") for x in labels if x not in ("SGD", other)]
    words = {"supported": "better", "not supported": "worse", UNDECIDED: "undecided"}
    alike: dict[str, list[str]] = {}  # labels by what is said of them
    for label, other in pairs:
        where: dict[str, list[str]] = {verdict: [] for verdict in words}
        for line in noise[noise["label"] == label].assign(share=shares).to_dict("records"):
            where[_below(estimate_of(line, f"difference_to_{other}"))].append(f"{100 * line['share']:.0f}")
        parts = [f"{words[verdict]} at {', '.join(found)} %" for verdict, found in where.items() if found]
        alike.setdefault(f"− {other}: {'; '.join(parts)}.", []).append(label)
    return (
        "Handwritten digits of which a share of the training labels is random "
        f"([label_noise](../quick/label_noise.md), n = {_n(noise)} seeds), by intervals that exclude 0: "
        + " ".join(f"{', '.join(same)} {said}" for said, same in alike.items())
    )


def _those(gaps: dict[str, Estimate], verdict: str) -> str:
    """The labels of those that are below 0, or above it."""
    labels = [label for label, gap in gaps.items() if _below(gap) == verdict]
    return ", ".join(label.replace(", ", " with ") for label in labels) or "none"


def _standing(gaps: dict[str, Estimate], verdict: str) -> str:
    """Those of which that can be said of all together."""
    return _those({label: _widened(gap, len(gaps)) for label, gap in gaps.items()}, verdict)


def _widened(gap: Estimate, m: int) -> Estimate:
    """With the t-interval of level 1 − 0.05/m in place of 95 %'s: all m hold together with 95 %."""
    if gap.n < 2:
        return gap
    wider = stats.t.ppf(1 - 0.025 / m, gap.n - 1) / stats.t.ppf(0.975, gap.n - 1)
    return replace(gap, half_width=gap.half_width * float(wider))


def _below(gap: Estimate) -> str:
    """Whether the interval lies below 0, above it, or around it."""
    if not gap.excludes_zero:
        return UNDECIDED
    return "supported" if gap.mean < 0 else "not supported"


def _n(frame: pd.DataFrame) -> str:
    """The rows' numbers of seeds."""
    return " to ".join(map(str, sorted(set(frame["test_error_percent.n"]))))


def _factor(log_ratio: Estimate) -> str:
    mean, low, high = map(math.exp, (log_ratio.mean, *log_ratio.interval))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"
