import csv
import io
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from scipy import stats

from rst.tables import (
    Estimate,
    Row,
    build_table,
    estimate,
    estimate_of,
    paired_difference,
    read_runs,
    runs_frame,
    to_markdown,
    write_runs,
    write_table,
)

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
        Row(m.upper(), COMMAND.format(m), [record(m, seed, 0)["id"] for seed in range(count)])
        for m in methods
    ]


def table_of(some_records, some_rows=None, **options):
    return build_table("A title", "A setting", some_rows or rows(), runs_frame(some_records), **options)


def cells(table):
    """The Markdown table as one {header: cell} a row."""
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(split[0], line, strict=True)) for line in split[2:]]


def notes(table):
    return [line[2:] for line in to_markdown(table).splitlines() if line.startswith("- ")]


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
    assert cells(table)[2] == {
        "Method": "RST",
        "Test error, last epoch (%)": "9.00 ± 1.58 (n = 5)",
        "95 % interval": "[7.04, 10.96]",
        "Difference to SAM (points)": "+1.00 [+0.12, +1.88] (n = 5) *",
        "Difference to SGD (points)": "−3.00 [−3.00, −3.00] (n = 5)",
        "η measured": "1.487",
        "η expected": "1.500",
        "Time / SGD's": "1.49",
        "Best epoch (%), chosen on test data": "8.00 ± 1.58",
        "Published (%)": "unknown",
        "Command": "`python train.py protocol=quick method=rst`",
    }
    assert cells(table)[1]["Difference to SAM (points)"] == "–"  # SAM to itself
    assert to_markdown(table).startswith("# A title\n\nA setting\n\n| Method")


def test_only_a_difference_whose_interval_excludes_zero_is_marked():
    errors = ERRORS | {"rst": [6.0, 7.0, 8.5, 9.5, 9.5]}
    # To SAM: −1, 1, 0.5, 0.5, −0.5: mean 0.1, s² = 0.675, t·s/√5 = 1.020.
    row = cells(table_of(records(errors)))[2]
    assert row["Difference to SAM (points)"] == "+0.10 [−0.92, +1.12] (n = 5)"
    assert row["Difference to SGD (points)"].endswith(" *")


def test_no_minus_before_a_rounded_zero():
    errors = {"sgd": [5.0, 6.0, 7.0], "sam": [5.004, 6.0, 7.0], "rst": [5.0, 6.0, 7.0]}
    difference = cells(table_of(records(errors), rows(3)))[2]["Difference to SAM (points)"]
    assert difference == "+0.00 [−0.01, +0.00] (n = 3)"


def test_rows_not_run_and_partly_run_say_so():
    some = [r for r in records() if r["choices"]["method"] != "sam" and r["seed"] < 2]
    some = [r for r in some if r["choices"]["method"] != "rst" or r["seed"] == 1]
    table = table_of(some)
    sgd, sam, rst = cells(table)
    assert table.frame["status"].tolist() == ["partial", "not run", "partial"]
    assert {sam[name] for name in sam if name not in ("Method", "Published (%)", "Command")} == {"not run"}
    assert sgd["Test error, last epoch (%)"] == "10.50 ± 0.71 (n = 2 of 5 †)"
    assert rst["Test error, last epoch (%)"] == "8.00 (n = 1 of 5 †)"
    assert rst["95 % interval"] == "–"
    assert rst["Difference to SGD (points)"] == "−3.00 (n = 1 †)"
    assert rst["Difference to SAM (points)"] == "–"  # nothing to compare with
    assert any(note.startswith("† fewer than 3 seeds") for note in notes(table))
    assert not any("†" in note for note in notes(table_of(records())))


def test_a_table_of_which_nothing_has_run():
    table = table_of([])
    assert all(row["η expected"] == "not run" for row in cells(table))
    assert notes(table)[-1] == "No run has finished."


def test_a_published_value_needs_a_source():
    with pytest.raises(ValueError, match="needs a source"):
        Row("SAM", "", [], published=4.22)
    row = Row("SAM", "", [], published=4.22, source="authors' logs")
    assert cells(table_of([], [*rows(methods=["sgd"]), row]))[1]["Published (%)"] == "4.22 (authors' logs)"


@pytest.mark.parametrize(
    ("change", "given_"),
    [
        ({"host": "other"}, False),
        ({"threads": 2}, False),
        ({"device_name": "Epyc"}, False),
        ({"device": "cuda"}, False),
        ({"host": None}, False),
        ({"commit": "7654321"}, True),
    ],
)
def test_time_is_given_only_for_the_same_machine(change, given_):
    some = [r | change if r["id"] == "2e000004" else r for r in records()]  # one of RST's runs
    table = table_of(some)
    assert [row["Time / SGD's"] != "" for row in cells(table)] == [True, True, given_]
    assert any(note.startswith("No time for RST:") for note in notes(table)) != given_


def test_equal_devices_of_one_host_are_one_machine():
    some = [r | {"device": f"cuda:{i % 2}"} for i, r in enumerate(records())]
    assert cells(table_of(some))[2]["Time / SGD's"] == "1.49"


def test_provenance():
    lines = table_of(records()).provenance
    assert lines == [
        "Runs: 15, finished 2026-11-21 (UTC).",
        "Sample: n 5, seeds 0 1 2 3 4.",
        "Code: commit 1234567, dirty False.",
        "Software: python 3.11.7, torch 2.9.0, cuda none, rst 0.1.0.",
        "Machine: host box, device cpu, device_name Xeon (2 cores), threads 1.",
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
    same_seed = [*records(), record("rst", 3, 5.0, id="another1")]
    asked = [*rows(methods=["sgd", "sam"]), Row("RST", "", [r["id"] for r in same_seed[10:]])]
    with pytest.raises(ValueError, match="'RST' has two runs of one seed"):
        table_of(same_seed, asked)
    with pytest.raises(ValueError, match=r"\.md or \.csv"):
        write_table(table_of([]), Path("table.docx"))


# --- files


def test_pipes_do_not_break_the_markdown_table():
    asked = [Row("SGD", "a | b", []), Row("SAM | x", "python x", [])]
    table = table_of([], asked, reference="SAM | x")
    assert cells(table)[0]["Command"] == r"`a \| b`"
    assert cells(table)[1]["Method"] == r"SAM \| x"
    lines = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_csv_holds_the_numbers_in_full(tmp_path):
    table = table_of([r for r in records() if r["choices"]["method"] != "sam"])
    write_table(table, tmp_path / "table.csv")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [line["label"] for line in lines] == ["SGD", "SAM", "RST"]
    assert lines[1]["test_error_percent.mean"] == ""
    assert lines[2]["runs"] == "2e000000 2e000001 2e000002 2e000003 2e000004"
    for line, (_, values) in zip(lines, table.frame.iterrows(), strict=True):
        for name, value in values.items():
            if isinstance(value, float) and not np.isnan(value):
                assert float(line[name]) == value


def test_tables_are_the_same_byte_for_byte(tmp_path):
    """From shuffled records, from runs.csv read again, and in another process with another hash seed."""
    some = records()
    some[3] |= {"commit": "abcdef0", "host": "other"}
    write_runs(runs_frame(some), tmp_path / "runs.csv")
    random.Random(1).shuffle(some)
    written = {}
    for name, frame in {"a": runs_frame(some), "b": read_runs(tmp_path / "runs.csv")}.items():
        for suffix in (".md", ".csv"):
            write_table(build_table("T", "S", rows(), frame), tmp_path / (name + suffix))
            written.setdefault(suffix, set()).add((tmp_path / (name + suffix)).read_bytes())
    script = (
        "import sys; from pathlib import Path; from rst.tables import *\n"
        f"table = build_table('T', 'S', {rows()!r}, read_runs(Path(sys.argv[1])))\n"
        "[write_table(table, Path(path)) for path in sys.argv[2:]]"
    )
    paths = [tmp_path / "c.md", tmp_path / "c.csv"]
    command = [sys.executable, "-c", script, tmp_path / "runs.csv", *paths]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "1"}, check=True)
    for path in paths:
        written[path.suffix].add(path.read_bytes())
    assert all(len(versions) == 1 for versions in written.values())
