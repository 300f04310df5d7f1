"""Rows by the strength of their regularization, against numbers by hand."""

from dataclasses import replace

import pytest
from conftest import ROOT
from hydra import initialize_config_dir
from sample_runs import column, records, results, table

from rst.experiments.cost import steps_per_epoch
from rst.experiments.driver import _strength
from rst.experiments.sweeps import cells_of
from rst.reporting.strength import Strength, comparable, figure, points

KNOWN = {"rsam0": Strength(0.2, "even"), "rrst0": Strength(0.1, "late"), "rsgd0": Strength(0.0, "even")}


def test_points_are_differences_to_the_baseline_once_each():
    several = [table(), table(name="again")]
    frame = points(several, KNOWN, records().joined).set_index("label")
    assert list(frame.index) == ["SAM", "RST"]  # the baseline is what they are compared with
    assert frame["strength"].to_dict() == {"SAM": 1.0, "RST": 0.5}
    # SAM − SGD: −3, −5, −4, −4, −4.
    assert frame.loc["SAM", "test_error.mean"] == pytest.approx(-4) and frame.loc["SAM", "test_error.n"] == 5
    assert frame.loc["RST", "test_loss.mean"] == pytest.approx(0.5)
    drawn = figure(frame.reset_index(), "SGD", "SAM")
    assert sum(axes.axison for axes in drawn.axes) == 3  # the calibrated loss was not measured
    markers = {tuple(line.get_xdata()): line.get_marker() for line in drawn.axes[0].lines[1:]}
    assert markers == {(0.5,): "^", (1.0,): "o"}


def test_rows_without_a_strength_or_runs_are_left_out():
    only_sam = {key: value for key, value in KNOWN.items() if key != "rrst0"}
    assert points([table()], only_sam, records().joined)["label"].tolist() == ["SAM"]
    assert points([table(column())], KNOWN, records([]).joined).empty
    without_sgd = [one for one in results() if one["choices"]["method"] != "sgd"]
    assert points([table()], KNOWN, records(without_sgd).joined).empty


def test_tables_are_comparable_whose_reference_has_a_strength():
    known = {key: value for key, value in KNOWN.items() if key != "rrst0"}
    same, none, zero = table(baseline="SAM"), table(reference="RST"), table(reference="SGD", baseline="SAM")
    elsewhere = table(replace(column(), setting="another"))
    several = table(column("a"), column("b"))  # whose settings are not the protocol's own
    assert comparable([several, same, none, zero, table(), elsewhere], known) == [table()]
    assert comparable([none], known) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=sgd"], (0.0, "even")),
        (["method=sam", "rho=0.3"], (0.3, "even")),
        (["method=gnp", "method.gamma=0.5"], (0.05, "even")),
        (["method=grst", "schedule=piecewise", "schedule.p=0.25"], (0.1, "late")),
        (["method=rst", "schedule=linear", "schedule.rising=false"], (0.05, "early")),
        (["method=grst", "method.mix=normalized"], None),
        (["method=asam"], None),
        (["method=msam"], None),
    ],
)
def test_the_strength_of_a_run(overrides, expected):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        (cell,) = cells_of(["protocol=quick", *overrides, "seed=0"])
    found = _strength(cell.run.config, steps_per_epoch(cell.run.config))
    if expected is None:
        assert found is None
    else:
        assert found == (pytest.approx(expected[0], rel=2e-3), expected[1])  # 600 steps
