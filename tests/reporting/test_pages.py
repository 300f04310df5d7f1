import csv
import io
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_tables import COMMAND, ERRORS, records, rows, table_of

from rst.reporting.pages import SETTINGS_ACROSS, escape_latex, to_csv, to_latex, to_markdown, write_report
from rst.reporting.statistics import METRICS, SHARPNESS, build_table, read_runs, runs_frame, write_runs
from rst.reporting.tables import Row

PIPE = r"(?<!\\)\|"


def pipe_tables(text):
    """The Markdown tables, each as one {header: cell} a row."""
    tables = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = [[cell.strip() for cell in re.split(PIPE, line)[1:-1]] for line in block.splitlines()]
            tables.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return tables


def cells(table):
    (only,) = pipe_tables(to_markdown([table]))
    return only


def notes(text):
    return [line[2:] for line in text.splitlines() if line.startswith("- ")]


def of_table(table):
    return notes(to_markdown([table]))


# --- Markdown


def test_table_by_hand():
    table = table_of(records())
    assert cells(table)[2] == {
        "Method": "RST",
        "Test error, last epoch (%)": "9.00 ± 1.58 (n = 5)",
        "95 % interval": "[7.04, 10.96]",
        "Difference to SAM (points)": "+1.00 [+0.12, +1.88] *",
        "Difference to SGD (points)": "−3.00 [−3.00, −3.00]",
        "η measured": "1.487",
        "η expected": "1.500",
        "Time / SGD's": "1.49",
        "Best epoch (%), chosen on test data": "8.00 ± 1.58",
        "Published (%)": "unknown",
        "Command": "`python train.py protocol=quick method=rst`",
    }
    assert cells(table)[1]["Difference to SAM (points)"] == "–"  # SAM to itself
    assert to_markdown([table]).startswith("# A title\n\nA setting\n\n| Method")
    assert len(of_table(table)) == 6 + 5  # definitions, provenance
    assert of_table(table)[6:] == table.provenance


def test_only_a_difference_whose_interval_excludes_zero_is_marked():
    errors = ERRORS | {"rst": [6.0, 7.0, 8.5, 9.5, 9.5]}
    # To SAM: −1, 1, 0.5, 0.5, −0.5: mean 0.1, s² = 0.675, t·s/√5 = 1.020.
    row = cells(table_of(records(errors)))[2]
    assert row["Difference to SAM (points)"] == "+0.10 [−0.92, +1.12]"
    assert row["Difference to SGD (points)"].endswith(" *")


def test_no_minus_before_a_rounded_zero():
    errors = {"sgd": [5.0, 6.0, 7.0], "sam": [5.004, 6.0, 7.0], "rst": [5.0, 6.0, 7.0]}
    difference = cells(table_of(records(errors), rows(3)))[2]["Difference to SAM (points)"]
    assert difference == "+0.00 [−0.01, +0.00]"


def test_a_difference_over_fewer_seeds_than_the_rows_says_so():
    some = [r for r in records() if r["id"] not in ("1e000000", "1e000001", "1e000002")]
    row = cells(table_of(some))[2]
    assert row["Test error, last epoch (%)"] == "9.00 ± 1.58 (n = 5)"
    assert row["Difference to SAM (points)"] == "+1.00 [+1.00, +1.00] (n = 2 †)"


def test_rows_not_run_and_partly_run_say_so():
    some = [r for r in records() if r["choices"]["method"] != "sam" and r["seed"] < 2]
    some = [r for r in some if r["choices"]["method"] != "rst" or r["seed"] == 1]
    table = table_of(some)
    sgd, sam, rst = cells(table)
    assert {sam[name] for name in sam if name not in ("Method", "Published (%)", "Command")} == {"not run"}
    assert sgd["Test error, last epoch (%)"] == "10.50 ± 0.71 (n = 2 of 5 †)"
    assert rst["Test error, last epoch (%)"] == "8.00 (n = 1 of 5 †)"
    assert rst["95 % interval"] == "–"
    assert rst["Difference to SGD (points)"] == "−3.00"
    assert rst["Difference to SAM (points)"] == "–"  # nothing to compare with
    assert any(note.startswith("† fewer than 3 seeds") for note in of_table(table))
    assert not any("†" in note for note in of_table(table_of(records())))


def test_failed_rows_say_why():
    some = [r for r in records() if r["choices"]["method"] != "sam" and r["id"] != "2e000003"]
    failures = {"1e000000": "no | memory", "1e000004": "no disk", "2e000003": "not finite at step 7"}
    table = table_of(some, failures=failures)
    _, sam, rst = cells(table)
    assert sam["Test error, last epoch (%)"] == r"failed: no \| memory"
    assert sam["95 % interval"] == sam["Time / SGD's"] == "failed"
    assert sam["Published (%)"] == "unknown"
    assert rst["Test error, last epoch (%)"] == "8.75 ± 1.71 (n = 4 of 5)"
    assert "RST failed: seed 3: not finite at step 7." in of_table(table)
    assert "SAM failed: seed 0: no | memory; seed 4: no disk." in of_table(table)
    some_metrics = cells(replace(table, metrics=("published", "eta", "time")))
    assert some_metrics[1]["η measured"] == r"failed: no \| memory"
    assert not any("failed" in note for note in of_table(table_of(records())))


def test_a_table_of_which_nothing_has_run():
    table = table_of([])
    assert all(row["η expected"] == "not run" for row in cells(table))
    assert of_table(table)[-1] == "No run has finished."


def test_a_published_value_names_its_source():
    row = Row("SAM", "", {}, published=4.22, source="authors' logs")
    assert cells(table_of([], [*rows(methods=["sgd"]), row]))[1]["Published (%)"] == "4.22 (authors' logs)"


def test_no_time_is_explained():
    some = [r | {"host": "other"} if r["id"] == "2e000004" else r for r in records()]
    table = table_of(some)
    assert [row["Time / SGD's"] for row in cells(table)] == ["1.00", "1.98", ""]
    assert "No time for RST: no SGD of these seeds on the same machine." in of_table(table)
    assert not any("time" in note.lower() for note in of_table(replace(table, metrics=("eta",))))
    assert not any(note.startswith("No time") for note in of_table(table_of(records())))


def test_sharpness_is_shown_where_it_was_measured():
    runs = runs_frame(records())
    top = runs["choices.method"].map({"sgd": 40.0, "sam": 10.0}) + runs["seed"].astype(float)
    measured = runs.assign(lambda_max=top, in_ball=top / 300)
    lines = cells(build_table("A title", "A setting", rows(), measured))
    assert [line["λ_max"] for line in lines] == ["42.0 ± 1.6", "12.0 ± 1.6", "not measured"]
    assert [line["L(θ + ε) − L(θ)"] for line in lines[:2]] == ["0.140 ± 0.005", "0.0400 ± 0.0053"]
    few = runs.assign(lambda_max=top.where(runs["seed"] < 3), in_ball=np.nan)
    lines = cells(build_table("A title", "A setting", rows(), few))
    assert lines[0]["λ_max"] == "41.0 ± 1.0 (n = 3)" and "L(θ + ε) − L(θ)" not in lines[0]
    table = build_table("A title", "A setting", rows(), runs.assign(lambda_max=top.where(runs["seed"] < 2)))
    assert cells(table)[0]["λ_max"] == "40.5 ± 0.7 (n = 2 †)"
    assert "† fewer than 3 seeds: no ground for a comparison." in of_table(table)


def test_validation_data_is_called_so():
    table = table_of(records(), split="validation")
    for text in (to_markdown([table]), to_latex([table, replace(table, column="b")], "tab:x")):
        assert "Validation error" in text and "est error" not in text and "test data" not in text


@pytest.mark.parametrize("metric", sorted(set(METRICS) - set(SHARPNESS)))
def test_each_metric_can_be_shown_alone(metric):
    everything = cells(table_of(records()))
    shown = cells(table_of(records(), metrics=[metric]))
    assert [len(row) for row in shown] == [3, 3, 3]
    assert all(row.items() <= whole.items() for row, whole in zip(shown, everything, strict=True))
    definitions = of_table(table_of(records(), metrics=[metric]))[:-5]
    assert len(definitions) == (metric != "published")
    assert set(definitions) <= set(of_table(table_of(records())))


def test_metrics_are_shown_in_the_order_asked_for():
    table = table_of(records(), metrics=["eta", "difference_to_baseline", "test_error"])
    headings = ["Method", "η measured", "Difference to SGD (points)", "Test error, last epoch (%)", "Command"]
    assert list(cells(table)[0]) == headings
    assert r"Method} & \shortstack{$\eta$ measured} & \shortstack{Diff" in to_latex([table], "tab:x")
    assert to_csv([table]) == to_csv([table_of(records())])  # which holds everything


def test_pipes_do_not_break_the_markdown_table():
    asked = [Row("SGD", "a | b", {}), Row("SAM | x", "python x", {})]
    table = table_of([], asked, reference="SAM | x")
    assert cells(table)[0]["Command"] == r"`a \| b`"
    assert cells(table)[1]["Method"] == r"SAM \| x"
    lines = [line for line in to_markdown([table]).splitlines() if line.startswith("|")]
    assert len({len(re.findall(PIPE, line)) for line in lines}) == 1


# --- several settings


def report(count=2):
    """The first setting complete; the second without RST, on another host; all others empty."""
    some = [r | {"host": "other"} for r in records() if r["choices"]["method"] != "rst"]
    failures = {"2e000001": "no memory"}
    first = table_of(records(), column="digits / resnet8 / none")
    second = build_table(
        "A title", "Second", rows(), runs_frame(some), column="cifar10 / wrn28_10", failures=failures
    )
    return [first, second, *(table_of([], column=f"empty{i} / none") for i in range(count - 2))]


def test_several_settings_make_a_matrix_and_a_section_each():
    text = to_markdown(report())
    matrix, first, second = pipe_tables(text)
    assert matrix == [
        # SGD − SAM = 3, 5, 4, 4, 4; RST − SAM = 1 ± 0.88.
        {
            "Method": "SGD",
            "digits / resnet8 / none": "12.00 ± 1.58 (n = 5) *",
            "cifar10 / wrn28_10": "12.00 ± 1.58 (n = 5) *",
        },
        {
            "Method": "SAM",
            "digits / resnet8 / none": "8.00 ± 1.58 (n = 5)",
            "cifar10 / wrn28_10": "8.00 ± 1.58 (n = 5)",
        },
        {"Method": "RST", "digits / resnet8 / none": "9.00 ± 1.58 (n = 5) *", "cifar10 / wrn28_10": "failed"},
    ]
    assert first == cells(report()[0])
    assert second == cells(report()[1])
    assert second[2]["Test error, last epoch (%)"] == "failed: no memory"
    assert re.findall("^#.*", text, re.MULTILINE) == [
        "# A title",
        "## digits / resnet8 / none",
        "## cifar10 / wrn28_10",
    ]


def test_what_is_equal_in_all_settings_is_said_once():
    text = to_markdown(report())
    general, first, second = (notes(part) for part in re.split("^## ", text, flags=re.MULTILINE))
    assert len(notes(text)) == len(set(notes(text)))
    assert general[-3:] == [
        "Sample: n 5, seeds 0 1 2 3 4.",
        "Code: commit 1234567, dirty False.",
        "Software: python 3.11.7, torch 2.9.0, cuda none, rst 0.1.0.",
    ]
    machine = "Machine: host {}, device cpu, device_name Xeon (2 cores), ranks 1, threads 1."
    assert first == ["Runs: 15, finished 2026-11-21 (UTC).", machine.format("box")]
    assert second == [
        "RST failed: seed 1: no memory.",
        "Runs: 10, finished 2026-11-21 (UTC).",
        machine.format("other"),
    ]


def test_the_tables_of_a_report_belong_together():
    first, second = report()
    others = [
        replace(second, title="Another"),
        replace(second, column=first.column),
        replace(second, reference="SGD"),
        replace(second, metrics=("eta",)),
        replace(second, frame=second.frame.iloc[:2]),
    ]
    for other in others:
        for render in (to_markdown, to_csv, lambda tables: to_latex(tables, "tab:x")):
            with pytest.raises(ValueError, match="the tables of a report have one title"):
                render([first, other])
    with pytest.raises(ValueError, match="at least one table"):
        to_markdown([])


# --- CSV


def test_csv_holds_the_numbers_in_full(tmp_path):
    tables = report()
    write_report(tables, tmp_path / "table.csv")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert list(lines[0])[:2] == ["setting", "label"]
    names = ["digits / resnet8 / none"] * 3 + ["cifar10 / wrn28_10"] * 3
    assert [(line["setting"], line["label"]) for line in lines] == [
        *zip(names, ["SGD", "SAM", "RST"] * 2, strict=True)
    ]
    assert [line["conditions"] for line in lines] == ["A setting"] * 3 + ["Second"] * 3
    assert lines[5]["test_error_percent.mean"] == ""
    assert lines[5]["failures"] == "seed 1: no memory"
    assert lines[2]["runs"] == "2e000000 2e000001 2e000002 2e000003 2e000004"
    values = [row for table in tables for row in table.frame.to_dict("records")]
    for line, row in zip(lines, values, strict=True):
        for name, value in row.items():
            if isinstance(value, float) and not np.isnan(value):
                assert float(line[name]) == value


# --- LaTeX

HOSTILE = "50% & γ=½_#{x}~^\\ [a] <b|c> $ ± − ü 漢"


def hostile_tables(count):
    asked = [*rows(), Row(HOSTILE, COMMAND.format("rst") + " x=½", {0: "f0"}), Row("[x] *", "", {})]
    failures = {"f0": HOSTILE}
    return [
        build_table(HOSTILE, HOSTILE, asked, runs_frame(records()), column=f"a_{i} / b%", failures=failures)
        for i in range(count)
    ]


def test_latex_by_hand():
    text = to_latex([table_of(records())], "tab:quick-overview")
    lines = text.splitlines()
    assert lines[:5] == [
        r"% Needs \usepackage{booktabs}. The rows' commands:",
        *(f"% {m.upper()}: {COMMAND.format(m)}" for m in ("sgd", "sam", "rst")),
        r"\begin{table}",
    ]
    start = lines.index(r"\caption{A title. A setting.}")
    assert lines[start + 1 : start + 11] == [
        r"\label{tab:quick-overview}",
        r"\begin{tabular}{@{}lrrrrr@{}}",
        r"\toprule",
        r"\shortstack{Method} & \shortstack{Test error,\\last epoch\\(\%)} & \shortstack{95 \%\\interval} & "
        r"\shortstack{Difference\\to SAM\\(points)} & \shortstack{$\eta$ measured} & "
        r"\shortstack{Time /\\SGD's} \\",
        r"\midrule",
        r"SGD & 12.00 $\pm$ 1.58 (n = 5) & {[}10.04, 13.96] & +4.00 {[}+3.12, +4.88]\rlap{$^{*}$} & "
        r"1.000 & 1.00 \\",
        r"SAM & 8.00 $\pm$ 1.58 (n = 5) & {[}6.04, 9.96] & -- & 2.000 & 1.98 \\",
        r"RST & 9.00 $\pm$ 1.58 (n = 5) & {[}7.04, 10.96] & +1.00 {[}+0.12, +1.88]\rlap{$^{*}$} & "
        r"1.487 & 1.49 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert lines[-1] == r"\end{table}"
    assert "Code: commit 1234567, dirty False." in lines
    assert "Best epoch" not in text


def test_latex_of_several_settings_is_the_matrix():
    text = to_latex(report(SETTINGS_ACROSS + 1), "tab:x")
    assert text.count(r"\begin{tabular}{@{}lrrr@{}}") == text.count(r"\begin{tabular}{@{}lr@{}}") == 1
    assert text.count(r"\begin{table}") == text.count(r"\label{tab:x}") == 1
    assert r"RST & 9.00 $\pm$ 1.58 (n = 5)\rlap{$^{*}$} & failed & not run \\" in text
    assert r"\shortstack{cifar10 /\\wrn28\_10}" in text
    assert "cifar10 / wrn28\\_10: Second. RST failed: seed 1: no memory. Runs: 10" in text


def test_latex_escapes():
    expected = (
        r"50\% \& $\gamma$=1/2\_\#\{x\}\textasciitilde{}\textasciicircum{}\textbackslash{} {[}a] "
        r"$<$b$|$c$>$ \$ $\pm$ $-$ u {[}U+6F22]"
    )
    assert escape_latex(HOSTILE) == expected


def test_a_latex_cell_never_looks_like_an_argument_of_the_line_before():
    """LaTeX's line break takes a * or [ that follows, on the next line too."""
    body = to_latex(hostile_tables(1), "tab:x")
    assert "\n[" not in body
    assert "\n*" not in body
    assert "\n{[}x] $^{*}$ & not run" in body.replace(r"\rlap{$^{*}$}", " $^{*}$")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_latex_is_ascii_and_compiles(tmp_path, count):
    write_report(hostile_tables(count), tmp_path / "table.tex")
    text = (tmp_path / "table.tex").read_text()
    assert text.isascii()
    assert rf"\label{{tab:{re.sub('[^A-Za-z0-9]', '-', tmp_path.name)}-table}}" in text
    code = [line for line in text.splitlines() if not line.startswith("%")]
    assert not any(re.search(r"(?<!\\)[%#]", line) for line in code)
    for block in re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
        rows_ = [line for line in block.splitlines() if line.endswith(r" \\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in rows_}) == 1
    if pdflatex := shutil.which("pdflatex"):
        document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
        (tmp_path / "document.tex").write_text(document)
        options = ["-interaction=nonstopmode", "-halt-on-error", "-draftmode", "document.tex"]
        done = subprocess.run([pdflatex, *options], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# --- files


def test_tables_are_the_same_byte_for_byte(tmp_path):
    """From shuffled records, from runs.csv read again, and in another process with another hash seed."""
    some = records()
    some[3] |= {"commit": "abcdef0", "host": "other"}
    write_runs(runs_frame(some), tmp_path / "runs.csv")
    random.Random(1).shuffle(some)
    suffixes = (".md", ".csv", ".tex")
    paths = {}
    for name, frame in {"a": runs_frame(some), "b": read_runs(tmp_path / "runs.csv")}.items():
        paths[name] = [tmp_path / name / f"table{suffix}" for suffix in suffixes]
        (tmp_path / name).mkdir()
        for path in paths[name]:
            write_report([build_table("T", "S", rows(), frame, column=c) for c in "xy"], path)
    script = (
        "import sys; from pathlib import Path\n"
        "from rst.reporting.statistics import *; from rst.reporting.pages import *\n"
        f"runs, rows = read_runs(Path(sys.argv[1])), {rows()!r}\n"
        "tables = [build_table('T', 'S', rows, runs, column=c) for c in 'xy']\n"
        "[write_report(tables, Path(path)) for path in sys.argv[2:]]"
    )
    (tmp_path / "c").mkdir()
    paths["c"] = [tmp_path / "c" / f"table{suffix}" for suffix in suffixes]
    command = [sys.executable, "-c", script, tmp_path / "runs.csv", *paths["c"]]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "1"}, check=True)
    for same in zip(*paths.values(), strict=True):
        versions = {path.read_bytes().replace(f"tab:{path.parent.name}-".encode(), b"") for path in same}
        assert len(versions) == 1


def test_other_endings_are_refused():
    with pytest.raises(ValueError, match=r"\.md, \.csv or \.tex"):
        write_report([table_of([])], Path("table.docx"))
