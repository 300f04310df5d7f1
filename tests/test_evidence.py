"""The committed results: from their records alone, byte for byte, and a run of them again by its command."""

import re
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from rst.reporting.statistics import read_runs
from rst.training.provenance import provenance

RESULTS = ROOT / "results"
RECORDED = sorted(path.parent.name for path in RESULTS.glob("*/runs.csv"))
TABLES = {
    protocol: sorted(
        path.stem for path in (RESULTS / protocol).glob("*.md") if path.with_suffix(".tex").exists()
    )
    for protocol in RECORDED
}
PINNED = re.findall(r"^(\w+)==(.+)$", (RESULTS / "constraints.txt").read_text(), re.MULTILINE)
MADE_WITH = {name: number for name, number in PINNED if not name.startswith(("torch", "timm"))}
TOLERANCE = 0.03  # of test accuracy on another machine: a few times its spread over seeds


@pytest.mark.slow
@pytest.mark.parametrize("protocol", RECORDED)
def test_tables_and_figures_follow_from_the_records(protocol, tmp_path, run_script):
    """What `make reproduce-tables REUSE=1` writes on a fresh clone, where no run's folder is."""
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    for path in (results / protocol).iterdir():
        if path.name not in ("runs.csv", "curves.csv", "sharpness.csv", "PILOT.md"):
            path.unlink()
    where = ["--results", results, "--outputs", tmp_path / "outputs", "--reuse", "--collect"]
    tables = ["--protocol", protocol, "--table", ",".join(TABLES[protocol])]
    run_script("scripts/reproduce.py", *tables, *where)
    written, committed = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (results, RESULTS)
    )
    assert written.keys() == committed.keys()
    different = {name for name in written if written[name] != committed[name]}
    if other := {name for name, number in MADE_WITH.items() if version(name) != number}:
        warnings.warn(
            f"figures not compared, which may be drawn otherwise: other versions of {', '.join(other)}",
            stacklevel=1,
        )
        different = {name for name in different if not name.endswith((".png", ".pdf"))}
    assert different == set()


@pytest.mark.parametrize("protocol", RECORDED)
def test_the_propagation_count_is_the_coins(protocol):
    """Within 4 standard deviations of its closed form, for every run."""
    runs = read_runs(RESULTS / protocol / "runs.csv")
    away = (runs["propagations"] - runs["expected_propagations"]).abs()
    assert (away <= 4 * runs["propagations_std"] + 1e-9).all()
    assert (runs["propagations"] == runs["steps"] + runs["sam_steps"]).all()
    assert not runs["dirty"].any()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", RECORDED)
def test_a_recorded_run_repeats(protocol, tmp_path, run_script, capsys):
    """A run by its recorded command: to the last digit where PyTorch and the CPU are those that made the
    record. G-RST's under quick; SGD's under cpu, where it takes minutes."""
    runs = read_runs(RESULTS / protocol / "runs.csv")
    validating = runs["command"].str.contains("validation=true")
    method = "sgd" if protocol == "cpu" else "grst"
    one = runs[(runs["choices.method"] == method) & (runs["seed"] == 0) & ~validating].iloc[0]
    words = one["command"].split()
    assert words[:2] == ["python", "train.py"]
    if "protocol=cpu" in words:
        archive = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz"
        if not (ROOT / "data" / "cifar10").is_dir() and not archive.is_file():
            pytest.skip(f"needs CIFAR-10 as JPEG files, in data/cifar10 or {archive}")
        run_script("scripts/data.py")
    run_script(*words[1:], f"outputs={tmp_path}")
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[1]) / 100
    made_with = provenance(torch.device("cpu"))
    same = made_with["versions"]["torch"], made_with["device_name"]
    if same == (one["versions.torch"], one["device_name"]):
        assert accuracy == pytest.approx(one["test_accuracy"], abs=5e-5)  # as printed
        (found,) = Path(tmp_path).glob("*/result.json")
        assert f'"test_accuracy": {one["test_accuracy"]}' in found.read_text()
    else:
        assert accuracy == pytest.approx(one["test_accuracy"], abs=TOLERANCE)
