from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sample_runs import column, epochs, records, result, results, table
from scipy import stats

from rst.reporting.records import Finished, records_of
from rst.reporting.statistics import estimate_of
from rst.reporting.tables import Row, summarize, write_table
from rst.schedule import Constant


def frame_of(some=None, measured=(), failures=None, asked=None):
    asked = asked or table()
    summary = summarize(asked, asked.columns[0], records(some, measured).joined, failures or {})
    return summary.frame.set_index("label")


def without(*ids):
    return [one for one in results() if one["id"] not in ids]


def test_by_hand():
    rst = frame_of(measured=["rst"]).loc["RST"]
    # Against SAM: 0, 2, 1, 1, 1: mean 1, s = √(2/4), t·s/√5 = 2.776445·0.7071068/2.2360680 = 0.877989
    gap = estimate_of(rst, "difference_to_SAM")
    assert (gap.mean, gap.low, gap.high, gap.n) == pytest.approx((1, 1 - 0.877989, 1 + 0.877989, 5), abs=1e-6)
    assert estimate_of(rst, "difference_to_SGD").mean == pytest.approx(-3)
    assert (rst["test_error.mean"], rst["best_epoch_error.mean"]) == pytest.approx((9, 8))
    # SAM steps 290 … 294 of 600.
    assert (rst["eta.mean"], rst["eta_expected.mean"]) == pytest.approx((1 + 292 / 600, 1.5))
    # Seconds 15.0 … 15.4 against 10.0 … 10.4.
    assert rst["time"] == pytest.approx(15.2 / 10.2)
    assert (rst["lambda_max.mean"], rst["lambda_max.n"]) == (40, 5)
    assert rst["seeds"] == "0 1 2 3 4"


def test_a_table_of_random_numbers_is_what_scipy_makes_of_them():
    draws = np.random.default_rng(0).normal(10, 1, (3, 5))
    errors = dict(zip(("sgd", "sam", "rst"), draws.tolist(), strict=True))
    frame = frame_of(results(errors))
    for label, x in zip(("SGD", "SAM", "RST"), draws, strict=True):
        error = estimate_of(frame.loc[label], "test_error")
        expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
        assert (error.mean, error.std) == pytest.approx((x.mean(), x.std(ddof=1)))
        assert (error.low, error.high) == pytest.approx((expected.low, expected.high))
    gap, expected = estimate_of(frame.loc["RST"], "difference_to_SAM"), stats.ttest_rel(draws[2], draws[1])
    assert (gap.low, gap.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_propagations_are_per_step_of_the_baseline():
    """A row of half as many epochs has half as many steps."""
    asked = table()
    asked.columns[0].rows[1] = replace(asked.columns[0].rows[1], epochs_factor=0.5)
    frame = frame_of(asked=asked)
    assert frame.loc["SAM", ["eta.mean", "eta_expected.mean"]].tolist() == [1, 1]
    assert frame.loc["SGD", "eta.mean"] == 1


def test_rows_are_paired_by_part_of_the_data():
    """Seeds 0 … 4 on parts 0, 1, 0, 1, 0 of 2: SAM − SGD are −3, −5, −4, −4, −4; RST has one run a part."""
    asked = table()
    rows = [replace(row, folds=2) for row in asked.columns[0].rows]
    rows[2] = replace(rows[2], runs={seed: rows[2].runs[seed] for seed in (0, 1)})
    asked.columns[0].rows[:] = rows
    frame = frame_of(asked=asked)
    gap = estimate_of(frame.loc["SAM"], "difference_to_SGD")
    assert (gap.mean, gap.n) == (pytest.approx(((-3 - 4 - 4) / 3 + (-5 - 4) / 2) / 2), 2)
    gap = estimate_of(frame.loc["RST"], "difference_to_SAM")
    assert gap.mean == pytest.approx(((7 - (7 + 8 + 10) / 3) + (8 - (6 + 9) / 2)) / 2)
    assert frame["n_expected"].tolist() == [2, 2, 2] and frame["status"].tolist() == ["complete"] * 3


def test_no_row_differs_from_itself():
    assert frame_of()["difference_to_SAM.n"].to_dict() == {"SGD": 5, "SAM": 0, "RST": 5}


def test_status_and_why_runs_failed():
    some = [one for one in without("rsgd4", "rsam3") if one["choices"]["method"] != "rst"]
    diverged = "the loss is not finite\nat step 7"
    failures = {"rsam3": diverged, "rrst3": diverged, "rrst0": diverged, "rrst2": "no memory"}
    failures |= {"rsgd0": "has finished since", "other": "of another table"}
    frame = frame_of(some, failures=failures)
    assert frame["status"].tolist() == ["partial", "partial", "failed"]
    assert frame["failures"].tolist() == [
        "",
        "seed 3: the loss is not finite at step 7",
        "seeds 0 3: the loss is not finite at step 7; seed 2: no memory",
    ]
    assert frame_of(some)["status"].tolist() == ["partial", "partial", "not run"]
    assert frame_of()["status"].tolist() == ["complete"] * 3
    assert frame_of([])["status"].tolist() == ["not run"] * 3


def test_each_row_says_where_it_comes_from():
    some = results()
    some[10] |= {"commit": "abcdef0", "dirty": True, "host": None}
    some[11] |= {"versions": {"torch": "2.10.0", "cuda": "13.0"}, "finished": "2026-11-23T01:00:00+00:00"}
    frame = frame_of(some)
    assert frame.loc["SGD", ["commit", "dirty", "versions.cuda"]].tolist() == ["1234567", "False", "none"]
    mixed = frame.loc["RST"]
    assert mixed[["commit", "dirty"]].tolist() == ["1234567; abcdef0", "False; True"]
    assert mixed[["versions.cuda", "host"]].tolist() == ["13.0; none", "box; none"]
    assert mixed["last_finished"] == "2026-11-23T01:00:00+00:00"
    assert mixed["runs"] == "rrst0 rrst1 rrst2 rrst3 rrst4"


@pytest.mark.parametrize(
    ("change", "is_given"),
    [
        ({"host": "other"}, False),
        ({"threads": 2}, False),
        ({"ranks": "2"}, False),
        ({"device_name": "Epyc"}, False),
        ({"device": "cuda"}, False),
        ({"host": None}, False),
        ({"commit": "7654321"}, True),
    ],
)
def test_time_is_given_only_within_one_machine(change, is_given):
    some = [one | change if one["id"] == "rrst4" else one for one in results()]
    assert frame_of(some)["time"].notna().tolist() == [True, True, is_given]


def test_time_is_paired_by_seed_and_a_slow_hour_is_felt_little():
    slow = [one | {"seconds": {"train": 100.0}} if one["id"] == "rrst0" else one for one in results()]
    assert frame_of(slow).loc["RST", "time"] == pytest.approx(15.2 / 10.2)
    two = without("rrst2", "rrst3", "rrst4")
    assert frame_of(two).loc["RST", "time"] == pytest.approx((15 / 10 + 15.1 / 10.1) / 2)
    unpaired = [one for one in two if one["id"] not in ("rsgd0", "rsgd1")]
    assert np.isnan(frame_of(unpaired).loc["RST", "time"])


def test_what_is_refused():
    with pytest.raises(ValueError, match="needs a source"):
        Row("SAM", "", {}, published=4.22)
    with pytest.raises(ValueError, match="two rows with one label: SGD"):
        table(column(methods=["sgd", "sam", "sgd"]))
    with pytest.raises(ValueError, match="no row is labelled ASAM; rows: SGD, SAM, RST"):
        table(reference="ASAM")
    with pytest.raises(ValueError, match="unknown metrics accuracy; choose from test_error"):
        table(metrics=("test_error", "accuracy"))


def written(asked, made, folder, **options):
    files = write_table(asked, made, {}, {"SGD": Constant(0.0)}, 100, 0, folder, **options)
    assert all(path.stat().st_size for path in files)
    return {path.relative_to(folder / asked.name).as_posix() for path in files}


def test_the_files_of_a_table(tmp_path):
    made = records(measured=["sgd"])
    texts = {"README.md", "table.csv", "schedules.png"}
    figures = {"forest.png", "curves.png", "sharpness.png", "error.png"}
    several = table(column("a"), column("b"), name="several")
    assert written(several, made, tmp_path) == texts | {
        f"{name}/{figure}" for name in "ab" for figure in figures
    }
    pdfs = {figure.replace("png", "pdf") for figure in {"schedules.png", *figures}}
    printed = written(table(), made, tmp_path, for_print=True)
    assert printed == texts | figures | {"table.tex"} | pdfs


def test_a_table_without_runs_has_no_figures_but_its_schedules(tmp_path):
    texts = {"README.md", "table.csv"}
    assert written(table(), records([]), tmp_path) == {*texts, "schedules.png"}


def test_a_table_whose_rows_toss_no_coins_has_no_schedules(tmp_path):
    files = write_table(table(), records(), {}, {}, 0, 0, tmp_path)
    assert not any("schedules" in path.name for path in files)
    assert "schedules" not in (tmp_path / "small" / "README.md").read_text().lower()


def test_figures_that_a_table_no_longer_has_go(tmp_path):
    written(table(), records(measured=["sgd"]), tmp_path, for_print=True)
    left = written(table(), records(), tmp_path)
    assert "sharpness.png" not in left
    assert {path.name for path in (tmp_path / "small").iterdir()} == left


def test_the_csv_has_every_number_in_full(tmp_path):
    asked, made = table(column("a"), column("b", seeds=2)), records(measured=["rst"])
    written(asked, made, tmp_path)
    lines = pd.read_csv(tmp_path / "small" / "table.csv")
    assert lines["column"].tolist() == ["a"] * 3 + ["b"] * 3
    for one in asked.columns:
        expected = summarize(asked, one, made.joined, {}).frame.select_dtypes("number")
        ours = lines.loc[lines["column"] == one.name, expected.columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, expected, check_exact=True, check_dtype=False)


def test_evaluations_may_be_rare(tmp_path):
    runs = [Finished(result("sgd", 0, 5), epochs(None, None, 5), None)]
    alone = table(column(seeds=1, methods=["sgd"]), reference="SGD", baseline="SGD")
    assert "curves.png" in written(alone, records_of(runs), tmp_path)
