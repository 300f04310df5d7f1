import math
import re
from dataclasses import replace

import numpy as np
import pytest
from sample_runs import column, records, results, table
from scipy import stats

from rst.reporting.claims import Claim, evaluate, read_claims, tables_of_claims, write_claims
from rst.reporting.statistics import holm

RST_ABOVE_SAM = {"claim": "A claim", "table": "small", "row": "RST", "minus": "SAM"}


def outcome(made=None, **keys):
    return evaluate(Claim(**{**RST_ABOVE_SAM, **keys}), column(), (made or records()).joined)


# RST − SAM is 0, 2, 1, 1, 1: mean 1, 95 % interval 0.12 to 1.88.
@pytest.mark.parametrize(
    ("keys", "verdict", "bound"),
    [
        ({"below": 2}, "supported", 2),
        ({"below": 0}, "contradicted", 0),
        ({"within": 2}, "supported", 2),
        ({"within": 0.1}, "contradicted", 0.1),
        ({"within": 0.5}, "undecided", 0.5),
        ({"row": "SAM", "minus": "RST", "below": 0}, "supported", 0),
    ],
)
def test_a_paired_t_test_against_the_nearest_bound(keys, verdict, bound):
    found = outcome(**keys)
    sign = -1 if keys.get("row") == "SAM" else 1
    assert found.verdict(found.p) == verdict
    assert found.p == pytest.approx(stats.ttest_1samp([sign * x for x in (0, 2, 1, 1, 1)], bound).pvalue)
    assert found.estimate.mean == pytest.approx(sign)


def test_several_rows_stand_for_their_mean():
    found = outcome(minus=["SGD", "SAM"], below=0)
    # (10 + 7)/2, (11 + 6)/2, (12 + 8)/2 … less RST's 7, 8, 9, 10, 11.
    assert found.estimate.mean == pytest.approx((-1.5 - 0.5 - 1 - 1 - 1) / 5)
    of_all = outcome(row="all", minus="SAM", below=0)
    assert of_all.estimate.mean == pytest.approx((4 + 1) / 2)


def test_ratios_are_of_geometric_means():
    found = outcome(metric="test_loss", minus=(), over="SAM", below=1)
    assert found.estimate.mean == pytest.approx(-0.539, abs=1e-3)  # ln(0.7 / 1.2), equal with every seed
    seconds = {"metric": "seconds.train", "minus": (), "over": "SGD"}
    found = outcome(**seconds, within=0.6)
    expected = stats.gmean([(15 + i / 10) / (10 + i / 10) for i in range(5)])
    assert math.exp(found.estimate.mean) == pytest.approx(expected)
    assert found.verdict(found.p) == "supported"
    assert outcome(**seconds, within=0.4).verdict(0) == "contradicted"


def test_times_of_several_machines_are_not_compared():
    some = [one | {"images_per_second": 100.0} for one in results()]
    some = [one | {"host": "other"} if one["id"] == "rrst0" else one for one in some]
    for metric in ("seconds.train", "images_per_second"):
        found = outcome(records(some), metric=metric, minus=(), over="SGD", within=0.6)
        assert (found.verdict(0), found.p) == ("not comparable: several machines", 1)


def test_a_mean_of_rows_has_all_of_them():
    some = results()
    some[-1] |= {"train_loss": -0.1}  # RST's with the last seed, which has no logarithm
    claim = Claim("ratio", "small", ["SAM", "RST"], over="SGD", below=9, metric="train_loss")
    found = evaluate(claim, column(), records(some).joined)
    assert (found.estimate.n, found.untested) == (4, "partial")


def test_nothing_is_claimed_of_runs_that_are_missing_few_or_equal():
    assert outcome(records([]), below=0).verdict(0) == "not run"
    assert outcome(records(results()[:-1]), below=2).verdict(0) == "partial"
    two = evaluate(Claim(**RST_ABOVE_SAM, below=9), column(seeds=2), records().joined)
    assert (two.verdict(two.p), two.p) == ("undecided", 1)
    assert outcome(minus="SGD", below=0).p == 1  # −3 with every seed
    equal = {"F": [Claim(**RST_ABOVE_SAM | {"minus": "SGD"}, below=0)]}
    assert "| −3.00 points |" in re.sub(" +", " ", tables_of_claims(equal, tables(), records()))
    assert outcome(metric="lambda_max", below=0).verdict(0) == "not run"  # not measured


def test_a_second_run_on_a_part_must_be_there():
    asked = column()
    asked.rows[:] = [replace(row, folds=3) for row in asked.rows]
    claim = Claim(**RST_ABOVE_SAM, below=9)
    found = evaluate(claim, asked, records().joined)
    assert (found.estimate.n, found.untested) == (3, "")
    assert found.estimate.mean == pytest.approx(((0 + 1) / 2 + (2 + 1) / 2 + 1) / 3)
    assert evaluate(claim, asked, records(results()[:-1]).joined).untested == "partial"


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="either minus or over, and either below or within"):
        Claim(**RST_ABOVE_SAM, over="SAM", below=1)
    with pytest.raises(ValueError, match="either minus or over, and either below or within"):
        Claim(**RST_ABOVE_SAM)
    with pytest.raises(ValueError, match="no row is labelled ASAM"):
        outcome(row="ASAM", below=0)


CLAIMS = """
First:
  - {claim: "{row} is below SGD", table: small, each: [RST, SAM], minus: SGD, below: 0}
  - {claim: SAM is not worse than RST, table: small, row: SAM, minus: RST, below: 0.5}
Second:
  - {claim: RST is not worse than SAM, table: several/b, row: RST, minus: SAM, below: 2}
"""


def families(tmp_path, text=CLAIMS):
    (tmp_path / "claims.yaml").write_text(text)
    return read_claims(tmp_path / "claims.yaml")


def tables():
    return {"small": table(), "several": table(column("a", seeds=2), column("b"), name="several")}


def test_each_family_is_corrected_by_itself(tmp_path):
    some = results(
        {"sgd": [10.0, 11.5, 12.0, 13.0, 14.0], "sam": [7.0, 6, 8, 9, 10], "rst": [7.0, 8, 9, 10, 11]}
    )
    made, claims = records(some), families(tmp_path)
    text = tables_of_claims(claims, tables(), made)
    lines = [line for line in text.splitlines() if line.startswith("|") and " points" in line]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    p = holm(evaluate(claim, column(), made.joined).p for claim in claims["First"])
    expected = [f"{x:.3f}" if x >= 0.001 else "< 0.001" for x in p]
    assert [line[0] for line in shown] == [
        "RST is below SGD",
        "SAM is below SGD",
        "SAM is not worse than RST",
        "RST is not worse than SAM",
    ]
    assert [line[3] for line in shown[:3]] == expected
    assert shown[3][1:] == ["+1.00 [+0.12, +1.88] points", "5", "0.034", "supported", ""]


def test_what_does_not_survive_the_correction_is_undecided(tmp_path):
    one = "{claim: RST above SAM, table: small, row: RST, minus: SAM, below: 0}"
    alone = tables_of_claims(families(tmp_path, f"F: [{one}]"), tables(), records())
    assert "contradicted" in alone  # p = 0.034
    among = tables_of_claims(families(tmp_path, f"F: [{', '.join([one] * 2)}]"), tables(), records())
    assert "contradicted" not in among and among.count("undecided") == 2


@pytest.mark.parametrize(("below", "n"), [(1.5, 18), (1.01, "≥ 1000"), (-1, None)])
def test_how_many_seeds_would_decide(tmp_path, below, n):
    """Mean 1, s = √½: of samples of 18 the t-test tells 80 % from 1.5, as a simulation says, too."""
    claim = f"{{claim: C, table: small, row: RST, minus: SAM, below: {below}}}"
    text = tables_of_claims(families(tmp_path, f"F: [{claim}]"), tables(), records())
    shown = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert shown[-2:] == (["undecided", str(n)] if n else ["contradicted", ""])
    if n == 18:
        drawn = np.random.default_rng(0).normal(1, math.sqrt(0.5), size=(40_000, 18))
        told = [(stats.ttest_1samp(x, 1.5, axis=1).pvalue < 0.05).mean() for x in (drawn[:, :17], drawn)]
        assert told[0] < 0.8 <= told[1]


def test_unknown_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"claim 'X'.*belw"):
        families(tmp_path, "F: [{claim: X, table: small, row: RST, minus: SAM, belw: 0}]")


def test_claims_are_written_into_a_page(tmp_path):
    families(tmp_path)
    page, made = tmp_path / "README.md", records()
    page.write_text("By hand.\n\n<!-- claims -->\nold\n<!-- end -->\nMore by hand.\n")
    assert write_claims(tmp_path / "claims.yaml", {"small": table()}, made, page) == {"several"}
    assert "old" in page.read_text()
    assert not write_claims(tmp_path / "claims.yaml", tables(), made, page)
    text = page.read_text()
    assert text.startswith("By hand.") and text.endswith("More by hand.\n") and "old" not in text
    assert tables_of_claims(read_claims(tmp_path / "claims.yaml"), tables(), made) in text
    assert not write_claims(tmp_path / "claims.yaml", tables(), made, tmp_path / "new.md")
    assert "RST is not worse than SAM" in (tmp_path / "new.md").read_text()
