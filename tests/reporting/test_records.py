"""The CSV files of a results folder keep every value, and the runs that are in them."""

import itertools
import shutil

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from sample_runs import epochs, result, sharpness

from rst.reporting.records import Finished, collect, recorded_in

# Neither surrogates nor control characters other than newlines occur in a command line.
text = st.text(st.one_of(st.characters(exclude_categories=["Cs", "Cc"]), st.just("\n")), min_size=1)


def finished(one, lines=(), measured=None):
    return Finished(one, list(lines), measured)


@settings(max_examples=30, deadline=None)
@given(x=st.floats(allow_nan=False), command=text, seed=st.integers(0, 2**53))
def test_any_float_and_text_survive(tmp_path_factory, x, command, seed):
    folder, command = tmp_path_factory.mktemp("results"), f"python train.py {command}"
    collect(folder, [finished(result("sgd", seed, 0, test_loss=x, command=command))])
    (line,) = recorded_in(folder).runs.to_dict("records")
    assert (line["test_loss"], line["command"], line["seed"]) == (x, command, seed)


def test_missing_values_stay_missing_and_names_stay_text(tmp_path):
    missing = {"peak_memory_bytes": None, "commit": None, "dirty": None}
    some = [
        result("sgd", 0, 5, **missing, host="", ranks="4"),
        result("sgd", 1, 5, commit="12345e6", host="007", versions={"torch": "2.10", "cuda": "13.0"}),
    ]
    runs = collect(tmp_path, map(finished, some)).runs.set_index("id")
    assert runs.loc["rsgd0", ["commit", "dirty", "host", "peak_memory_bytes"]].isna().all()
    named = runs.loc["rsgd1", ["commit", "host", "ranks", "versions.torch", "versions.cuda"]]
    assert named.tolist() == ["12345e6", "007", "1", "2.10", "13.0"]
    assert runs.loc["rsgd1", "peak_memory_bytes"] == 123456789
    assert "123456789.0" not in (tmp_path / "runs.csv").read_text()


def test_curves_have_a_line_an_epoch(tmp_path):
    curves = collect(tmp_path, [finished(result("sgd", 0, 30), epochs(50, None, 30.1))]).curves
    assert curves["epoch"].tolist() == [1, 2, 3]
    assert curves["propagations"].tolist() == [4, 8, 12]
    assert curves["test_accuracy"].isna().tolist() == [False, True, False]
    assert curves.loc[2, "test_accuracy"] == 1 - 30.1 / 100


def test_a_run_that_is_repeated_replaces_its_record(tmp_path):
    first, again = (result("sgd", 0, error) for error in (5, 6))
    other = finished(result("sam", 0, 4), epochs(4))
    collect(tmp_path, [finished(first, epochs(9, 5)), other])
    records = collect(tmp_path, [finished(again, epochs(6))])
    assert records.runs.set_index("id")["test_accuracy"].to_dict() == {"rsam0": 0.96, "rsgd0": 0.94}
    assert records.curves["id"].tolist() == ["rsam0", "rsgd0"]


def test_sharpness_belongs_to_the_run_that_was_measured(tmp_path):
    some = [result("sgd", seed, 5) for seed in (0, 1)]
    measured = [finished(one, (), sharpness(one, lambda_max=40.0 + one["seed"])) for one in some]
    assert collect(tmp_path, measured).joined["lambda_max"].tolist() == [40.0, 41.0]
    again = result("sgd", 1, 5, finished="2026-11-23T00:00:00+00:00")
    records = collect(tmp_path, [finished(again)])
    assert records.joined["lambda_max"].isna().tolist() == [False, True]
    assert records.sharpness["id"].tolist() == ["rsgd0"]


def test_the_order_of_runs_does_not_matter(tmp_path):
    some = [result(method, seed, 5) for method in ("sgd", "sam") for seed in (10, 9)]
    written = set()
    for i, order in enumerate(itertools.permutations(some)):
        (tmp_path / str(i)).mkdir()
        for one in order:
            collect(tmp_path / str(i), [finished(one)])
        written.add((tmp_path / str(i) / "runs.csv").read_text())
    assert len(written) == 1


@pytest.mark.parametrize("protocol", ["cpu", "quick"])
def test_collecting_nothing_leaves_the_files_as_they_are(protocol, tmp_path):
    before = {path.name: path.read_bytes() for path in (ROOT / "results" / protocol).glob("*.csv")}
    shutil.copytree(ROOT / "results" / protocol, tmp_path / protocol)
    records = collect(tmp_path / protocol, [])
    assert {path.name: path.read_bytes() for path in (tmp_path / protocol).glob("*.csv")} == before
    assert_frame_equal(records.runs, recorded_in(ROOT / "results" / protocol).runs)


def test_an_empty_folder_has_no_records_and_gets_no_files(tmp_path):
    records = collect(tmp_path, [])
    assert records.joined.empty
    assert not list(tmp_path.glob("*.csv"))
