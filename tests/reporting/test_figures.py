import itertools
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color

from rst.reporting.figures import (
    BINS,
    FEW_STEPS,
    GAP,
    ROWS_A_PANEL,
    error_against_propagations,
    pareto,
    schedule_figure,
    sharpness_figure,
    spread,
    training_curves,
)
from rst.reporting.sharpness import ALPHAS
from rst.reporting.statistics import (
    SHARPNESS,
    build_table,
    curves_frame,
    runs_frame,
    sharpness_frame,
    write_curves,
    write_runs,
)
from rst.reporting.tables import Row
from rst.schedule import Constant, Linear, Periodic, expected_propagations, uniform

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

# As many as the paper's comparison of schedules has
CROWD = METHODS[:2] + [
    (f"RST {family}, p = {p}", "rst", p, 9.5 - 2 * p + i / 10)
    for p in (0.1, 0.25, 0.5, 0.75, 0.9)
    for i, family in enumerate(["constant", "piecewise", "linear", "trigonometric", "periodic"])
]
SETTING = "Protocol quick, dataset digits_noisy, model resnet8, augment shift, 30 epochs, batch size 64"


def make_rows(methods=METHODS, seeds=5):
    return [
        Row(label, f"python train.py method={method}", {seed: f"{i}-{seed}" for seed in range(seeds)})
        for i, (label, method, *_) in enumerate(methods)
    ]


def make_runs(methods=METHODS, seeds=5, left_out=(), single=()):
    rng, records = np.random.default_rng(0), []
    for i, (label, method, p, error) in enumerate(methods):
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
    return runs_frame(records)


def make_table(methods=METHODS, seeds=5, **options):
    return build_table("Methods", SETTING, make_rows(methods, seeds), make_runs(methods, seeds, **options))


def make_curves(methods=METHODS, seeds=5, epochs=4):
    """Test error 20 + row + 2·seed percent at epoch 1, half of it at 2, …; (10 + row + seed) propagations an
    epoch; a training loss of 1/epoch in each run."""
    return curves_frame(
        {
            f"{i}-{seed}": [
                {
                    "epoch": epoch,
                    "propagations": (10 + i + seed) * epoch,
                    "train_loss": 1 / epoch,
                    "test_accuracy": 1 - (20 + i + 2 * seed) / epoch / 100,
                }
                for epoch in range(1, epochs + 1)
            ]
            for i in range(len(methods))
            for seed in range(seeds)
        }
    )


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
    return error_against_propagations(table, tmp_path_factory.mktemp("figure") / "figure"), table


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


@pytest.mark.parametrize("methods", [METHODS, CROWD, CROWD + [("Longer " + m[0], *m[1:]) for m in CROWD[2:]]])
def test_nothing_overlaps(methods, tmp_path):
    figure = error_against_propagations(make_table(methods), tmp_path / "figure")
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list(drawn(figure))
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent(renderer)
    assert all(frame.y0 < box.y0 and box.y1 < frame.y1 for box in boxes)
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)


def test_points_keep_their_distance(figure_and_table):
    xs = sorted(x for x, *_ in drawn(figure_and_table[0]).values())
    assert np.diff(xs).min() > GAP - 1e-9


def test_a_crowd_stays_near_its_cost(tmp_path):
    points = drawn(error_against_propagations(make_table(CROWD), tmp_path / "figure"))
    assert points["SGD"][0] == pytest.approx(1)
    assert points["SAM"][0] == pytest.approx(2)


def test_axes_and_title_say_what_is_shown(figure_and_table):
    (axes,) = figure_and_table[0].axes
    assert axes.get_xlabel() == "average propagation count η (forward-backward passes per step)"
    assert axes.get_ylabel().startswith("test error (%)")
    assert axes.get_title() == f"Methods\n{SETTING}, n = 5 seeds"
    figure = figure_and_table[0]
    title = axes.title.get_window_extent(FigureCanvasAgg(figure).get_renderer())
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
    figure = error_against_propagations(table, tmp_path / "figure")
    points = drawn(figure)
    assert set(points) == {label for label, *_ in METHODS} - {"RST linear"}
    _, mean, low, high, filled = points["G-RST linear"]
    assert low == mean == high
    assert not filled
    assert "G-RST linear (n = 1)" in [text.get_text() for text in figure.axes[0].texts]
    assert figure.axes[0].get_title().endswith("n = 1 to 5 seeds")


def test_a_table_of_which_nothing_has_run_is_an_empty_figure(tmp_path):
    table = make_table(seeds=0)
    assert not drawn(error_against_propagations(table, tmp_path / "figure"))
    figure = training_curves(table, curves_frame({}), tmp_path / "curves")
    assert not any(axes.lines for panel in figure.subfigs for axes in panel.axes)
    for name in ("figure.png", "figure.pdf", "curves.png", "curves.pdf"):
        assert (tmp_path / name).stat().st_size > 0


# --- files

DRAW = """
import sys
from pathlib import Path
from rst.reporting.figures import *
from rst.schedule import *
from rst.reporting.statistics import *
from test_figures import SETTING, make_rows
folder, out = map(Path, sys.argv[1:])
table = build_table("Methods", SETTING, make_rows(), read_runs(folder / "runs.csv"))
error_against_propagations(table, out / "table")
training_curves(table, read_curves(folder / "curves.csv"), out / "table_curves")
for name, steps in (("few", 40), ("many", 400)):
    schedule_figure({"A": Linear(0.0, 1.0), "B": Constant(0.5)}, steps, 0, out / f"table_{name}")
"""


def test_figures_are_the_same_byte_for_byte(tmp_path):
    """Made here under other settings of matplotlib, and in two processes from the CSV files."""
    runs, curves = make_runs(), make_curves()
    write_runs(runs, tmp_path / "runs.csv")
    write_curves(curves, tmp_path / "curves.csv")
    for name in ("here", "1", "2"):
        (tmp_path / name).mkdir()
    for seed in ("1", "2"):
        changes = {"PYTHONHASHSEED": seed, "PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", DRAW, tmp_path, tmp_path / seed]
        subprocess.run(command, env=os.environ | changes, check=True)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 30, "pdf.compression": 0}):
        error_against_propagations(make_table(), tmp_path / "here" / "table")
        training_curves(make_table(), curves, tmp_path / "here" / "table_curves")
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    stems = ("table", "table_curves", "table_few", "table_many")
    assert names == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf"))
    for name in names:
        data = (tmp_path / "1" / name).read_bytes()
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"%PDF")
        assert len(data) > 5_000
        assert not any(word in data.lower() for word in (b"matplotlib", b"creationdate", b"producer"))
        assert data == (tmp_path / "2" / name).read_bytes()
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "1" / path.name).read_bytes()


def test_importing_plots_chooses_no_backend():
    script = "import sys, rst.reporting.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
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


# --- schedules


def panels(figure):
    return {axes.get_title().split("\n")[0].replace("\N{NO-BREAK SPACE}", " "): axes for axes in figure.axes}


def test_few_steps_are_shown_one_by_one(tmp_path):
    schedules = {"RST": Linear(0.0, 1.0), "G-RST": Linear(0.0, 1.0), "Fixed": Periodic(4)}
    figure = schedule_figure(schedules, 10, 3, tmp_path / "figure")
    shown = panels(figure)
    assert set(shown) == {"RST, G-RST", "Fixed"}  # equal schedules share a panel
    axes = shown["RST, G-RST"]
    assert axes.patches[0].get_data().values == pytest.approx(np.arange(10) / 10)
    taken = [t for t in range(10) if uniform(3, t) < t / 10]
    middles = [(t + 0.5) / 10 for t in taken]
    assert [event[0, 0] for event in axes.collections[0].get_segments()] == pytest.approx(middles)
    # Σ t/10 = 4.5, Σ t/10·(1 − t/10) = 4.5 − 2.85.
    assert axes.get_title().split("\n")[1:] == [
        "mean p = 0.450",
        f"{len(taken)} SAM steps, expected 4.5 ± {1.65**0.5:.1f}",
    ]
    assert shown["Fixed"].get_title().endswith("mean p = 0.300\n3 SAM steps, expected 3.0 ± 0.0")
    assert figure.get_supxlabel() == "progress t/T (T = 10 steps; seed 3)"


def test_many_steps_are_shown_in_bins(tmp_path):
    steps = FEW_STEPS + 123  # no multiple of the bins
    figure = schedule_figure({"A": Constant(0.5), "B": Linear(0.0, 1.0)}, steps, 0, tmp_path / "figure")
    for label, schedule in (("A", Constant(0.5)), ("B", Linear(0.0, 1.0))):
        share, mean = (patch.get_data() for patch in panels(figure)[label].patches)
        edges = np.rint(share.edges * steps).astype(int)
        assert (edges[0], edges[-1], len(edges)) == (0, steps, BINS + 1)
        p = np.array([schedule(t, steps) for t in range(steps)])
        taken = np.array([uniform(0, t) for t in range(steps)]) < p
        assert share.values * np.diff(edges) == pytest.approx([x.sum() for x in np.split(taken, edges[1:-1])])
        assert mean.values == pytest.approx([x.mean() for x in np.split(p, edges[1:-1])])
        expected = expected_propagations(schedule, steps) - steps
        assert f"{taken.sum()} SAM steps, expected {expected:.1f} ±" in panels(figure)[label].get_title()
    assert "in 50 bins" in figure.get_supxlabel()


def test_the_panels_texts_do_not_overlap(tmp_path):
    schedules = {f"RST linear, p = {p:.2f}": Linear.with_mean(p) for p in np.linspace(0.02, 0.98, 23)}
    schedules["A row of another label with this schedule"] = Linear.with_mean(0.02)
    figure = schedule_figure(schedules, 320, 0, tmp_path / "figure")
    title = figure.axes[0].get_title().replace("\N{NO-BREAK SPACE}", " ")
    assert title.split("\n")[:2] == ["RST linear, p = 0.02,", "A row of another label with this schedule"]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.title.get_window_extent(renderer) for axes in figure.axes if axes.get_title()]
    boxes += [axes.get_window_extent(renderer) for axes in figure.axes if axes.get_title()]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    assert len(boxes) == 2 * 23 + 1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes)


# --- training curves


def test_curves_are_means_over_seeds_with_a_band_of_their_spread(tmp_path):
    table = make_table(seeds=3)
    (panel,) = training_curves(table, make_curves(seeds=3), tmp_path / "figure").subfigs
    by_epoch, by_cost, loss, loss_by_cost = panel.axes
    for i, label in enumerate(table.frame["label"]):
        (line,) = [line for line in by_epoch.lines if line.get_label() == label]
        (against_cost,) = [line for line in by_cost.lines if line.get_label() == label]
        # Seeds 0, 1, 2: errors of 20, 22, 24 percent + row, whose std is 2.
        np.testing.assert_allclose(line.get_xdata(), [1, 2, 3, 4])
        np.testing.assert_allclose(line.get_ydata(), (22 + i) / np.arange(1, 5))
        np.testing.assert_allclose(against_cost.get_ydata(), line.get_ydata())
        np.testing.assert_allclose(against_cost.get_xdata(), (11 + i) * np.arange(1, 5))
        ends = by_epoch.collections[by_epoch.lines.index(line)].get_paths()[0].vertices
        np.testing.assert_allclose([ends[:, 1].min(), ends[:, 1].max()], [(20 + i) / 4, 24 + i])
        np.testing.assert_allclose(loss.lines[i].get_ydata(), 1 / np.arange(1, 5))
        np.testing.assert_allclose(loss_by_cost.lines[i].get_xdata(), against_cost.get_xdata())
    assert by_epoch.get_ylabel() == "test error (%), mean ± std"
    assert loss_by_cost.get_xlabel() == "propagations (forward-backward passes)"


def test_curves_join_the_epochs_that_were_evaluated(tmp_path):
    curves = make_curves(seeds=3)
    curves.loc[curves["epoch"] % 2 == 1, "test_accuracy"] = np.nan
    (panel,) = training_curves(make_table(seeds=3), curves, tmp_path / "figure").subfigs
    error, _, loss, _ = panel.axes
    np.testing.assert_allclose(error.lines[0].get_xdata(), [2, 4])
    np.testing.assert_allclose(error.lines[0].get_ydata(), [22 / 2, 22 / 4])
    np.testing.assert_allclose(loss.lines[0].get_xdata(), [1, 2, 3, 4])


def looks(axes):
    return {
        line.get_label(): (line.get_color(), str(line._dash_pattern), line.get_marker())
        for line in axes.lines
    }


def test_no_two_curves_look_alike_and_none_changes_its_look(tmp_path):
    table = make_table(seeds=3)
    (panel,) = training_curves(table, make_curves(seeds=3), tmp_path / "figure").subfigs
    look = looks(panel.axes[0])
    assert len({(colour, dashes) for colour, dashes, _ in look.values()}) == len(METHODS)
    assert len({marker for *_, marker in look.values()}) == len(METHODS)
    assert same_color(look["SGD"][0], "black")
    fewer = make_table(seeds=3, left_out=["SAM", "RST constant", "RST linear"])
    (panel,) = training_curves(fewer, make_curves(seeds=3), tmp_path / "figure").subfigs
    kept = looks(panel.axes[0])
    assert len(kept) == len(METHODS) - 3
    assert kept.items() <= look.items()


def test_many_rows_are_parted_each_part_with_the_rows_to_compare_with(tmp_path):
    figure = training_curves(make_table(CROWD, 3), make_curves(CROWD, 3), tmp_path / "figure")
    parts = [[text.get_text() for text in part.legends[0].get_texts()] for part in figure.subfigs]
    assert len(parts) == 3
    assert all(len(part) <= ROWS_A_PANEL and part[:2] == ["SGD", "SAM"] for part in parts)
    assert [label for part in parts for label in part[2:]] == [label for label, *_ in CROWD[2:]]
    for part in figure.subfigs:
        look = looks(part.axes[0])
        assert len({(colour, dashes) for colour, dashes, _ in look.values()}) == len(look)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.get_window_extent(renderer) for part in figure.subfigs for axes in part.axes]
    boxes += [part.legends[0].get_window_extent(renderer) for part in figure.subfigs]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(("rows", "parts"), [(ROWS_A_PANEL, 1), (ROWS_A_PANEL + 1, 2)])
def test_a_panel_holds_twelve_rows(rows, parts, tmp_path):
    methods = CROWD[:rows]
    figure = training_curves(make_table(methods, 2), make_curves(methods, 2, epochs=2), tmp_path / "figure")
    assert len(figure.subfigs) == parts
    assert sum(len(part.axes[0].lines) for part in figure.subfigs) == rows + 2 * (parts - 1)


def test_curves_of_one_seed_have_no_band_and_rows_without_curves_are_left_out(tmp_path):
    table = make_table(seeds=2, single=["SAM"])
    curves = make_curves(seeds=2, epochs=1)
    curves = curves[~curves["id"].str.startswith("2-")]
    (panel,) = training_curves(table, curves, tmp_path / "figure").subfigs
    shown = [text.get_text() for text in panel.legends[0].get_texts()]
    assert shown[:3] == ["SGD", "SAM (n = 1)", "RST piecewise"]


def draw_sharpness(methods, measured, stem):
    """Of each row so many runs measured; λ_max is ten times the row's place, from 1, and the seed."""
    sharp = sharpness_frame(
        {"id": f"{i}-{seed}", "lambda_max": 10.0 * (i + 1) + seed, "curve": [float(seed)] * len(ALPHAS)}
        for i, n in enumerate(measured)
        for seed in range(n)
    )
    runs = make_runs(methods).merge(sharp[["id", *SHARPNESS]], on="id", how="left")
    return sharpness_figure(build_table("Methods", SETTING, make_rows(methods), runs), sharp, stem)


def test_sharpness_figure(tmp_path):
    """Points and curves are the means of the runs measured; which are not all is said."""
    figure = draw_sharpness(METHODS[:3], (5, 2, 0), tmp_path / "sharp")
    points, lines = figure.subfigs[0].axes
    found = {c.get_label(): float(c.lines[0].get_xdata()[0]) for c in points.containers}
    assert found == pytest.approx({"SGD": 12.0, "SAM (sharpness of 2)": 20.5})
    heights = {line.get_label(): set(line.get_ydata()) for line in lines.lines}
    assert heights == {"SGD": {2.0}, "SAM (sharpness of 2)": {0.5}}
    assert figure.get_supxlabel() == "not measured: RST constant"
    assert (tmp_path / "sharp.pdf").exists() and (tmp_path / "sharp.png").exists()


def test_sharpness_of_many_rows_is_at_one_scale(tmp_path):
    methods = CROWD[: ROWS_A_PANEL + 1]
    one, other = draw_sharpness(methods, [2] * len(methods), tmp_path / "sharp").subfigs
    for first, second in zip(one.axes, other.axes, strict=True):
        assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    low, high = one.axes[0].get_xlim()
    assert low < 10 and high > 10 * len(methods)
