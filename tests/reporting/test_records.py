"""The records of a folder, and the index of all."""

import json
import re
from dataclasses import replace

from test_pages import pipe_tables, report
from test_tables import record, records, rows, table_of

from rst.reporting.pages import write_report
from rst.reporting.records import Finished, collect, index
from rst.reporting.statistics import build_table
from rst.training.run import Run


def test_index_lists_what_is_there(tmp_path):
    quick, paper = tmp_path / "quick", tmp_path / "paper"
    for folder in (quick, paper, tmp_path / "empty"):
        folder.mkdir()
    some = [r for r in records() if r["id"] != "2e000003"]
    some[0] |= {"commit": "abcdef0", "dirty": True, "finished": "2026-11-19T01:00:00+00:00"}
    some[5] |= {"finished": "2026-11-20T01:00:00+00:00"}
    for suffix in ("md", "csv", "tex"):
        write_report([table_of(some)], quick / f"overview.{suffix}")
    for suffix in ("md", "csv"):
        write_report([table_of([])], quick / f"overview_long.{suffix}")
        write_report(report(), paper / f"methods.{suffix}")
    names = ("overview.png", "overview.pdf", "overview_curves.png", "overview_long_curves.pdf", "other.png")
    for name in (*names, "runs.csv", "curves.csv"):
        (quick / name).touch()
    (tmp_path / "benchmark").mkdir()
    for suffix in ("md", "csv"):
        (tmp_path / "benchmark" / f"some-host.{suffix}").touch()
    text = index(tmp_path)
    headings = ["# Results", "## benchmark", "## paper", "## quick"]
    assert re.findall("^#.*", text, re.MULTILINE) == headings
    assert "[some-host.md](benchmark/some-host.md)" in text
    ((methods,), (overview, long)) = pipe_tables(text)
    assert overview == {
        "Table": "A title",
        "Files": "[overview.md](quick/overview.md), [overview.csv](quick/overview.csv), "
        "[overview.tex](quick/overview.tex)",
        "Figures": "[overview.pdf](quick/overview.pdf), [overview.png](quick/overview.png), "
        "[overview_curves.png](quick/overview_curves.png)",
        "Runs": "14 of 15",
        "Commit": "1234567, abcdef0, uncommitted changes",
        "Finished (UTC)": "2026-11-19 to 2026-11-21",
    }
    assert long["Figures"] == "[overview_long_curves.pdf](quick/overview_long_curves.pdf)"
    assert (long["Runs"], long["Commit"], long["Finished (UTC)"]) == ("0 of 15", "", "not run")
    assert (methods["Runs"], methods["Commit"], methods["Figures"]) == ("25 of 30", "1234567", "")
    assert "Runs and epochs: [runs.csv](quick/runs.csv), [curves.csv](quick/curves.csv)" in text
    assert "paper/runs.csv" not in text
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (tmp_path / link).exists()
    assert "make reproduce-tables PROTOCOL=" in text
    assert index(tmp_path) == text


def finished(run):
    return Finished(run.result(), run.metrics(), run.sharpness())


def measured_run(outputs, seed, **changes):
    """A finished run, whose sharpness was measured."""
    groups = ("dataset", "model", "augment", "method", "schedule")
    run = Run(outputs, {"seed": seed}, dict.fromkeys(groups, "sgd"), "python train.py")
    one = record("sgd", seed, 30.0, id=run.id, **changes)
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_text(json.dumps(one))
    sharp = {
        "loss": 0.1,
        "lambda_max": 40.0 + seed,
        "in_ball": 0.2,
        "along": 3.0,
        "curve": [1.0, 0.0],
        "rho": 0.1,
    }
    how = {"images": 500, "directions": 3, "versions": {"torch": "2.9.0"}, "commit": "abc", "host": "box"}
    named = {"id": run.id, "finished": one["finished"]}
    (run.folder / "sharpness.json").write_text(json.dumps({**sharp, **how, **named}))
    return run


def test_sharpness_belongs_to_the_run_that_was_measured(tmp_path):
    """Not to a later one of the same id, on another machine, say."""
    results, outputs = tmp_path / "results", tmp_path / "outputs"
    results.mkdir()
    runs = [measured_run(outputs, seed) for seed in (0, 1)]
    found = collect(results, map(finished, runs), outputs)
    assert found.joined["lambda_max"].to_list() == [40.0, 41.0]
    asked = [replace(row, runs={seed: run.id for seed, run in enumerate(runs)}) for row in rows(2, ("sgd",))]
    table = build_table("A title", "A setting", asked, found.joined, "SGD", "SGD")
    assert "Sharpness: images 500, directions 3, commit abc" in table.provenance[-1]
    before = (results / "sharpness.csv").read_bytes()
    assert collect(results, [], outputs).joined.equals(found.joined)
    assert (results / "sharpness.csv").read_bytes() == before

    again = measured_run(tmp_path / "elsewhere", 1, finished="2026-11-23T00:00:00+00:00")
    (again.folder / "sharpness.json").unlink()
    found = collect(results, [finished(again)], outputs)
    assert found.joined["lambda_max"].isna().to_list() == [False, True]
    assert found.sharpness["id"].to_list() == [runs[0].id]
