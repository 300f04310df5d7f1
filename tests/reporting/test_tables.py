import itertools
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from scipy import stats

from rst.reporting.statistics import (
    METRICS,
    Estimate,
    build_table,
    curves_frame,
    estimate,
    estimate_of,
    paired_difference,
    read_curves,
    read_runs,
    runs_frame,
    write_curves,
    write_runs,
)
from rst.reporting.tables import Row

COMMAND = "python train.py protocol=quick method={}"


def record(method, seed, error, **changes):
    """A finished run's record with this test error in percent. Ids like 1e000042 look like numbers."""
    p = {"sgd": 0.0, "sam": 1.0, "rst": 0.5}[method]
    sam_steps = {"sgd": 0, "sam": 600, "rst": 290 + seed}[method]
    values = {
        "schema": 1,
        "id": f"{['sgd', 'sam', 'rst'].index(method)}e{seed:06d}",
        "name": f"digits-resnet8-none-{method}-constant-s{seed}",
        "command": COMMAND.format(method) + f" seed={seed}",
        "choices": {"dataset": "digits", "model": "resnet8", "augment": "none", "method": method},
        "seed": seed,
        "epochs": 30,
        "steps": 600,
        "sam_steps": sam_steps,
        "propagations": 600 + sam_steps,
        "expected_propagations": 600 * (1 + p),
        "propagations_std": (600 * p * (1 - p)) ** 0.5,
        "test_accuracy": 1 - error / 100,
        "test_loss": 0.2,
        "best_test_accuracy": 1 - error / 100 + 0.01,
        "best_epoch": 21,
        "train_loss": 0.1,
        "train_accuracy": 0.99,
        "seconds": {"train": 10.0 * (1 + p) + seed / 10, "evaluate": 1.0, "data": 0.1, "total": 12.0},
        "images_per_second": 900.5,
        "peak_memory_bytes": 123456789,
        "versions": {"python": "3.11.7", "torch": "2.9.0", "cuda": None, "rst": "0.1.0"},
        "commit": "1234567",
        "dirty": False,
        "host": "box",
        "device": "cpu",
        "device_name": "Xeon (2 cores)",
        "threads": 1,
        "ranks": "1",
        "finished": "2026-11-21T22:00:00+00:00",
    }
    assert set(changes) <= set(values)
    return values | changes


# Test errors in percent, by hand: RST lies one point above SAM on average, exactly 3 points below SGD.
ERRORS = {
    "sgd": [10.0, 11.0, 12.0, 13.0, 14.0],
    "sam": [7.0, 6.0, 8.0, 9.0, 10.0],
    "rst": [7.0, 8.0, 9.0, 10.0, 11.0],
}


def records(errors=ERRORS):
    return [record(method, seed, e) for method, row in errors.items() for seed, e in enumerate(row)]


def rows(count=5, methods=("sgd", "sam", "rst")):
    return [
        Row(m.upper(), COMMAND.format(m), {seed: record(m, seed, 0)["id"] for seed in range(count)})
        for m in methods
    ]


def table_of(some_records, some_rows=None, **options):
    return build_table("A title", "A setting", some_rows or rows(), runs_frame(some_records), **options)


# --- runs.csv


def awkward():
    return [
        record("sgd", 10, 100 / 3, test_loss=float("inf"), train_loss=float("nan"), commit="12e4567"),
        record("sgd", 2, 0.1 + 0.2, train_accuracy=None, commit=None, dirty=None, peak_memory_bytes=None),
        record("rst", 0, 5.0, id="00012345", host='a "quoted", name', device_name="naïve\nµ | name"),
        record("rst", 1, 5.0, choices={"augment": "none", "model": "NA", "schedule": None, "p": 0.5}),
    ]


def test_runs_csv_keeps_every_value_and_type(tmp_path):
    frame = runs_frame(awkward())
    write_runs(frame, tmp_path / "runs.csv")
    again = read_runs(tmp_path / "runs.csv")
    assert_frame_equal(again, frame, check_exact=True)
    write_runs(again, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "runs.csv").read_bytes()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["again.csv", "runs.csv"]


def test_a_file_that_is_older_than_a_column(tmp_path):
    frame = runs_frame(awkward())
    frame.drop(columns=["ranks", "threads"]).to_csv(tmp_path / "runs.csv", index=False)
    again = read_runs(tmp_path / "runs.csv")
    assert again[["ranks", "threads"]].isna().all(axis=None)
    assert_frame_equal(again.drop(columns=["ranks", "threads"]), frame.drop(columns=["ranks", "threads"]))


def test_none_and_nan_are_missing_and_numbers_stay_text_where_they_are_names():
    frame = runs_frame(awkward()).set_index("id")
    assert frame.index.tolist() == ["00012345", "0e000002", "0e000010", "2e000001"]
    assert frame.loc["0e000002", ["train_accuracy", "commit", "dirty", "versions.cuda"]].isna().all()
    assert np.isnan(frame.loc["0e000010", "train_loss"])
    assert np.isinf(frame.loc["0e000010", "test_loss"])
    assert frame.loc["0e000010", "commit"] == "12e4567"
    assert frame.loc["2e000001", "choices.p"] == "0.5"
    assert frame.loc["2e000001", "choices.model"] == "NA"


# Neither surrogates nor control characters other than newlines occur in a command line.
text = st.text(st.one_of(st.characters(exclude_categories=["Cs", "Cc"]), st.just("\n")), min_size=1)


@settings(max_examples=30, deadline=None)
@given(x=st.floats(allow_nan=False), command=text, seed=st.integers(0, 2**53))
def test_any_float_and_text_survive_runs_csv(tmp_path_factory, x, command, seed):
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    frame = runs_frame([record("sgd", seed, 0, test_loss=x, command=command)])
    write_runs(frame, path)
    again = read_runs(path)
    assert again.loc[0, "test_loss"] == x
    assert again.loc[0, "command"] == command
    assert again.loc[0, "seed"] == seed


def test_rows_and_columns_have_one_order():
    frame = runs_frame(records())
    shuffled = records()
    random.Random(0).shuffle(shuffled)
    assert_frame_equal(runs_frame([dict(reversed(r.items())) for r in shuffled]), frame)
    assert frame.columns[:4].tolist() == ["id", "name", "command", "finished"]
    assert frame.columns[-4:].tolist() == [f"choices.{c}" for c in ("augment", "dataset", "method", "model")]
    many = runs_frame(record("sgd", seed, 5) for seed in (10, 9, 2))
    assert many["seed"].tolist() == [2, 9, 10]  # by number, not by text
    assert runs_frame([]).columns.tolist() == frame.columns[:-4].tolist()


def test_of_two_records_of_one_run_the_later_stays():
    early = record("sgd", 0, 5, finished="2026-11-20T00:00:00+00:00")
    for order in itertools.permutations([early, record("sgd", 0, 6)]):
        assert runs_frame(order)["test_accuracy"].tolist() == [0.94]


# --- curves.csv


def epochs(*errors):
    """Three steps an epoch, four propagations."""
    return [
        {
            "epoch": i + 1,
            "lr": 0.1,
            "propagations": 4 * (i + 1),
            "train_loss": 1 / (i + 3),
            "train_accuracy": 0.5,
            "test_loss": 0.1 + 0.2,
            "test_accuracy": 1 - error / 100,
        }
        for i, error in enumerate(errors)
    ]


def test_curves_csv_keeps_every_value_and_type(tmp_path):
    metrics = {"1e000002": epochs(90, 100 / 3), "00012345": epochs(*range(12))}
    metrics["1e000002"][0] |= {"test_loss": float("inf"), "train_accuracy": None}
    frame = curves_frame(metrics)
    assert frame.columns.tolist() == [
        "id",
        "epoch",
        "propagations",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
    ]
    write_curves(frame, tmp_path / "curves.csv")
    assert_frame_equal(read_curves(tmp_path / "curves.csv"), frame, check_exact=True)
    assert (tmp_path / "curves.csv").read_text().splitlines()[1:3] == [
        "00012345,1,4,0.3333333333333333,0.5,0.30000000000000004,1.0",
        "00012345,2,8,0.25,0.5,0.30000000000000004,0.99",
    ]


def test_curves_are_sorted_by_id_and_epoch():
    backwards = {"b": epochs(*range(11))[::-1], "a": epochs(5)}
    frame = curves_frame(backwards)
    assert frame["id"].tolist() == ["a"] + ["b"] * 11
    assert frame["epoch"].tolist() == [1, *range(1, 12)]  # by number, not by text
    assert_frame_equal(curves_frame(dict(reversed(backwards.items()))), frame)
    assert curves_frame({}).dtypes.equals(frame.dtypes)


# --- statistics


def test_estimate_by_hand():
    # s² = (4 + 1 + 0 + 1 + 4)/4 = 2.5; t(0.975, 4) = 2.776445; 2.776445·√(2.5/5) = 1.963243
    value = estimate([1, 2, 3, 4, 5])
    assert value.n == 5
    assert value.mean == 3
    assert value.std == pytest.approx(1.5811388)
    assert value.half_width == pytest.approx(1.963243, abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=12).filter(lambda x: np.std(x) > 1e-6))
def test_estimate_is_scipys(values):
    value = estimate(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert value.mean == pytest.approx(np.mean(values))
    assert value.std == pytest.approx(stats.tstd(values))
    assert value.mean - value.half_width == pytest.approx(expected.low, abs=1e-9)
    assert value.mean + value.half_width == pytest.approx(expected.high, abs=1e-9)


def test_one_value_has_no_spread_and_none_no_mean():
    assert estimate([4.0]) == pytest.approx(Estimate(4.0, np.nan, np.nan, 1), nan_ok=True)
    assert estimate([]) == pytest.approx(Estimate(np.nan, np.nan, np.nan, 0), nan_ok=True)
    assert np.isnan(estimate([1.0, np.nan, 2.0]).mean)  # a nan is not passed over


def test_difference_is_paired_over_common_seeds_only():
    a = pd.Series([7.0, 9.0, 8.0, 50.0], index=[3, 0, 1, 8])
    b = pd.Series([5.0, 6.0, 9.0, -50.0], index=[0, 1, 3, 9])
    # Seeds 0, 1, 3: 9−5, 8−6, 7−9 = 4, 2, −2.
    value = paired_difference(a, b)
    expected = stats.ttest_rel([9, 8, 7], [5, 6, 9]).confidence_interval(0.95)
    assert value.n == 3
    assert value.mean == pytest.approx(4 / 3)
    assert value.mean - value.half_width == pytest.approx(expected.low)
    assert value.mean + value.half_width == pytest.approx(expected.high)
    assert paired_difference(a, pd.Series([1.0], index=[77])).n == 0


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=8).filter(lambda x: np.std(x) > 1e-6))
def test_zero_is_excluded_where_the_t_test_has_p_below_5_percent(values):
    p = stats.ttest_1samp(values, 0).pvalue
    if abs(p - 0.05) > 1e-9:
        assert estimate(values).excludes_zero == (p < 0.05)


def test_no_difference_is_claimed_from_two_seeds_or_equal_values():
    assert estimate([3.0, 3.01, 3.02]).excludes_zero
    assert not estimate([3.0, 3.0001]).excludes_zero
    assert not estimate([3.0] * 5).excludes_zero
    assert not estimate([0.1 + 0.2, 0.3, 0.3]).excludes_zero  # equal up to rounding


# --- tables


def test_table_by_hand():
    table = table_of(records())
    rst = table.frame.set_index("label").loc["RST"]
    # Against SAM: 0, 2, 1, 1, 1: mean 1, s = √(2/4), t·s/√5 = 2.776445·0.7071068/2.2360680 = 0.877989
    sam = estimate_of(rst, "difference_to_SAM")
    assert (sam.mean, sam.n) == (pytest.approx(1), 5)
    assert sam.half_width == pytest.approx(0.877989, abs=1e-6)
    assert estimate_of(rst, "difference_to_SGD").mean == pytest.approx(-3)
    assert rst["test_error_percent.mean"] == pytest.approx(9)
    assert rst["best_epoch_error_percent.mean"] == pytest.approx(8)
    # SAM steps 290 … 294 of 600.
    assert rst["eta.mean"] == pytest.approx(1 + 292 / 600)
    assert rst["eta_expected.mean"] == 1.5
    # Seconds 15.0 … 15.4 against 10.0 … 10.4.
    assert rst["time_relative_to_SGD"] == pytest.approx(15.2 / 10.2)


def test_each_row_says_where_it_comes_from():
    some = records()
    some[10] |= {"commit": "abcdef0", "dirty": True, "host": None}
    some[11] |= {"versions": {"torch": "2.10.0", "cuda": "13.0"}, "finished": "2026-11-23T01:00:00+00:00"}
    some[12] |= {"device": "cuda", "device_name": "H100 / 80 GB"}
    table = table_of(some)
    sgd, _, rst = table.frame.to_dict("records")
    expected = {
        "commit": "1234567",
        "dirty": "False",
        "versions.torch": "2.9.0",
        "versions.cuda": "none",
        "device": "cpu",
        "device_name": "Xeon (2 cores)",
        "host": "box",
        "first_finished": "2026-11-21T22:00:00+00:00",
        "last_finished": "2026-11-21T22:00:00+00:00",
        "runs": "0e000000 0e000001 0e000002 0e000003 0e000004",
        "seeds": "0 1 2 3 4",
        "command": "python train.py protocol=quick method=sgd",
    }
    assert {name: sgd[name] for name in expected} == expected
    mixed = {
        "commit": "1234567; abcdef0",
        "dirty": "False; True",
        "versions.torch": "2.10.0; 2.9.0",
        "versions.cuda": "13.0; none",
        "device": "cpu; cuda",
        "device_name": "H100 / 80 GB; Xeon (2 cores)",
        "host": "box; none",
        "last_finished": "2026-11-23T01:00:00+00:00",
    }
    assert {name: rst[name] for name in mixed} == mixed


def test_status_and_failures():
    some = [r for r in records() if r["id"] not in ("0e000004", "1e000003") and r["id"] < "2"]
    diverged = "the loss is not finite\nat step 7"
    failures = {"1e000003": diverged, "2e000003": diverged, "2e000000": diverged, "2e000002": "no memory"}
    # Seed 0 fails first, however the runs are listed.
    failures |= {"0e000000": "has finished since", "other": "of another table"}
    asked = [Row(row.label, row.command, dict(reversed(row.runs.items()))) for row in rows()]
    frame = table_of(some, asked, failures=failures).frame
    assert frame["status"].tolist() == ["partial", "partial", "failed"]
    assert frame["first_failure"].tolist() == ["", *["the loss is not finite at step 7"] * 2]
    assert frame["failures"].tolist() == [
        "",
        "seed 3: the loss is not finite at step 7",
        "seeds 0 3: the loss is not finite at step 7; seed 2: no memory",
    ]
    assert table_of(some).frame["status"].tolist() == ["partial", "partial", "not run"]
    assert table_of(records(), failures=failures).frame["status"].tolist() == ["complete"] * 3
    assert table_of(records(), failures=failures).frame["failures"].tolist() == [""] * 3


def test_a_table_is_called_in_short_as_it_says_or_as_its_setting():
    assert table_of(records()).column == "A setting"
    assert table_of(records(), column="digits").column == "digits"


def test_a_published_value_needs_a_source():
    with pytest.raises(ValueError, match="needs a source"):
        Row("SAM", "", {}, published=4.22)


@pytest.mark.parametrize(
    ("change", "given_"),
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
def test_time_is_given_only_for_the_same_machine(change, given_):
    some = [r | change if r["id"] == "2e000004" else r for r in records()]  # one of RST's runs
    times = table_of(some).frame["time_relative_to_SGD"]
    assert times.notna().tolist() == [True, True, given_]


def test_time_is_paired_by_seed_and_a_slow_hour_is_felt_little():
    slow = [r | {"seconds": {"train": 100.0}} if r["id"] == "2e000000" else r for r in records()]
    assert table_of(slow).frame["time_relative_to_SGD"].iloc[2] == pytest.approx(15.2 / 10.2)
    first = [r for r in records() if r["id"] not in ("2e000002", "2e000003", "2e000004")]
    assert table_of(first).frame["time_relative_to_SGD"].iloc[2] == pytest.approx((15 / 10 + 15.1 / 10.1) / 2)
    none_shared = [r for r in first if r["id"] not in ("0e000000", "0e000001")]  # SGD: 2 to 4, RST: 0, 1
    assert table_of(none_shared).frame["time_relative_to_SGD"].isna().tolist() == [False, False, True]


def test_equal_devices_of_one_host_are_one_machine():
    some = [r | {"device": f"cuda:{i % 2}"} for i, r in enumerate(records())]
    assert table_of(some).frame["time_relative_to_SGD"].iloc[2] == pytest.approx(15.2 / 10.2)


def test_provenance():
    lines = table_of(records()).provenance
    assert lines == [
        "Runs: 15, finished 2026-11-21 (UTC).",
        "Sample: n 5, seeds 0 1 2 3 4.",
        "Code: commit 1234567, dirty False.",
        "Software: python 3.11.7, torch 2.9.0, cuda none, rst 0.1.0.",
        "Machine: host box, device cpu, device_name Xeon (2 cores), ranks 1, threads 1.",
    ]


def test_mixed_provenance_names_the_rows():
    some = records()[:-1]
    some[0] |= {"dirty": True, "finished": "2026-11-19T01:00:00+00:00"}
    some[7] |= {"host": "other", "commit": None, "dirty": None}
    lines = table_of(some).provenance
    assert lines[:3] == [
        "Runs: 14, finished 2026-11-19 to 2026-11-21 (UTC).",
        "Sample, MIXED: n 4, seeds 0 1 2 3 (RST); n 5, seeds 0 1 2 3 4 (SGD, SAM).",
        "Code, MIXED: commit 1234567, dirty False (SGD, SAM, RST); commit 1234567, dirty True (SGD); "
        "commit none, dirty none (SAM).",
    ]
    assert lines[4].startswith("Machine, MIXED: host box")


def test_what_is_refused():
    twice = rows() + rows(methods=["sam"])
    with pytest.raises(ValueError, match="two rows with one label: SAM"):
        table_of(records(), twice)
    with pytest.raises(ValueError, match="no row is labelled ASAM; rows: SGD, SAM, RST"):
        table_of(records(), reference="ASAM")
    with pytest.raises(
        ValueError, match=r"unknown metrics: accuracy; choose from test_error, interval, .*shed"
    ):
        table_of(records(), metrics=["test_error", "accuracy"])
    assert table_of(records(), metrics=METRICS).metrics == METRICS
    asked = [*rows(methods=["sgd", "sam"]), Row("RST", "", {0: "2e000000", 7: "2e000003"})]
    with pytest.raises(ValueError, match="'RST': the seeds of its runs are not those asked for"):
        table_of(records(), asked)
    one_seed = [*records(), record("rst", 0, 5.0, id="another1")]
    asked = [*rows(methods=["sgd", "sam"]), Row("RST", "", {0: "2e000000", 1: "another1"})]
    with pytest.raises(ValueError, match="'RST': the seeds of its runs are not those asked for"):
        table_of(one_seed, asked)
