import re
from dataclasses import replace

import pytest
from sample_runs import column, records, result, results, table

from rst.reporting.pages import METRICS, fill, page, pipes, to_latex
from rst.reporting.tables import summarize


def page_of(asked=None, some=None, measured=(), failures=None, figures=("forest",)):
    asked = asked or table()
    joined = records(some, measured).joined
    return page([summarize(asked, one, joined, failures or {}) for one in asked.columns], figures)


def tables_in(markdown):
    """Each pipe table as a list of lines, by heading."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        head, _, *body = (
            [x.strip() for x in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()
        )
        found.append([dict(zip(head, line, strict=True)) for line in body])
    return found


def test_what_a_reader_sees_first():
    text = page_of(figures=["forest", "curves"])
    first = tables_in(text)[0]
    assert list(first[0]) == ["Method", "Test error (%)", "Difference to SAM (points)", "η", "Time / SGD's"]
    assert list(first[2].values()) == ["RST", "9.00 ± 1.58 (n = 5)", "+1.00 [+0.12, +1.88]", "1.487", "1.49"]
    assert first[1]["Difference to SAM (points)"] == "–"
    assert text.index("forest.png") < text.index("| Method") < text.index("curves.png")
    assert "error.png" not in text  # there is none


def test_details_commands_and_provenance_follow():
    text = page_of(measured=["rst"])
    _, details, commands = tables_in(text)
    rst = details[2]
    assert rst["95 % interval (%)"] == "[7.04, 10.96]"
    assert rst["Difference to SGD (points)"] == "−3.00"  # equal with every seed: no interval
    assert rst["Best epoch (%), chosen on test data"] == "8.00 ± 1.58"
    assert (rst["λ_max"], details[0]["λ_max"]) == ("40.0 ± 0.0", "not measured")
    assert rst["Published (%)"] == "unknown"
    assert commands[2] == {"Method": "RST", "Command": "`python train.py -m method=rst`"}
    assert "- Runs: 15, finished 2026-11-21 (UTC)." in text
    assert "- Code: commit 1234567, dirty False." in text
    assert "- Machine: host box, device cpu, device_name Xeon (2 cores), ranks 1, threads 1." in text
    assert "λ_max" not in page_of()


def test_a_published_value_has_its_source():
    asked = table()
    asked.columns[0].rows[1] = replace(asked.columns[0].rows[1], published=4.22, source="authors' logs")
    details = tables_in(page_of(asked))[1]
    assert [line["Published (%)"] for line in details] == ["unknown", "4.22 (authors' logs)", "unknown"]


def test_mixed_provenance_names_the_rows():
    some = results()[:-1]
    some[0] |= {"commit": "abcdef0", "finished": "2026-11-19T01:00:00+00:00"}
    text = page_of(some=some)
    assert "- Runs: 14, finished 2026-11-19 to 2026-11-21 (UTC)." in text
    assert "- Seeds, MIXED: 0 1 2 3 4 (SGD, SAM); 0 1 2 3 (RST)." in text
    assert "commit 1234567; abcdef0, dirty False (SGD); commit 1234567, dirty False (SAM, RST)" in text


def test_rows_that_are_missing_partial_or_failed():
    some = [result("sgd", seed, 10 + seed) for seed in range(3)]
    text = page_of(some=some, failures={"rrst1": "out of memory"})
    sgd, sam, rst = tables_in(text)[0]
    assert sgd["Test error (%)"] == "11.00 ± 1.00 (n = 3 of 5)"
    assert sgd["Difference to SAM (points)"] == "–"
    assert set(sam.values()) == {"SAM", "not run"}
    assert set(rst.values()) == {"RST", "failed"}
    assert "RST failed: seed 1: out of memory." in text


def test_fewer_than_three_seeds_are_marked():
    text = page_of(table(column(seeds=2)))
    assert tables_in(text)[0][2]["Test error (%)"] == "7.50 ± 0.71 (n = 2 †)"
    assert "† Fewer than 3 seeds" in text
    assert "†" not in page_of()


def test_rows_with_several_runs_of_a_part_are_named():
    asked = table()
    asked.columns[0].rows[1] = replace(asked.columns[0].rows[1], folds=3)
    assert "SAM: a seed's value is the mean of several runs." in page_of(asked)
    assert "several runs" not in page_of()
    without = [one for one in results() if one["id"] != "rsam4"]  # of the part that has seed 1's run
    assert "SAM: some of its runs have not finished." in page_of(asked, without)
    assert "have not finished" not in page_of(asked)


def test_a_difference_over_fewer_seeds_says_so():
    some = [one for one in results() if one["id"] not in ("rsam3", "rsam4")]
    assert tables_in(page_of(some=some))[0][2]["Difference to SAM (points)"].endswith("(n = 3 of 5)")


def test_no_time_across_machines():
    some = [one | {"host": "other"} if one["id"] == "rrst0" else one for one in results()]
    text = page_of(some=some)
    assert tables_in(text)[0][2]["Time / SGD's"] == "–"
    assert "No time: RST" in text


def test_metrics_are_shown_as_asked_for():
    shown, commands = tables_in(page_of(table(metrics=("eta_expected", "test_error", "published"))))
    assert list(shown[0]) == ["Method", "η expected", "Test error (%)", "Published (%)"]
    assert list(commands[0]) == ["Method", "Command"]
    text = page_of(table(column(split="validation"), metrics=("test_error", "test_loss")))
    assert list(tables_in(text)[0][0]) == ["Method", "Validation error (%)", "Validation loss (nats)"]
    assert "Validation error at the last epoch" in text and "Time:" not in text and "η:" not in text
    assert len(tables_in(page_of(table(metrics=METRICS)))[0][0]) == len(METRICS) + 1


def test_several_columns_begin_with_a_matrix_of_errors():
    asked = table(column("a"), column("b", split="validation"), column("c", seeds=2))
    text = page_of(asked, figures=["a/forest", "b/forest"])
    matrix, a, b, *_ = tables_in(text)
    assert list(matrix[0]) == ["Method", "a", "b", "c"]
    assert matrix[2]["a"] == "9.00 ± 1.58 (n = 5) *"
    assert matrix[2]["c"] == "7.50 ± 0.71 (n = 2 †)"  # no claim from two seeds
    assert "Validation error (%)" in b[0] and "Test error (%)" in a[0]
    assert re.findall(r"^## .*", text, re.MULTILINE)[:3] == ["## a", "## b", "## c"]
    assert "a/forest.png" in text and "c/forest.png" not in text


def test_pipes_and_headings_survive():
    (lines,) = tables_in(pipes([{"a | b": "1e3", "c": "x | y"}]) + "\n")
    assert lines == [{r"a \| b": "1e3", "c": r"x \| y"}]


def test_latex_has_plain_ascii_cells():
    asked = table()
    asked.columns[0].rows[2] = replace(asked.columns[0].rows[2], label="G_RST γ = 2 & 3 %")
    text = to_latex([summarize(asked, asked.columns[0], records().joined, {})])
    tabular = text[text.index(r"\begin{tabular}") :]
    assert tabular.isascii()
    assert r"G\_RST $\gamma$ = 2 \& 3 \% & 9.00 $\pm$ 1.58 (n = 5) & +1.00 [+0.12, +1.88] & 1.487" in tabular
    assert all(line.startswith("%") for line in text[: text.index(r"\begin{tabular}")].splitlines())


def test_filling_a_marked_part_of_a_page(tmp_path):
    written = tmp_path / "page.md"
    written.write_text("before\n\n<!-- a -->\nold\n<!-- end -->\n\n<!-- b -->\n<!-- end -->\nafter\n")
    fill(written, "b", "new")
    assert written.read_text().endswith(
        "<!-- a -->\nold\n<!-- end -->\n\n<!-- b -->\nnew\n<!-- end -->\nafter\n"
    )
    with pytest.raises(ValueError, match="<!-- c -->"):
        fill(written, "c", "new")
