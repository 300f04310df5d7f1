"""Figures show the numbers that they are made of. How they look is judged by eye."""

from dataclasses import replace

import numpy as np
import pytest
from sample_runs import column, records, results, table

from rst.reporting.figures import of_column, schedules
from rst.reporting.tables import Row, summarize
from rst.schedule import Constant, Linear, Periodic, uniform


def figures_of(asked=None, some=None, measured=()):
    asked, made = asked or table(), records(some, measured)
    return of_column(summarize(asked, asked.columns[0], made.joined, {}), made.curves)


def points(axes):
    """(x, y) of the markers in a figure's axes, by colour."""
    return {
        line.get_color(): (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if line.get_marker() == "o" and len(line.get_xdata()) == 1
    }


def intervals(axes):
    return sorted(
        tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2 and line.get_lw() == 1.5
    )


def texts(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_a_forest_plot_has_each_difference_with_its_interval_by_cost():
    axes, numbers = figures_of()["forest"].axes
    assert texts(axes) == ["η = 1", "SGD", "η ≈ 1.5", "RST", "η = 2", "SAM"]
    x = sorted(x for x, _ in points(axes).values())
    assert x == pytest.approx([0, 1, 4])  # SAM, RST, SGD
    assert [x for x, _ in intervals(axes) if not np.isnan(x)] == pytest.approx([1 - 0.877989, 4 - 0.877989])
    places = dict(zip(texts(axes), axes.get_yticks(), strict=True))
    assert {y for _, y in points(axes).values()} == {places[label] for label in ("SGD", "SAM", "RST")}
    assert dict(zip(texts(numbers), numbers.get_yticks(), strict=True)) == {
        "+4.00 [+3.12, +4.88]": places["SGD"],
        "+1.00 [+0.12, +1.88]": places["RST"],
        "reference": places["SAM"],
    }


def test_rows_of_one_cost_are_ordered_by_difference():
    rows = {"sgd": [9.0, 8.0, 9.5], "sam": [7.0, 6.0, 8.0], "rst": [5.0, 5.5, 4.0]}
    some = [one | {"propagations": 1200} for one in results(rows)]
    assert texts(figures_of(table(column(seeds=3)), some)["forest"].axes[0])[1:] == ["RST", "SAM", "SGD"]


def test_few_seeds_and_missing_ones_are_marked():
    some = [one for one in results() if one["id"] not in ("rrst2", "rrst3", "rrst4")]
    axes, numbers = figures_of(some=some)["forest"].axes
    assert "RST (n = 2)" in texts(axes)
    assert [text.endswith("†") for text in texts(numbers)] == [False, True, False]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [float(line.get_xdata()[0]) for line in hollow] == pytest.approx([1])
    assert [x for x, _ in intervals(axes) if not np.isnan(x)] == pytest.approx([4 - 0.877989])


def test_a_row_without_a_seed_of_the_references_is_left_out():
    some = [one for one in results() if one["id"] not in ("rsam2", "rsam3", "rsam4", "rrst0", "rrst1")]
    figures = figures_of(some=some)
    assert texts(figures["forest"].axes[0]) == ["η = 1", "SGD", "η = 2", "SAM (n = 2)"]


def test_a_row_far_from_the_others_is_an_arrow_at_the_edge():
    some = results({"sgd": [10, 11, 12, 13, 14], "sam": [7, 6, 8, 9, 10], "rst": [70, 71, 72, 73, 74]})
    axes, numbers = figures_of(some=some)["forest"].axes
    (arrow,) = (line for line in axes.lines if line.get_marker() == ">")
    assert 4.88 < arrow.get_xdata()[0] < axes.get_xlim()[1] < 10
    assert [x for x, _ in intervals(axes) if not np.isnan(x)] == pytest.approx([4 - 0.877989])
    assert any(text.startswith("+64.00") for text in texts(numbers))
    some = results({"rst": [10, 11, 12, 13, 14], "sam": [7, 6, 8, 9, 10], "sgd": [70, 71, 72, 73, 74]})
    assert figures_of(some=some)["forest"].axes[0].get_xlim()[1] < 10  # nor does the baseline's line


def test_errors_stand_at_their_measured_cost():
    axes = figures_of()["error"].axes[0]
    assert sorted(points(axes).values()) == [
        pytest.approx((1, 12)),
        pytest.approx((1 + 292 / 600, 9)),
        pytest.approx((2, 8)),
    ]


def test_errors_of_rows_cheaper_than_the_baseline_are_within_the_axes():
    asked = table()
    asked.columns[0].rows[2] = replace(asked.columns[0].rows[2], epochs_factor=0.5)
    axes = figures_of(asked)["error"].axes[0]
    left, right = axes.get_xlim()
    assert left < min(x for x, _ in points(axes).values()) == pytest.approx(0.5 * (1 + 292 / 600))
    assert right > 2


def test_rows_of_one_cost_have_no_figure_in_which_they_hide_each_other():
    some = [one | {"propagations": 905} if one["choices"]["method"] != "sgd" else one for one in results()]
    assert "error" not in figures_of(some=some)


def test_methods_at_several_costs_have_a_line_each():
    asked = table(column(methods=["sgd", "sam", "rst"]))
    runs = {row.label: row.runs for row in asked.columns[0].rows}
    again = {f"{method}, {what}": runs[method] for method in ("SGD", "SAM", "RST") for what in ("a", "b")}
    factors = dict.fromkeys(again, 1.0) | {"SGD, b": 1.5, "SAM, b": 0.5, "RST, b": 0.5}
    alike = table(column(methods=["sgd", "sam", "rst"]))
    alike.columns[0].rows.extend(Row(label, "", of) for label, of in again.items())
    assert "cost" not in figures_of() and "cost" not in figures_of(alike)
    asked.columns[0].rows.extend(
        Row(label, "", of, epochs_factor=factors[label]) for label, of in again.items()
    )
    axes = figures_of(asked)["cost"].axes[0]
    lines = {container.get_label(): container[0] for container in axes.containers}
    eta = 1 + 292 / 600
    assert lines["RST"].get_xdata().tolist() == pytest.approx([eta / 2, eta, eta])
    assert lines["RST"].get_ydata().tolist() == pytest.approx([1] * 3)
    assert sorted(lines["SAM"].get_ydata().tolist()) == [0, 0, 0]
    runs |= {"RST, c, γ = 2": {seed: run.replace("rrst", "rgrst") for seed, run in runs["RST"].items()}}
    asked.columns[0].rows.append(Row("RST, c, γ = 2", "", runs["RST, c, γ = 2"]))
    strong = [
        one | {"id": one["id"].replace("rrst", "rgrst"), "choices": {**one["choices"], "method": "grst"}}
        for one in results()
        if one["choices"]["method"] == "rst"
    ]
    axes = figures_of(asked, [*results(), *strong])["cost"].axes[0]
    labels = [container.get_label() for container in axes.containers]
    assert labels == ["SGD", "SAM", "RST", "RST, γ = 2"]


def test_curves_are_means_over_seeds():
    figure = figures_of()["curves"]
    errors, losses = figure.axes[0], figure.axes[2]
    (sgd,) = (line for line in errors.lines if line.get_label() == "SGD")
    assert sgd.get_xdata().tolist() == [1, 3]  # the epochs that were evaluated
    assert sgd.get_ydata().tolist() == pytest.approx([50, 30])
    (loss,) = (line for line in losses.lines if line.get_label() == "SGD")
    assert loss.get_ydata().tolist() == pytest.approx([1 / 3, 1 / 4, 1 / 5])
    by_cost = figure.axes[1]
    assert by_cost.lines[0].get_xdata().tolist() == [4, 12]


def test_curves_of_runs_evaluated_once_have_no_error():
    asked, made = table(), records()
    once = made.curves.assign(test_accuracy=made.curves["test_accuracy"].where(made.curves["epoch"] == 3))
    figure = of_column(summarize(asked, asked.columns[0], made.joined, {}), once)["curves"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss (nats)", ""]


def test_sharpness_of_the_rows_that_were_measured():
    assert "sharpness" not in figures_of()
    figure = figures_of(measured=["sam", "rst"])["sharpness"]
    assert texts(figure.axes[0]) == ["η ≈ 1.5", "RST", "η = 2", "SAM"]
    values = [axes.lines[0].get_xdata()[0] for axes in figure.axes]
    assert values == pytest.approx([0.1, 40.0, 0.2, 3.0])


def test_no_figure_of_a_table_that_has_not_been_run():
    assert figures_of(some=[]) == {}


def test_schedules_show_their_probability_and_the_steps_taken():
    same = {"SAM": Constant(1.0), "rising": Linear(0.0, 1.0), "SAM again": Constant(1.0)}
    figure = schedules(same, total_steps=200, seed=3)
    sam, rising = (axes for axes in figure.axes if axes.axison)
    assert sam.get_title().startswith("SAM, SAM\N{NO-BREAK SPACE}again\n200 SAM steps, expected 200.0 ± 0.0")
    taken = sum(uniform(3, t) < t / 200 for t in range(200))
    assert f"{taken} SAM steps, expected 99.5" in rising.get_title()
    (share,) = (patch.get_data() for patch in rising.patches)
    (p,) = rising.lines
    assert share.values.sum() * 4 == pytest.approx(taken)  # 50 bins of 4 steps
    assert p.get_ydata() == pytest.approx(np.arange(200) / 200)


def test_a_schedule_that_alternates_is_drawn_as_its_mean():
    (axes,) = (axes for axes in schedules({"every 2": Periodic(2)}, 200, seed=3).axes if axes.axison)
    assert not axes.lines
    assert [patch.get_data().values.tolist() for patch in axes.patches] == [[0.5] * 50] * 2
