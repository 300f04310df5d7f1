"""The committed results follow from their records, and the records from their commands."""

import io
import re
import runpy
import subprocess
import tarfile
from contextlib import nullcontext
from functools import cache

import pandas as pd
import pytest
import torch
from conftest import ROOT, interrupted_after
from hydra import initialize_config_dir

from rst import schedule
from rst.experiments.choices import NO_SCHEDULE
from rst.experiments.cost import steps_per_epoch
from rst.experiments.sweeps import gather
from rst.reporting.claims import read_claims, tables_of_claims
from rst.reporting.pages import page
from rst.reporting.records import recorded_in
from rst.reporting.tables import summarize, to_csv
from rst.training.parts import optimizer_alone
from rst.training.provenance import provenance

CONF = ROOT / "conf"
RECORDED = sorted({path.parents[1].name for path in ROOT.glob("results/*/*/table.csv")})
UNDER_WAY = {"folds", "gpu"}  # protocols whose runs are not all recorded yet
TOLERANCE = 0.03  # of test accuracy on another machine: a few times its spread over seeds


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The committed files, as `make reproduce-tables` changes those here; without git, those here."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", "HEAD"], capture_output=True)
    if archive.returncode:
        return ROOT
    folder = tmp_path_factory.mktemp("committed")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


# To compose a protocol's tables takes seconds: by default, those of the quickest.
EACH = [name if name == "quick" else pytest.param(name, marks=pytest.mark.slow) for name in RECORDED]


@pytest.fixture(scope="module", params=EACH)
def protocol(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tree, protocol):
    return tree / "results" / protocol


@pytest.fixture(scope="module")
def gathered(folder, protocol):
    """The protocol's tables that have results, and their runs by id, as conf/ defines them."""
    names = sorted(path.parent.name for path in folder.glob("*/table.csv"))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return gather(names, CONF, protocol, [])


@pytest.fixture(scope="module")
def tables(gathered):
    return gathered[0]


@pytest.fixture(scope="module")
def records(folder):
    return recorded_in(folder)


def test_every_recorded_run_is_found_by_its_table_and_no_other_is_missing(tables, records, protocol):
    """With REUSE=1 nothing is left to run, but of what is under way."""
    rows = [row for table in tables for column in table.columns for row in column.rows]
    missing = {run for row in rows for run in row.runs.values()} ^ set(records.runs["id"])
    assert not missing & set(records.runs["id"])
    assert not missing or protocol in UNDER_WAY


def test_tables_follow_from_the_records(folder, tables, records):
    for table in tables:
        of_table = folder / table.name
        summaries = [summarize(table, column, records.joined, {}) for column in table.columns]
        figures = {path.relative_to(of_table).with_suffix("").as_posix() for path in of_table.rglob("*.png")}
        has_runs = any(summary.frame["test_error.n"].any() for summary in summaries)
        assert any(name.endswith("forest") for name in figures) == has_runs
        assert (of_table / "table.csv").read_text() == to_csv(summaries)
        assert (of_table / "README.md").read_text() == page(summaries, figures)


def test_claims_follow_from_the_records(folder, protocol, tables, records):
    families = read_claims(CONF / "claims" / f"{protocol}.yaml")
    text = (folder / "README.md").read_text()
    (block,) = re.findall(r"<!-- claims -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert block == tables_of_claims(families, {table.name: table for table in tables}, records)


SUMMARIES = {  # what comes before the sentences, and after them
    "results/README.md": ("# Results\n", "\n| "),
    "results/folds/README.md": ("## Reading the tables\n", "\n## "),
    "README.md": ("## What it does on real images\n", "\n## "),
}


@pytest.mark.parametrize("file", SUMMARIES)
def test_each_number_in_a_summary_is_in_the_table_or_claim_that_it_names(file, tree):
    """<!-- = cpu/schedules: SAM, difference_to_SGD --> follows numbers of a row's estimate, <!-- = cpu: … -->
    those of a claim, found by its words; signs are for the sentence to say."""
    before, after = SUMMARIES[file]
    text = (tree / file).read_text().partition(before)[2].partition(after)[0]
    *checked, rest = re.split(r"<!-- = (.*?) -->", text)
    assert checked
    for sentences, source in zip(checked[::2], checked[1::2], strict=True):
        numbers = re.findall(r"(?<![\w.])\d+\.\d+", sentences)
        assert numbers, source
        there = _numbers_of(tree / "results", source)
        for number in numbers:
            digits = len(number.partition(".")[2])
            assert number in {f"{abs(x):.{digits}f}" for x in there}, f"{number} is not in {source}: {there}"
    assert not re.findall(r"\d\.\d", rest), "a number without its source"


def _numbers_of(results, source):
    where, _, what = source.partition(": ")
    folder, *table = where.split("/", 1)
    if not table:
        lines = [
            line.strip("| ").split("|") for line in (results / folder / "README.md").read_text().splitlines()
        ]
        estimates = [line[1] for line in lines if line[0].strip() == what]
        return [float(x) for estimate in estimates for x in re.findall(r"\d+\.\d+", estimate)]
    name, *column = table[0].split("/")
    frame = pd.read_csv(results / folder / name / "table.csv", dtype={"column": "string"})
    row, metric = what.rsplit(", ", 1)
    frame = frame[(frame["label"] == row) & (frame["column"].fillna("") == "".join(column))]
    (line,) = frame[[f"{metric}.{part}" for part in ("mean", "low", "high", "std")]].to_numpy()
    return line.tolist()


def test_the_counts_of_verdicts_are_those_of_the_claims(tree):
    results, seen = tree / "results", 0
    for line in (results / "README.md").read_text().splitlines():
        if counts := re.findall(r"(\d+) of (\d+) supported, (\d+|none) contradicted", line):
            (folder,) = re.findall(r"\((\w+)/README.md\)", line)
            families = (results / folder / "README.md").read_text().split("\n**")[1:]
            for count, family in zip(counts, families, strict=False):
                verdicts = re.findall(r"\| (supported|contradicted|undecided|partial) ", family)
                n = verdicts.count("supported"), len(verdicts), verdicts.count("contradicted") or "none"
                assert count == tuple(map(str, n)), line
                seen += 1
    assert seen >= 4


def test_pages_link_to_what_is_there_and_the_first_to_every_table(tree):
    results = tree / "results"
    for path in results.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"
    text = (results / "README.md").read_text()
    for path in results.glob("*/*/table.csv"):
        assert f"({path.parent.relative_to(results).as_posix()}/README.md)" in text


def test_the_readme_has_the_table_that_the_records_give(tree):
    table = runpy.run_path(str(ROOT / "scripts" / "readme.py"))["table"](tree / "results")
    assert f"<!-- table -->\n{table}\n<!-- end -->" in (tree / "README.md").read_text()


def test_the_sam_steps_are_those_of_each_runs_own_coin(records, gathered, monkeypatch):
    monkeypatch.setattr(schedule, "uniform", cache(schedule.uniform))
    for run in records.runs.to_dict("records"):
        if run["choices.method"] in NO_SCHEDULE:
            continue
        config = gathered[1][run["id"]].run.config
        optimizer = optimizer_alone(config, steps_per_epoch(config))
        is_sam_step = schedule.decider(
            optimizer.sampling, optimizer.schedule, optimizer.total_steps, run["seed"]
        )
        assert run["steps"] == optimizer.total_steps
        assert run["sam_steps"] == sum(map(is_sam_step, range(run["steps"]))), run["id"]


def test_the_propagation_count_is_as_expected(records):
    """Within 4 standard deviations of its closed form, for every run."""
    runs = records.runs
    if runs.empty:
        return  # of gpu, as long as nothing has been run
    away = (runs["propagations"] - runs["expected_propagations"]).abs()
    known = away.notna()  # AE-SAM's is measured only
    assert (away <= 4 * runs["propagations_std"] + 1e-9)[known].all()
    twice = ~runs["choices.method"].isin(["partial", "msam", "stale"])  # whose SAM steps cost less than two
    assert (runs["propagations"] == runs["steps"] + runs["sam_steps"])[twice].all()
    assert not runs["dirty"].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "method", "epochs"),
    [("quick", "grst", None), ("cpu", "sgd", 5), ("folds", "sam", 1)],
    indirect=["protocol"],
)
def test_a_recorded_run_repeats(protocol, method, epochs, records, tmp_path, run_script):
    """A run by its recorded command, or its first epochs: to the last digit where PyTorch and the CPU are
    those that made the record: such a record is preferred, if there is one."""
    made_with = provenance(torch.device("cpu"))
    runs = records.runs
    runs = runs[(runs["choices.method"] == method) & (runs["seed"] == 3)]
    runs = runs[~runs["command"].str.contains("validation=true")]
    alike = (runs["versions.torch"] == made_with["versions"]["torch"]) & (
        runs["device_name"] == made_with["device_name"]
    )
    recorded = (runs[alike] if alike.any() else runs).iloc[0]
    words = recorded["command"].split()
    assert words[:2] == ["python", "train.py"]
    if protocol != "quick":
        archive = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz"
        if not (ROOT / "data" / "cifar10").is_dir() and not archive.is_file():
            pytest.skip(f"needs CIFAR-10 as JPEG files, in data/cifar10 or {archive}")
        run_script("scripts/data.py")
    with interrupted_after(epochs), pytest.raises(SystemExit) if epochs else nullcontext():
        run_script(*words[1:], f"outputs={tmp_path}")
    (folder,) = tmp_path.glob("*/")
    names = ["epoch", "propagations", "train_loss", "test_accuracy"]
    metrics = pd.read_json(folder / "metrics.jsonl", lines=True, precise_float=True)
    metrics = metrics.reindex(columns=names).astype(float)
    curve = records.curves[records.curves["id"] == recorded["id"]][names].astype(float)
    curve = curve.reset_index(drop=True)[: len(metrics)]
    assert len(metrics) == (epochs or recorded["epochs"])
    assert epochs or pd.notna(metrics["test_accuracy"].iloc[-1])
    if alike.any():
        pd.testing.assert_frame_equal(metrics, curve, check_exact=True)
    else:
        assert (metrics["propagations"] == curve["propagations"]).all()  # the coins are the same everywhere
        assert metrics["train_loss"][0] == pytest.approx(curve["train_loss"][0], rel=0.01)
        last = [frame["test_accuracy"].iloc[-1] for frame in (metrics, curve)]  # of the first epochs, none
        assert last[0] == pytest.approx(last[1], abs=TOLERANCE, nan_ok=True)
