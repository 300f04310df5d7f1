import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from rst.plots import GAP, error_against_propagations, pareto, spread
from rst.tables import Row, build_table, runs_frame

# label, method, probability, mean test error in percent: eight rows share η = 1.5
METHODS = [
    ("SGD", "sgd", 0.0, 9.5),
    ("SAM", "sam", 1.0, 7.4),
    ("RST constant", "rst", 0.5, 8.1),
    ("RST piecewise", "rst", 0.5, 7.9),
    ("RST linear", "rst", 0.5, 7.7),
    ("RST trigonometric", "rst", 0.5, 7.8),
    ("G-RST constant", "grst", 0.5, 7.5),
    ("G-RST piecewise", "grst", 0.5, 7.55),
    ("G-RST linear", "grst", 0.5, 7.2),
    ("G-RST trigonometric", "grst", 0.5, 7.35),
]

SETTING = "Protocol quick, dataset digits_noisy, model resnet8, augment shift, 30 epochs, batch size 64"


def make_table(seeds=5, left_out=(), single=()):
    rng, records, rows = np.random.default_rng(0), [], []
    for i, (label, method, p, error) in enumerate(METHODS):
        rows.append(Row(label, f"python train.py method={method}", [f"{i}-{seed}" for seed in range(seeds)]))
        for seed in range(seeds):
            propagations = 600 + int(rng.binomial(600, p))
            records.append(
                {
                    "id": f"{i}-{seed}",
                    "choices": {
                        "dataset": "digits",
                        "model": "resnet8",
                        "augment": "none",
                        "method": method,
                    },
                    "seed": seed,
                    "epochs": 30,
                    "steps": 600,
                    "propagations": propagations,
                    "expected_propagations": 600 * (1 + p),
                    "test_accuracy": 1 - (error + rng.normal() / 2) / 100,
                    "finished": "2026-11-21T22:00:00+00:00",
                }
            )
            if label in left_out or (label in single and seed > 0):
                records.pop()
    return build_table("Methods", SETTING, rows, runs_frame(records))


def drawn(figure):
    """label -> (x, mean, lower end, upper end, filled?) as the axes hold them."""
    points = {}
    for container in figure.axes[0].containers:
        marker, _, bars = container.lines
        x, y = (float(v[0]) for v in marker.get_data())
        ends = bars[0].get_segments()[0][:, 1] if bars else [y, y]
        filled = marker.get_markerfacecolor() != "white"
        points[container.get_label()] = (x, y, float(ends[0]), float(ends[1]), filled)
    return points


@pytest.fixture(scope="module")
def figure_and_table(tmp_path_factory):
    table = make_table()
    return error_against_propagations(table, tmp_path_factory.mktemp("figure") / "figure.png"), table


def test_the_figure_shows_the_tables_numbers(figure_and_table):
    figure, table = figure_and_table
    points = drawn(figure)
    assert set(points) == set(table.frame["label"])
    leads = [line.get_data() for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    for _, row in table.frame.iterrows():
        x, mean, low, high, _ = points[row["label"]]
        assert mean == row["test_error_percent.mean"]
        assert low == pytest.approx(mean - row["test_error_percent.half_width"])
        assert high == pytest.approx(mean + row["test_error_percent.half_width"])
        # The grey lead goes from the row's η on the axis to its point.
        (lead,) = [(xs, ys) for xs, ys in leads if xs[-1] == x]
        assert lead[0][0] == row["eta.mean"]
        assert lead[1][0] == figure.axes[0].get_ylim()[0]
        assert lead[1][-1] == pytest.approx(low)
    assert points["SGD"][0] == pytest.approx(1)
    assert points["SAM"][0] == pytest.approx(2)


def test_nothing_overlaps(figure_and_table):
    figure, _ = figure_and_table
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list(drawn(figure))
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent(renderer)
    assert all(frame.y0 < box.y0 and box.y1 < frame.y1 for box in boxes)
    xs = sorted(x for x, *_ in drawn(figure).values())
    assert np.diff(xs).min() > GAP - 1e-9


def test_axes_and_title_say_what_is_shown(figure_and_table):
    (axes,) = figure_and_table[0].axes
    assert axes.get_xlabel() == "average propagation count η (forward-backward passes per step)"
    assert axes.get_ylabel().startswith("test error (%)")
    assert axes.get_title() == f"Methods\n{SETTING}, n = 5 seeds"
    figure = figure_and_table[0]
    title = axes.title.get_window_extent(figure.canvas.get_renderer())
    assert figure.bbox.x0 < title.x0 and title.x1 < figure.bbox.x1 and title.y1 < figure.bbox.y1
    markers = [container.lines[0].get_marker() for container in axes.containers]
    assert len(set(markers)) == len(markers)  # told apart without colour


def test_the_front_is_filled_and_no_row_of_its_cost_is_better(figure_and_table):
    figure, table = figure_and_table
    filled = {label for label, point in drawn(figure).items() if point[-1]}
    frame = table.frame.set_index("label")
    error, cost = frame["test_error_percent.mean"], frame["eta_expected.mean"]
    better = {
        label: ((error < error[label]) & (cost <= cost[label])).any()  # the rows that beat it
        for label in frame.index
    }
    assert filled == {label for label, beaten in better.items() if not beaten}


def test_rows_not_run_are_left_out_and_single_seeds_make_no_front(tmp_path):
    table = make_table(left_out=["RST linear"], single=["G-RST linear"])
    figure = error_against_propagations(table, tmp_path / "figure.png")
    points = drawn(figure)
    assert set(points) == {label for label, *_ in METHODS} - {"RST linear"}
    _, mean, low, high, filled = points["G-RST linear"]
    assert low == mean == high
    assert not filled
    assert "G-RST linear (n = 1)" in [text.get_text() for text in figure.axes[0].texts]
    assert figure.axes[0].get_title().endswith("n = 1 to 5 seeds")


def test_a_table_of_which_nothing_has_run_is_an_empty_figure(tmp_path):
    figure = error_against_propagations(make_table(seeds=0), tmp_path / "figure.png")
    assert not drawn(figure)
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_the_file_is_the_same_byte_for_byte_whatever_the_users_settings(tmp_path):
    table = make_table()
    error_against_propagations(table, tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 30}):
        error_against_propagations(table, tmp_path / "b.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000
    assert b"matplotlib" not in data  # no version, no date
    assert data == (tmp_path / "b.png").read_bytes()


def test_importing_plots_chooses_no_backend():
    script = "import sys, rst.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([1.0, 1.5, 2.0], [1.0, 1.5, 2.0]),
        ([1.5, 1.5, 1.5], [1.4, 1.5, 1.6]),
        ([1.0, 1.5, 1.52, 2.0], [1.0, 1.46, 1.56, 2.0]),
        ([1.6, 1.5], [1.5, 1.6]),  # the order given stays
        ([], []),
    ],
)
def test_spread(x, expected):
    np.testing.assert_allclose(spread(np.array(x), 0.1), expected)


def test_pareto():
    cost = np.array([1.0, 1.5, 1.5, 1.5, 2.0, 1.2])
    error = np.array([9.0, 7.0, 6.0, 6.0, 6.0, 9.5])
    assert pareto(cost, error) == [0, 2]  # ties and dearer equals do not enter
