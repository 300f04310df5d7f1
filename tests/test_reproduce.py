"""From nothing to a table, and again from half of it."""

import json
import shutil
import sys

import pytest
from conftest import ROOT, command

from rst.tables import read_runs

# Long enough to be runs, short enough for a test: seven rows, two seeds.
SHORT = ["epochs=1", "model.width=4", "seed=0,1"]


def reproduce(folder, *arguments):
    places = ["--outputs", folder / "outputs", "--jobs", 2]
    return command(sys.executable, "scripts/reproduce.py", *places, *arguments, *SHORT)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    done = reproduce(folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_writes_what_it_prints(reproduced):
    folder, done = reproduced
    results = folder / "outputs" / "results" / "quick"
    assert sorted(p.name for p in results.iterdir()) == [
        "overview.csv",
        "overview.md",
        "overview.png",
        "runs.csv",
    ]
    assert (results / "overview.md").read_text() in done.stdout
    runs = read_runs(results / "runs.csv")
    assert len(runs) == 14
    assert set(runs["seed"]) == {0, 1}
    for _, run in runs.iterrows():
        deviation = abs(run["propagations"] - run["expected_propagations"])
        assert deviation <= 4 * run["propagations_std"]
    # p = 0.5 for each of the RST rows, thus one closed form a family.
    rows = (results / "overview.md").read_text()
    for label in (
        "SGD",
        "SAM",
        "RST constant",
        "RST piecewise",
        "RST linear",
        "RST trigonometric",
        "G-RST linear",
    ):
        assert f"| {label} " in rows


def test_only_what_is_missing_is_run(reproduced, tmp_path):
    folder, _ = reproduced
    shutil.copytree(folder, tmp_path / "again")
    outputs = tmp_path / "again" / "outputs"
    results = {path.parent.name: path.read_bytes() for path in outputs.glob("*/result.json")}
    lost = sorted(results)[3]
    shutil.rmtree(outputs / lost)
    done = reproduce(tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert "14 runs, 1 of them to do" in done.stdout
    for name, before in results.items():
        after = (outputs / name / "result.json").read_bytes()
        if name == lost:
            old, new = json.loads(before), json.loads(after)
            for figure in ("test_accuracy", "test_loss", "propagations"):
                assert new[figure] == old[figure]
        else:
            assert after == before


def test_a_failing_run_leaves_the_others_and_the_exit_code_says_so(tmp_path):
    done = reproduce(tmp_path, "optimizer.lr=1e30", "clip_norm=null")
    assert done.returncode == 1
    assert "not run" in (tmp_path / "outputs" / "results" / "quick" / "overview.md").read_text()
    assert "the loss is not finite at step" in done.stderr


def test_an_unknown_table_or_protocol_lists_the_choices():
    for option in ("--table", "--protocol"):
        done = command(sys.executable, "scripts/reproduce.py", option, "nothing")
        assert done.returncode == 2
        assert "choose from" in done.stderr.splitlines()[-1]


def test_a_bad_override_is_one_line(tmp_path):
    done = reproduce(tmp_path, "epoch=3")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Could not override 'epoch'")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_make_calls_the_script():
    printed = command(
        "make", "--dry-run", "reproduce-tables", "PROTOCOL=cpu", "JOBS=3", "ARGS=epochs=1"
    ).stdout
    expected = "scripts/reproduce.py --protocol cpu --table overview --launcher joblib --jobs 3 epochs=1"
    assert expected in printed
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make lint test"
