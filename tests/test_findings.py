"""The page of findings says what its tables' numbers say, and no more."""

import re
from zlib import crc32

import pytest
from conftest import ROOT
from test_rendering import pipe_tables
from test_tables import record

from rst.findings import TABLES, _widened, findings
from rst.sweeps import read_specification
from rst.tables import Row, build_table, estimate, runs_frame

CONF = ROOT / "conf"
# Percentage points beside SAM's error, of which each seed's noise is the same in every row but for its own.
NOISE = [0.0, 0.4, -0.3, 0.2, -0.4]


def page(errors, sharpness=None):
    """Findings of runs whose error is 30 % + errors(table's label), with SGD at 32 and SAM at 30."""
    all_records, asked = {}, {}
    for table in TABLES:
        rows = []
        for label in [row.label for row in read_specification(CONF, table, "cpu").rows]:
            plain = {"p = 0 (SGD)": "SGD", "p = 1 (SAM)": "SAM"}.get(label, label)
            method = {"SGD": "sgd", "SAM": "sam"}.get(plain, "rst")
            ids = {}
            for seed, noise in enumerate(NOISE):
                # A little of its own in each row and seed, or all differences would be equal.
                own = 0.02 * (crc32(f"{plain} {seed}".encode()) % 5)
                error = 30 + errors.get(plain, 0.0) + noise + own
                one = record(method, seed, error, id=f"{plain}/{seed}".replace(" ", "_"))
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
    ((lines),) = pipe_tables(text)
    return text, {line["Claim"]: (line["Measured"], line["Verdict"]) for line in lines}


ERRORS = {
    "SGD": 2.0,
    "piecewise rising p = 0.5": -0.5,
    "piecewise falling p = 0.5": 1.5,
    "trigonometric rising p = 0.5": 1.8,
    "p = 0.5, γ = 2.0": -1.0,
    "p = 0.5, γ = 3.0": 1.9,
}


def test_verdicts():
    text, found = page(ERRORS)
    measured, verdict = found["SAM generalises better than SGD"]
    assert verdict == "supported"
    mean, low, high = (float(x.replace("−", "-")) for x in re.findall(r"[−+][\d.]+", measured))
    assert mean == pytest.approx(-2.0, abs=0.1) and low < mean < high < 0
    assert measured.endswith("(n = 5)")
    assert found["RST at η ≈ 1.5 is comparable with SAM: constant"][1] == "supported"
    assert found["RST at η ≈ 1.5 is comparable with SAM: trigonometric"][1] == "not supported"
    assert found["G-RST at η ≈ 1.5 matches or beats SAM: γ = 2.0"][1] == "supported: beats"
    assert found["G-RST at η ≈ 1.5 matches or beats SAM: γ = 3.0"][1] == "not supported"
    assert found["A budget spent late beats one spread evenly, p = 0.5"][1] == "supported"
    assert found["A budget spent late beats one spread evenly, p = 0.25"][1] == "undecided at this scale"
    assert found["Late beats early, p = 0.5"][1] == "supported"
    assert found["SAM's minima are flatter"] == ("not measured", "not run")
    assert "At p = 0.5 (η ≈ 1.5) the lowest mean error of 7 schedules is piecewise rising's" in text
    at_quarter, at_half = text.split("At p = 0.5")
    assert "better than constant: none; worse: none; " in at_quarter
    assert (
        "better than constant: piecewise rising; worse: trigonometric rising, piecewise falling; " in at_half
    )
    assert "better than SGD: constant, piecewise rising, " in at_half
    # By its own little noise γ = 0.5 is better by an interval that excludes 0; not among 16 comparisons.
    assert "better than γ = 1: γ = 0.5, γ = 2.0; worse: γ = 3.0." in text
    stands = text.split("these 16 comparisons with the simplest choice, constant p and γ = 1 ")[1].split(
        "\n"
    )[0]
    assert stands == (
        "(Bonferroni): prefer to it piecewise rising p = 0.5, p = 0.5 with γ = 2.0; avoid "
        "trigonometric rising p = 0.5, piecewise falling p = 0.5, p = 0.5 with γ = 3.0."
    )


def test_what_includes_zero_decides_nothing():
    text, found = page({})
    assert found["SAM generalises better than SGD"][1] == "undecided at this scale"
    assert found["Late beats early, p = 0.5"][1] == "undecided at this scale"
    assert "prefer to it none; avoid none.\n" in text


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
        return {"lambda_max": flat * spread, "in_ball": flat / 100}

    _, found = page({"SGD": 2.0}, measured)
    text, verdict = found["SAM's minima are flatter: λ_max"]
    assert verdict == "supported" and re.search(r"SGD's 0\.25 \[0\.2\d, 0\.2\d\] \(n = 5\)", text)
    assert found["RST linear's minima are flatter: λ_max"][1] != "supported"
