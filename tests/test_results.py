"""The index of results lists what is there."""

import re

from test_rendering import pipe_tables, report
from test_tables import records, table_of

from rst.rendering import write_report
from rst.results import index


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
