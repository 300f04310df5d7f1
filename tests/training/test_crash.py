"""Runs killed with SIGKILL at random points end as undisturbed ones; a resume that loses something shows."""

import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command

sys.path.insert(0, str(ROOT / "scripts"))
import crash_test

COMBINATIONS = ["rst-sgd-shift", "grst-adamw-mixup_cutout"]
# Each is patched into what the runs are forked from. All in one process, as imports take most of its time.
BROKEN = """
import sys
sys.path.insert(0, "scripts")
import crash_test
from rst.training import run
from rst.training.loop import Training

load, remove_temporary = Training.load_state_dict, record.remove_temporary

def without_momentum(training, state):
    load(training, state)
    training.optimizer.state.clear()

def without_place_in_epoch(training, state):
    load(training, state)
    training._begin_epoch()

def fails(broken_load, broken_remove):
    Training.load_state_dict, record.remove_temporary = broken_load, broken_remove
    try:
        crash_test.main()
    except SystemExit as end:
        print(end)

sys.argv = ["", "--points", "3", "--seed", "0", "--combination", "rst-sgd-none"]
fails(without_momentum, remove_temporary)
fails(without_place_in_epoch, remove_temporary)
fails(load, lambda folder: None)
"""


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    """With a fixed seed, and a random one, which the message of a failure has."""
    places = {"TMPDIR": str(tmp_path)}
    arguments = ["scripts/crash_test.py", "--points", 3, "--combination", *COMBINATIONS]
    done = command(sys.executable, *arguments, env=places)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == [name for name in COMBINATIONS for _ in range(2)]
    assert all(": 4 kills at 3 points of " in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_resume_that_loses_something_is_noticed(tmp_path):
    done = command(sys.executable, "-c", BROKEN, env={"TMPDIR": str(tmp_path)})
    reasons = [": /checkpoint.pt/model/stem.0.weight differs", " it exited with 1", ": only one has /files/."]
    lines = done.stdout.splitlines()
    assert len(lines) == len(reasons), done.stdout + done.stderr
    for line, reason in zip(lines, reasons, strict=True):
        assert line.startswith("error: rst-sgd-none, seed 0, killed at moment ") and reason in line
        assert "again: python scripts/crash_test.py --points 3 --seed 0 --combination rst-sgd-none" in line
        folder = re.search(r"in (/\S+);", line)[1]
        assert list(Path(folder).glob("killed/outputs/*/config.yaml"))


def test_an_unknown_combination(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["crash_test.py", "--combination", "adam"])
    with pytest.raises(SystemExit):
        crash_test.main()
    assert "choose from sgd-sgd-none, sgd-sgd-shift, " in capsys.readouterr().err


def test_a_difference_is_found_to_the_bit():
    state = {"w": [torch.zeros(2, 3), (0.9, 0.999)], "loss": 0.1, "seconds_train": 1.0, "none": math.nan}
    assert crash_test.difference(state, state | {"seconds_train": 2.0, "none": math.nan}) is None
    next_number = math.nextafter(0.1, 1)
    assert crash_test.difference(state, state | {"loss": next_number}) == f"/loss is 0.1, not {next_number}"
    negative = torch.zeros(2, 3)
    negative[1, 2] = -0.0
    for other in (negative, torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        assert crash_test.difference(state, state | {"w": [other, (0.9, 0.999)]}) == "/w/0 differs"
    other = {"w": [torch.zeros(2, 3), (0.9, 0.99)]}
    assert crash_test.difference(state, state | other) == "/w/1/1 is 0.999, not 0.99"
    assert crash_test.difference({"a": {"b": 1}}, {"a": {}}) == "only one has /a/b"
    assert crash_test.difference([1, 1.0], [1, 1]) == "/1 is 1.0, not 1"


def test_where_runs_are_killed():
    inside, other = "write .checkpoint.pt.tmp", "step"
    moments = [other] * 30 + [inside] * 300 + [other] * 30
    kills = crash_test.draw_kills(moments, 20, random.Random(0))
    assert kills == crash_test.draw_kills(moments, 20, random.Random(0))
    assert kills != crash_test.draw_kills(moments, 20, random.Random(1))
    first = [lasts[0] for lasts in kills]
    assert len(set(first)) == 20 and sum(moments[i - 1] == inside for i in first) == 5
    assert [len(lasts) for lasts in kills] == [2, 1, 1, 1, 1] * 4
    assert all(i + j <= len(moments) for i, j in kills[::5])
