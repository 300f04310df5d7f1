"""The page of findings says what its tables' numbers say, and no more."""

import re
from io import StringIO
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_pages import pipe_tables
from test_tables import record, records, table_of

from rst.experiments.sweeps import read_specification
from rst.reporting.findings import TABLES, _on_noise, _widened, findings
from rst.reporting.pages import to_csv
from rst.reporting.statistics import build_table, estimate, runs_frame
from rst.reporting.tables import Row

CONF = ROOT / "conf"
PLAIN = {"p = 0 (SGD)": "SGD", "p = 1 (SAM)": "SAM"}
# Percentage points beside SAM's error, of which each seed's noise is the same in every row but for its own.
NOISE = [0.0, 0.4, -0.3, 0.2, -0.4]


def eta_of(label):
    """Of the rows' labels: mean p is what they say, but for the authors' own, of p = 0.25."""
    if label in ("SGD", "SAM"):
        return {"SGD": 1.0, "SAM": 2.0}[label]
    own = {"piecewise1": 1.75, "piecewise3": 1.5, "linear2": 1.5}
    return own.get(label.split()[0], 1 + float(re.search(r"p = ([\d.]+)", label)[1]))


def page(errors, sharpness=None, seconds=lambda eta, seed: 10 * eta + 0.1 * seed):
    """Findings of runs whose error is 30 % + errors(table's label), with SGD at 32 and SAM at 30."""
    all_records, asked = {}, {}
    for table in TABLES:
        rows = []
        for label in [row.label for row in read_specification(CONF, table, "cpu").rows]:
            plain = PLAIN.get(label, label)
            method = {"SGD": "sgd", "SAM": "sam"}.get(plain, "rst")
            ids, eta = {}, eta_of(plain)
            for seed, noise in enumerate(NOISE):
                # A little of its own in each row and seed, or all differences would be equal.
                own = 0.02 * (crc32(f"{plain} {seed}".encode()) % 5)
                error = 30 + errors.get(plain, 0.0) + noise + own
                one = record(method, seed, error, id=f"{plain}/{seed}".replace(" ", "_"))
                one |= {"expected_propagations": 600 * eta, "propagations": int(600 * eta)}
                one["seconds"] = one["seconds"] | {"train": seconds(eta, seed)}
                all_records[one["id"]] = one
                ids[seed] = one["id"]
            rows.append(Row(label, "command", ids))
        asked[table] = rows
    runs = runs_frame(all_records.values())
    if sharpness:
        runs = runs.assign(**sharpness(runs))
    ends = {"constant": ("p = 1 (SAM)", "p = 0 (SGD)")}
    tables = {
        name: build_table(name, "A setting", rows, runs, *ends.get(name, ("SAM", "SGD")))
        for name, rows in asked.items()
    }
    text = findings(tables, runs)
    claims, at_half = pipe_tables(text)
    assert {line["n"] for line in at_half} == {"5"}
    found = {line["Claim"]: (line["Measured"], line["n"], line["Verdict"]) for line in claims}
    return text, found, {line["At η ≈ 1.5"]: line["Verdict"] for line in at_half}


ERRORS = {
    "SGD": 2.0,
    "piecewise rising p = 0.5": -0.5,
    "linear rising p = 0.5": 0.5,
    "piecewise falling p = 0.5": 1.5,
    "trigonometric rising p = 0.5": 1.0,
    "p = 0.5, γ = 1.5": 0.5,
    "p = 0.5, γ = 2.0": -1.0,
    "p = 0.5, γ = 3.0": 1.9,
}


def test_verdicts():
    text, found, at_half = page(ERRORS)
    measured, n, verdict = found["SAM generalises better than SGD"]
    assert n == "5" and verdict == "supported"
    mean, low, high = (float(x.replace("−", "-")) for x in re.findall(r"[−+][\d.]+", measured))
    assert mean == pytest.approx(-2.0, abs=0.1) and low < mean < high < 0
    assert (
        at_half.items()
        >= {
            "RST constant p = 0.5": "supported",
            "RST piecewise rising p = 0.5": "supported: better than SAM",
            "RST linear rising p = 0.5": "supported, but worse than SAM",
            "RST trigonometric rising p = 0.5": "undecided at this scale, but worse than SAM",
            "RST piecewise falling p = 0.5": "not supported",
            "G-RST p = 0.5, γ = 2.0": "supported: better than SAM",
            "G-RST p = 0.5, γ = 1.5": "not supported: worse than SAM",  # though below the middle
            "G-RST p = 0.5, γ = 3.0": "not supported: worse than SAM",
        }.items()
    )
    assert [label.split()[0] for label in at_half] == 9 * ["RST"] + 4 * ["G-RST"]  # all of η = 1.5
    assert found["SAM steps late beat SAM steps evenly, p = 0.5"][2] == "supported"
    assert found["SAM steps late beat SAM steps evenly, p = 0.25"][2] == "undecided at this scale"
    assert found["SAM steps late beat SAM steps early, p = 0.5"][2] == "supported"
    assert found["SAM's minima are flatter than SGD's: λ_max"] == ("not measured", "0", "not run")
    assert "by λ_max not measured, " in text
    assert "n = 5 seeds a row" in text and "commit 1234567" in text
    labels = {row.label for table in TABLES for row in read_specification(CONF, table, "cpu").rows}
    assert f"\nRuns: {5 * len({PLAIN.get(label, label) for label in labels})}, finished" in text


def test_choosing():
    text, *_ = page(ERRORS)
    at_quarter, at_half = text.split("At η ≈ 1.5 the ")
    assert "better than constant: none; worse: none." in at_quarter
    assert at_half.startswith("lowest mean error of 9 schedules is that of piecewise rising p = 0.5, 29.50 %")
    worse = "linear rising p = 0.5, trigonometric rising p = 0.5, piecewise falling p = 0.5"
    assert f"better than constant: piecewise rising p = 0.5; worse: {worse}." in at_half
    assert "better than SGD: 7 of them; " in at_quarter and "better than SGD: 9 of them; " in at_half
    # By its own little noise γ = 0.5 is better by an interval that excludes 0; not among 18 comparisons.
    worse_gammas = "p = 0.5 with γ = 1.5, p = 0.5 with γ = 3.0"
    assert f"better than γ = 1: p = 0.5 with γ = 0.5, p = 0.5 with γ = 2.0; worse: {worse_gammas}." in text
    stands = text.split("Widened for the 18 comparisons with constant p and γ = 1: ")[1].split("\n")[0]
    assert stands == (
        "to be preferred to it: piecewise rising p = 0.5, p = 0.5 with γ = 2.0; to be avoided: "
        f"{worse}, {worse_gammas}."
    )
    assert "; widened for 6 comparisons, better in piecewise rising p = 0.5. " in text


def test_what_stands_among_many_and_by_another_rule():
    """The rows' own noise is 0.08 at most, and SAM's gain 2: half of it is 1."""
    text, _, at_half = page(ERRORS)
    above = {"trigonometric rising p = 0.5", "piecewise falling p = 0.5", "p = 0.5, γ = 3.0"}  # 1 and more
    below = [label for label in at_half if label.split(" ", 1)[1] not in above]
    assert f"ends below half of SAM's mean gain, supported: {', '.join(below)}. " in text
    stands = ", ".join(label.replace(", ", " with ") for label in below)
    assert f"of these 13 rows below the middle: {stands}.\n" in text
    errors = text.split("what stands of the 5 differences of error above: ")[1].split(";")[0]
    assert errors == "SAM − SGD, late − evenly at p = 0.5, late − early at p = 0.5"


def test_what_includes_zero_decides_nothing():
    text, found, at_half = page({"SGD": 0.0})
    assert found["SAM generalises better than SGD"][2] == "undecided at this scale"
    assert found["SAM steps late beat SAM steps early, p = 0.5"][2] == "undecided at this scale"
    assert set(at_half.values()) == {"undecided at this scale: SAM itself is not shown to gain"}
    assert "to be preferred to it: none; to be avoided: none.\n" in text


def test_another_task():
    reports = [table_of(records(), column=f"digits / dataset.label_noise={share}") for share in (0.0, 0.4)]
    frame = pd.read_csv(StringIO(to_csv(reports)))
    text = _on_noise(frame)
    assert "n = 5 seeds" in text
    assert text.endswith(
        "SAM − SGD: better at 0, 40 %. RST − SGD: undecided at 0, 40 %. RST − SAM: worse at 0, 40 %."
    )
    whole = frame["setting"].str.endswith("0.4")
    frame.loc[whole, "difference_to_SGD.half_width"] = 50.0
    assert "SAM − SGD: better at 0 %; undecided at 40 %. " in _on_noise(frame)


def test_time_against_eta():
    claim = "Training time follows η within 15 % on average"
    measured, n, verdict = page(ERRORS)[1][claim]
    assert n == "5" and verdict == "supported"
    assert re.match(r"\(time / SGD's\) / η: \d\.\d\d \[.*\]; medians of 18 rows \d\.\d\d to ", measured)
    assert page(ERRORS, seconds=lambda eta, seed: 10 * eta**2 + seed)[1][claim][2] == "not supported"
    assert page(ERRORS, seconds=lambda eta, seed: 10 * eta ** (1 + seed % 2))[1][claim][2] == (
        "undecided at this scale"
    )


def test_intervals_for_many_comparisons():
    """By t's table: 2.776 and, at 1 − 0.025/5 = 0.995, 4.604 for 4 degrees of freedom."""
    one = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert _widened(one, 1) == one
    assert _widened(one, 5).half_width / one.half_width == pytest.approx(4.604 / 2.776, rel=1e-3)
    assert _widened(estimate([1.0]), 5).n == 1


def test_sharpness_as_ratios():
    def measured(runs):
        flat = runs["choices.method"].map({"sgd": 40.0, "sam": 10.0, "rst": 41.0})
        spread = 1 + 0.02 * (runs["seed"].astype(int) % 3) * (runs["choices.method"] != "sgd")
        return {"loss": 0.1, "lambda_max": flat * spread, "in_ball": flat / 100, "along": np.nan}

    page_text, found, at_half = page({"SGD": 2.0}, measured)
    claim = "SAM's minima are flatter than SGD's: {}".format
    text, n, verdict = found[claim("λ_max")]
    assert n == "5" and verdict == "supported" and re.fullmatch(r"ratio: 0\.25 \[0\.2\d, 0\.2\d\]", text)
    schedules = ", ".join(label.removeprefix("RST ") for label in at_half if label.startswith("RST "))
    assert f"by λ_max 0 of 9 (sharper: {schedules}), by " in page_text
    assert "by L(θ ± d/2) − L(θ) not measured. " in page_text
    # Equal in all seeds: no evidence of any kind.
    assert found[claim("L(θ + ε) − L(θ)")][2] == "undecided at this scale"
    assert found[claim("L(θ ± d/2) − L(θ)")] == ("not measured", "0", "not run")
