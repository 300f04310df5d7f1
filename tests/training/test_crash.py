"""Runs killed with SIGKILL at random points, and started again, end as undisturbed ones do."""

import math
import sys

import pytest
import torch
from conftest import ROOT, command

sys.path.insert(0, str(ROOT / "scripts"))
import crash_test


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    """With a fixed seed and with a random one, which the message of a failure names. `make crash-test` does
    every combination at many points."""
    arguments = ["--points", 3, "--combination", "grst-adamw-mixup_cutout"]
    done = command(sys.executable, "scripts/crash_test.py", *arguments, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(": 4 kills at 3 points of " in line for line in lines)


def test_a_difference_of_a_bit_is_found():
    state = {"w": [torch.zeros(2, 3), (0.9, 0.999)], "loss": 0.1, "seconds_train": 1.0, "none": math.nan}
    assert crash_test.difference(state, state | {"seconds_train": 2.0, "none": math.nan}) is None
    next_number = math.nextafter(0.1, 1)
    assert crash_test.difference(state, state | {"loss": next_number}) == f"/loss is 0.1, not {next_number}"
    negative = torch.zeros(2, 3)
    negative[1, 2] = -0.0
    for other in (negative, torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        assert crash_test.difference(state, state | {"w": [other, (0.9, 0.999)]}) == "/w/0 differs"
    assert crash_test.difference({"a": {"b": 1}}, {"a": {}}) == "only one has /a/b"
    assert crash_test.difference([1, 1.0], [1, 1]) == "/1 is 1.0, not 1"
