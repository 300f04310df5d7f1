"""The claims of conf/claims, tested on the records."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from scipy import stats

from rst.files import write_text
from rst.reporting.pages import fill, pipes
from rst.reporting.records import Records
from rst.reporting.statistics import (
    MIN_SEEDS,
    Estimate,
    estimate,
    holm,
    on_one_machine,
    paired_difference,
)
from rst.reporting.tables import Column, Row, Table

ALPHA = 0.05
POWER = 0.8
MOST = 1000  # units that "n needed" is counted up to


@dataclass(frozen=True)
class Claim:
    """A claim about two rows of a table, paired by seed or part of the data: that the mean of `row` − `minus`
    is `below` a bound, or `within` a distance from 0; or the same of the ratio `row` / `over`, on a
    logarithmic scale, where `within` 0.15 means between 1/1.15 and 1.15. Several labels stand for the mean of
    their rows.

    Args:
        claim: in words.
        table: a table's name, of several columns with the column's: "label_noise/noise-0.2".
        row, minus, over: a label or several; `row` may be "all", those that it is not compared with.
        metric: a column of the records, or one of `rst.reporting.statistics.DERIVED`.
    """

    claim: str
    table: str
    row: str | Sequence[str]
    minus: str | Sequence[str] = ()
    over: str | Sequence[str] = ()
    below: float | None = None
    within: float | None = None
    metric: str = "test_error"

    def __post_init__(self) -> None:
        if bool(self.minus) == bool(self.over) or (self.below is None) == (self.within is None):
            raise ValueError(f"claim {self.claim!r} needs either minus or over, and either below or within")

    @property
    def bounds(self) -> list[float]:
        """Those that the contrast's mean must lie within; of a ratio, those of its logarithm."""
        if self.below is not None:
            return [-np.inf, np.log(self.below) if self.over else self.below]
        assert self.within is not None
        end = np.log1p(self.within) if self.over else self.within
        return [-end, end]


@dataclass(frozen=True)
class Outcome:
    """Whether the estimate is within the claim's bounds, and the p-value against the nearest of them. p is 1
    where nothing can be tested, and `untested` says why."""

    claim: Claim
    estimate: Estimate
    holds: bool = False
    p: float = 1.0
    untested: str = ""

    def verdict(self, adjusted: float) -> str:
        """By the p-value adjusted for the number of claims."""
        if self.untested or adjusted >= ALPHA:
            return self.untested or "undecided"
        return "supported" if self.holds else "contradicted"


def read_claims(path: Path) -> dict[str, list[Claim]]:
    """The families of a file of conf/claims, by title. A claim with a list `each` in place of `row` stands
    for a claim about each of its labels, which `{row}` in its words names.

    Raises:
        ValueError: naming the claim, for a contradiction or an unknown key.
    """
    families: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    claims: dict[str, list[Claim]] = {}
    for title, nodes in families.items():
        claims[title] = []
        for node in nodes:
            for row in node.pop("each", [node.get("row")]):
                try:
                    words = node["claim"].replace("{row}", str(row))
                    claims[title].append(Claim(**{**node, "row": row, "claim": words}))
                except (KeyError, TypeError) as error:
                    raise ValueError(f"{path}, claim {node.get('claim')!r}: {error}") from None
    return claims


def evaluate(claim: Claim, column: Column, records: pd.DataFrame) -> Outcome:
    """A two-sided paired t-test against the bound nearest to the estimate, p not yet adjusted."""
    ours, theirs = _sides(claim, column)

    def mean(rows: Sequence[Row]) -> pd.Series:
        measured = pd.concat([row.values(claim.metric, records) for row in rows], axis=1, join="inner")
        return (measured.map(np.log) if claim.over else measured).mean(axis=1, skipna=False)

    gaps = paired_difference(mean(ours), mean(theirs))
    gap = estimate(gaps)
    rows = [*ours, *theirs]
    units = set.intersection(*(set(row.units) for row in rows))
    asked = {run for row in rows for unit in units for run in row.units[unit]}
    runs = records[records["id"].isin(asked)]
    if gap.n < len(units) or len(runs) < len(asked):
        return Outcome(claim, gap, untested="partial" if gap.n else "not run")
    if claim.metric.startswith(("seconds", "images_per_second")) and not on_one_machine(runs):
        return Outcome(claim, gap, untested="not comparable: several machines")
    if gap.n < MIN_SEEDS or np.isnan(gap.low):
        return Outcome(claim, gap)
    low, high = claim.bounds
    nearest = min(low, high, key=lambda bound: abs(gap.mean - bound))
    p = float(stats.ttest_1samp(gaps, nearest).pvalue)
    return Outcome(claim, gap, low < gap.mean < high, p)


def tables_of_claims(
    families: Mapping[str, Sequence[Claim]], tables: Mapping[str, Table], records: Records
) -> str:
    """Of each family its title and a table: estimates with 95 % intervals, not adjusted; p-values adjusted by
    Holm's method within the family, and the verdicts that follow at the 5 % level. Where there is none, how
    many units would be needed for one (`_needed`)."""
    joined, parts = records.joined, []
    for title, claims in families.items():
        outcomes = [evaluate(claim, _column(claim, tables), joined) for claim in claims]
        adjusted = holm(outcome.p for outcome in outcomes)
        lines = [
            {
                "Claim": outcome.claim.claim,
                "Estimate [95 % interval]": _estimate(outcome),
                "n": str(outcome.estimate.n),
                "p, adjusted": "< 0.001" if p < 0.001 else f"{p:.3f}",
                "Verdict": outcome.verdict(p),
                "n needed": _needed(outcome, len(claims)) if outcome.verdict(p) == "undecided" else "",
            }
            for outcome, p in zip(outcomes, adjusted, strict=True)
        ]
        parts.append(f"**{title}**\n\n{pipes(lines)}")
    return "\n\n".join(parts)


def write_claims(path: Path, tables: Mapping[str, Table], records: Records, page: Path) -> set[str]:
    """Put the claims of `path`, tested, into `page` between <!-- claims --> and <!-- end -->; a page that is
    not there is made. Returns the tables that claims are about and `tables` lack; where there is one, nothing
    is written."""
    families = read_claims(path)
    needed = {claim.table.partition("/")[0] for claims in families.values() for claim in claims}
    if missing := needed - set(tables):
        return missing
    if not page.exists():
        write_text(page, f"# Claims under protocol {path.stem}\n\n<!-- claims -->\n<!-- end -->\n")
    fill(page, "claims", tables_of_claims(families, tables, records))
    return set()


def _column(claim: Claim, tables: Mapping[str, Table]) -> Column:
    table, _, name = claim.table.partition("/")
    for column in tables[table].columns:
        if column.name == name:
            return column
    raise ValueError(f"claim {claim.claim!r}: there is no table {claim.table}")


def _sides(claim: Claim, column: Column) -> tuple[list[Row], list[Row]]:
    rows = {row.label: row for row in column.rows}
    theirs = _listed(claim.minus or claim.over)
    ours = [label for label in rows if label not in theirs] if claim.row == "all" else _listed(claim.row)
    if unknown := {*ours, *theirs} - set(rows):
        raise ValueError(f"claim {claim.claim!r}: no row is labelled {', '.join(sorted(unknown))}")
    return [rows[label] for label in ours], [rows[label] for label in theirs]


def _listed(labels: str | Sequence[str]) -> list[str]:
    return [labels] if isinstance(labels, str) else list(labels)


def _needed(outcome: Outcome, claims: int) -> str:
    """The n that gives the t-test of one of so many claims the power `POWER` if mean and spread are exactly
    those estimated; by Bonferroni's adjustment, which Holm's never exceeds."""
    gap, away = outcome.estimate, min(abs(outcome.estimate.mean - bound) for bound in outcome.claim.bounds)
    if not gap.low < gap.high:
        return "–"

    def power(n: int) -> float:
        critical = stats.t.ppf(1 - ALPHA / 2 / claims, n - 1)
        return float(stats.nct.sf(critical, n - 1, away / gap.std * np.sqrt(n)))

    n = bisect_left(range(MOST), POWER, lo=2, key=power)
    return str(n) if n < MOST else f"≥ {MOST}"


def _estimate(outcome: Outcome) -> str:
    gap = outcome.estimate
    if gap.n < 2:
        return "–"
    digits, unit = (2, " points") if outcome.claim.metric == "test_error" else (3, "")

    def text(x: float) -> str:
        return f"{np.exp(x):.2f}" if outcome.claim.over else f"{x:+.{digits}f}".replace("-", "−")

    interval = "" if np.isnan(gap.low) else f" [{text(gap.low)}, {text(gap.high)}]"  # none of equal values
    return f"× {text(gap.mean)}{interval}" if outcome.claim.over else text(gap.mean) + interval + unit
