"""What a driver shows of its runs: lines in a log, a bar on a terminal."""

import io
import sys
import time

import pytest

from rst.experiments.run_progress import RunProgress, in_words
from rst.experiments.sweeps import Cell
from rst.training.run import Run

CHOICES = dict.fromkeys(("dataset", "model", "augment", "method", "schedule"), "x")
WORK = (10.0, 10.0, 70.0, 30.0)


@pytest.fixture
def cells(tmp_path):
    """Four runs; `Run.complete` and `Run.fail` end them."""
    configs = ({"seed": seed, "dataset": {"validation": seed == 1}} for seed in range(4))
    runs = [Run(tmp_path, config, CHOICES, "") for config in configs]
    for run in runs:
        run.folder.mkdir()
    return [Cell([], run, title=f"t / SAM, seed {seed}") for seed, run in enumerate(runs)]


def follow(cells, monkeypatch):
    """Ends the first three of four runs, of six in all; ten seconds pass until the first one's end."""
    monkeypatch.setattr("rst.experiments.run_progress.POLL", 60)  # only the looks below
    now = time.monotonic()
    monkeypatch.setattr("rst.experiments.run_progress.time.monotonic", lambda: now)
    work = {cell.run.id: amount for cell, amount in zip(cells, WORK, strict=True)}
    with RunProgress(cells, work, total=6) as progress:
        now += 10
        cells[0].run.complete({"test_accuracy": 0.9714})
        progress.look()
        cells[1].run.complete({"test_accuracy": 0.5})
        progress.look()
        cells[2].run.fail("the loss is not finite")


def test_a_line_a_run_where_there_is_no_terminal(cells, monkeypatch, capsys):
    follow(cells, monkeypatch)
    assert capsys.readouterr() == (
        "[3/6, 110 s left] t / SAM, seed 0: test accuracy 97.14 %\n"  # 110 of work at one a second
        "[4/6, 50 s left] t / SAM, seed 1: validation accuracy 50.00 %\n"  # 100 of it, at two a second
        "[5/6, 15 s left, 1 failed] t / SAM, seed 2: FAILED: the loss is not finite\n",
        "",
    )


def test_a_bar_and_failures_on_a_terminal(cells, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    follow(cells, monkeypatch)
    assert capsys.readouterr().out == ""
    shown = terminal.getvalue()
    assert "2/6 |" in shown and ", 50 s left, t / SAM, seed 1: validation accuracy 50.00 %" in shown
    failure = "[5/6, 15 s left, 1 failed] t / SAM, seed 2: FAILED: the loss is not finite\n"
    assert failure in shown and "5/6 |" in shown.partition(failure)[2]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (150, "2 min"), (7200, "2 hours"), (2e5, "2 days")]
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words
