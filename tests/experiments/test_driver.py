"""From nothing to tables and figures, from half of it, and what goes wrong on the way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, command
from filelock import FileLock
from PIL import Image

from rst.reporting.statistics import read_curves, read_runs

# Long enough to be runs, short enough for a test: seven rows, two seeds.
SHORT = ["epochs=1", "model.width=4", "seed=0,1"]
# Beside the table's own files.
RECORDS = ["curves.csv", "runs.csv"]
FIGURES = [f"overview{part}.{kind}" for part in ("", "_curves", "_schedules") for kind in ("pdf", "png")]


def script(folder, *arguments):
    return ["scripts/reproduce.py", "--outputs", folder / "outputs", "--jobs", 2, *arguments]


def reproduce(folder, *arguments, short=SHORT):
    """As a user does, in a process of its own; `run_script(*script(folder, ...), *SHORT)` is faster."""
    return command(sys.executable, *script(folder, *arguments), *short)


def results_of(folder):
    return folder / "outputs" / "results" / "quick"


def without_times(markdown):
    """The table without what a clock has a part in."""
    lines = [line for line in markdown.splitlines() if "finished" not in line]
    header = next(line for line in lines if line.startswith("| Method"))
    column = [cell.strip() for cell in header.split("|")].index("Time / SGD's")
    return [
        [cell for i, cell in enumerate(line.split("|")) if i != column] if line.startswith("|") else line
        for line in lines
    ]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, worker_id):
    """The folder of a table, and what making it printed. Made once for all of pytest's workers."""
    alone = worker_id == "master"
    base = tmp_path_factory.getbasetemp()
    folder = (base if alone else base.parent) / "reproduced"
    with FileLock(f"{folder}.lock"):
        if not (folder / "printed").exists():
            done = reproduce(folder)
            assert done.returncode == 0, done.stderr
            (folder / "printed").write_text(done.stdout)
    return folder, (folder / "printed").read_text()


@pytest.fixture
def again(reproduced, tmp_path):
    """A copy of it, to spoil."""
    shutil.copytree(reproduced[0], tmp_path / "again")
    return tmp_path / "again"


def test_writes_what_it_prints(reproduced):
    folder, printed = reproduced
    results = results_of(folder)
    tables = ["overview.csv", "overview.md", "overview.tex"]
    assert sorted(p.name for p in results.iterdir()) == sorted([*tables, *FIGURES, *RECORDS])
    markdown = (results / "overview.md").read_text()
    assert markdown in printed
    runs, curves = read_runs(results / "runs.csv"), read_curves(results / "curves.csv")
    assert len(runs) == len(curves) == 14
    assert set(runs["seed"]) == {0, 1}
    for _, run in runs.iterrows():
        deviation = abs(run["propagations"] - run["expected_propagations"])
        assert deviation <= 4 * run["propagations_std"]
    labels = ["SGD", "SAM", "G-RST linear", *(f"RST {name}" for name in ("constant", "piecewise", "linear"))]
    for label in labels:
        assert f"| {label} " in markdown
    index = (results.parent / "README.md").read_text()
    for name in [*tables, *FIGURES, *RECORDS]:
        assert f"(quick/{name})" in index, name


@pytest.fixture
def planned(run_script, capsys):
    """`planned("--outputs", ...)` is the total of a plan: runs, done, failed, to do, steps, propagations."""

    def total(*arguments):
        capsys.readouterr()
        run_script("scripts/plan.py", "--images-per-second", "1000", *arguments, *SHORT)
        return [*map(int, capsys.readouterr().out.split("total")[1].split()[:6])]

    return total


def test_what_the_plan_foresaw_is_what_was_done(reproduced, planned):
    folder, _ = reproduced
    runs = read_runs(results_of(folder) / "runs.csv")
    steps, propagations = planned("--outputs", folder / "nothing")[4:]
    assert runs["steps"].sum() == steps
    assert abs(propagations - runs["propagations"].sum()) <= 4 * (runs["propagations_std"] ** 2).sum() ** 0.5
    assert planned("--outputs", folder / "outputs") == [14, 14, 0, 0, 0, 0]


def test_only_what_is_missing_is_run(again, run_script, capsys):
    outputs = again / "outputs"
    results = {path.parent.name: path.read_bytes() for path in outputs.glob("*/result.json")}
    lost = sorted(results)[3]
    shutil.rmtree(outputs / lost)
    run_script(*script(again, "--launcher", "basic"), *SHORT)  # the others were joblib's
    assert "14 runs, 1 of them to do" in capsys.readouterr().out
    for name, before in results.items():
        after = (outputs / name / "result.json").read_bytes()
        if name == lost:
            old, new = json.loads(before), json.loads(after)
            for figure in ("test_accuracy", "test_loss", "propagations"):
                assert new[figure] == old[figure]
        else:
            assert after == before


def test_from_the_records_alone_every_file_is_made_again_byte_for_byte(again, planned, run_script, capsys):
    results = results_of(again)
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    for name in before.keys() - set(RECORDS):
        (results / name).unlink()
    for folder in (again / "outputs").glob("digits*"):
        shutil.rmtree(folder)
    run_script(*script(again, "--reuse"), *SHORT)
    assert "14 runs, 0 of them to do" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before
    # Without REUSE they would be run.
    places = ["--outputs", again / "outputs", "--results", results.parent]
    assert planned(*places)[:4] == [14, 0, 0, 14]
    assert planned(*places, "--reuse")[:4] == [14, 14, 0, 0]


def test_collecting_runs_nothing(tmp_path, run_script, capsys):
    run_script(*script(tmp_path, "--collect"), *SHORT)
    assert "14 runs, 14 of them to do" in capsys.readouterr().out
    assert "not run" in (results_of(tmp_path) / "overview.md").read_text()
    assert not list((tmp_path / "outputs").glob("digits*"))


@pytest.mark.slow
def test_failing_runs_leave_the_others_and_the_table_says_so(again, run_script, capsys):
    """One that raises, one whose loss is not finite, one whose process is killed."""
    outputs = again / "outputs"
    broken = {}
    for method, seed in (("sgd", 0), ("sam", 1), ("grst", 0)):
        (folder,) = outputs.glob(f"*-{method}-*-s{seed}-*")
        shutil.rmtree(folder)
        broken[method] = folder.name
    # Every process of Python imports it at its start.
    hook = again / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'loky' not in ' '.join(sys.orig_argv) or 'tracker' in ' '.join(sys.orig_argv):\n"
        "    raise ImportError  # only for the processes that train\n"
        "import rst.training.loop as engine\n"
        "original = engine.Training.run\n"
        "def run(self, *arguments, **keywords):\n"
        "    gamma, p = self.optimizer.gamma, self.optimizer.schedule(0, 1)\n"
        "    if p == 0 and self.seed == 0 and 'Constant' in type(self.optimizer.schedule).__name__:\n"
        "        raise RuntimeError('the disk is on fire')\n"
        "    if p == 1 and self.seed == 1:\n"
        "        raise FloatingPointError('the loss is not finite at step 3')\n"
        "    if gamma != 1 and self.seed == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, *arguments, **keywords)\n"
        "engine.Training.run = run\n"
    )
    lost = list(outputs.glob("*-rst-linear-*"))
    for folder in lost:  # and two that are well
        shutil.rmtree(folder)
    done = command(sys.executable, *script(again), *SHORT, env={"PYTHONPATH": str(hook)})
    assert done.returncode == 1, done.stdout + done.stderr
    reasons = {
        "sgd": "RuntimeError: the disk is on fire",
        "sam": "the loss is not finite at step 3",
        "grst": "its process died",
    }
    markdown = (results_of(again) / "overview.md").read_text()
    for method, reason in reasons.items():
        assert re.search(rf"failed: .*method={method}.*{reason}", done.stderr), method
        assert reason in json.loads((outputs / broken[method] / "failed.json").read_text())["error"]
        assert reason in markdown
    assert all((folder / "result.json").exists() for folder in lost)
    run_script(*script(again, "--launcher", "basic"), *SHORT)  # without what made them fail
    assert "3 of them to do" in capsys.readouterr().out
    assert "failed" not in (results_of(again) / "overview.md").read_text()


@pytest.mark.slow
def test_a_row_of_which_all_runs_fail(tmp_path, run_script, capsys):
    short = [*SHORT[:2], "seed=0", "optimizer.lr=1e30", "clip_norm=null"]
    with pytest.raises(SystemExit) as ended:
        run_script(*script(tmp_path, "--launcher", "basic"), *short)
    assert ended.value.code == 1
    markdown = (results_of(tmp_path) / "overview.md").read_text()
    assert re.search(r"failed: method=\w+: the loss is \S+ at step", markdown)
    assert capsys.readouterr().err.count("failed: python train.py") == 7


def start(folder):
    arguments = [sys.executable, *map(str, script(folder)), *SHORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, **pipes)


def finished_runs(folder):
    return list((folder / "outputs").glob("*/result.json"))


@pytest.mark.slow
def test_a_killed_driver_loses_nothing_and_repeats_nothing(reproduced, tmp_path):
    """SIGKILL to the driver alone, early, in the middle of the runs, and late."""
    for n_finished in (0, 3, 8):
        driver = start(tmp_path)
        while len(finished_runs(tmp_path)) < n_finished:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.05)
        time.sleep(0.5 if n_finished else 3)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()  # ends when its processes, which hold its pipes, have ended too
    finished = {path: path.stat().st_mtime_ns for path in finished_runs(tmp_path)}
    done = reproduce(tmp_path)
    assert done.returncode == 0, done.stderr
    markdown = [(results_of(folder) / "overview.md").read_text() for folder in (tmp_path, reproduced[0])]
    assert without_times(markdown[0]) == without_times(markdown[1])
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written  # complete once, never again


@pytest.mark.slow
def test_two_drivers_at_once_share_the_runs(reproduced, tmp_path):
    drivers = [start(tmp_path) for _ in range(2)]
    outcomes = [driver.communicate(timeout=300) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outcomes
    # Each run was completed by one of them: a second completion would have kept the first's result.
    assert not list((tmp_path / "outputs").glob("*/result.json.old"))
    assert len(finished_runs(tmp_path)) == 14
    assert len(read_runs(results_of(tmp_path) / "runs.csv")) == 14
    markdown = [(results_of(folder) / "overview.md").read_text() for folder in (tmp_path, reproduced[0])]
    assert without_times(markdown[0]) == without_times(markdown[1])


@pytest.mark.slow
def test_streamed_images_under_joblib(tmp_path):
    """Its processes start the loader's."""
    for split, n in (("train", 4), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 40), (i * 50, 0, 0)).save(
                    tmp_path / "images" / split / name / f"{i}.png"
                )
    dataset = ["dataset=image_folder", f"dataset.root={tmp_path / 'images'}", "dataset.in_memory=false"]
    short = [
        *dataset,
        "dataset.workers=2",
        "augment=inception",
        "batch_size=4",
        "epochs=1",
        "model.width=4",
        "seed=0",
    ]
    done = reproduce(tmp_path, short=short)
    assert done.returncode == 0, done.stderr
    assert len(finished_runs(tmp_path)) == 7


@pytest.mark.slow
def test_submitit_runs_them_too(again, run_script, capsys):
    """Its local executor, as its Slurm one runs them on a cluster."""
    (lost,) = (again / "outputs").glob("*-sam-*-s1-*")
    before = json.loads((lost / "result.json").read_text())
    shutil.rmtree(lost)
    run_script(*script(again, "--launcher", "submitit_local"), *SHORT)
    assert "1 of them to do" in capsys.readouterr().out
    assert json.loads((lost / "result.json").read_text())["test_loss"] == before["test_loss"]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_ray_launcher") is None, reason="the extra ray is not there"
)
def test_ray_runs_them_too(again):
    (lost,) = (again / "outputs").glob("*-sam-*-s1-*")
    shutil.rmtree(lost)
    done = reproduce(again, "--launcher", "ray")
    assert done.returncode == 0 and (lost / "result.json").exists(), done.stderr


@pytest.mark.slow
def test_several_tables_and_settings_are_one_batch(tmp_path, run_script, capsys):
    where = script(tmp_path, "--table", "overview,methods", "--launcher", "basic")
    run_script(*where, "epochs=1", "model.width=4", "seed=0")
    # overview's 7; methods' 6 rows in 2 settings, of which 4 runs are overview's.
    assert "15 runs, 15 of them to do" in capsys.readouterr().out
    methods = (results_of(tmp_path) / "methods.md").read_text()
    assert "## digits_noisy / resnet8 / shift" in methods and "## digits / resnet8 / shift" in methods
    names = {path.name for path in results_of(tmp_path).iterdir()}
    assert {
        "methods.tex",
        "methods_digits-resnet8-shift.png",
        "methods_digits_noisy-resnet8-shift_curves.pdf",
    } <= names
    assert len(read_runs(results_of(tmp_path) / "runs.csv")) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "nothing"], "unknown table nothing: choose from constant, gamma"),
        (["--protocol", "nothing"], "choose from"),
    ],
)
def test_an_unknown_table_or_protocol_lists_the_choices(arguments, message, run_script, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script("scripts/reproduce.py", *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epoch=3"], "unknown setting 'epoch'; closest is epochs"),
        (["--launcher", "nothing"], "unknown hydra/launcher 'nothing': choose from basic, joblib"),
        (
            ["--results", "/dev/null/results"],
            "cannot write to /dev/null/results/quick (Not a directory); choose",
        ),
        (["schedule.p=0.1,0.2"], "only seed= may sweep here"),
        (["--launcher", "submitit_slurm"], "srun"),
    ],
)
def test_bad_input_is_one_line_and_runs_nothing(tmp_path, arguments, message, run_script, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(*script(tmp_path, *arguments), *SHORT)
    error = ended.value.code  # a text: Python prints it on stderr and exits with 1
    assert isinstance(error, str) and error.startswith("error: ") and message in error
    assert "\n" not in error and capsys.readouterr().err == ""
    assert not list(tmp_path.glob("outputs/digits*"))


def test_an_error_is_one_line_of_a_process_too(tmp_path):
    done = reproduce(tmp_path, "epoch=3")
    assert done.returncode == 1
    assert done.stderr == "error: unknown setting 'epoch'; closest is epochs\n"


def test_what_cannot_change_a_result_does_not_move_the_tables(tmp_path, run_script):
    """Overrides that shorten a table keep it from the place of the whole one; a device, say, does not."""
    run_script(*script(tmp_path, "--collect", "device=cpu", "--results", tmp_path / "given"))
    sys.path.insert(0, str(ROOT / "scripts"))
    import reproduce as driver

    kept = {"device=cpu", "tracker=wandb", "dataset.root=/data", "outputs=elsewhere"}
    assert {text for text in kept if text.split("=")[0] in driver.NOT_IDENTITY} == kept
    assert "epochs" not in driver.NOT_IDENTITY


def test_columns_that_differ_in_a_value_alone():
    sys.path.insert(0, str(ROOT / "scripts"))
    import reproduce as driver

    from rst.experiments.sweeps import Cell, TableRuns
    from rst.training.run import Run

    run = Run(Path(), {}, {"dataset": "digits", "model": "resnet8", "augment": "none"}, "")
    other = Run(Path(), {}, {"dataset": "digits", "model": "resnet8", "augment": "cutout"}, "")
    rows = {
        column: [(None, [Cell([], one)])] for column, one in ((("a=1",), run), (("a=2",), run), ((), other))
    }
    assert list(driver.column_names(TableRuns(None, rows)).values()) == [
        "digits / resnet8 / none / a=1",
        "digits / resnet8 / none / a=2",
        "digits / resnet8 / cutout",
    ]


def test_make_calls_the_scripts():
    def printed(*arguments):
        return " ".join(command("make", "--dry-run", *arguments).stdout.split())

    expected = (
        "scripts/reproduce.py --protocol quick --table overview --reuse --launcher joblib --jobs 3 epochs=1"
    )
    assert expected in printed("reproduce-tables", "JOBS=3", "REUSE=1", "ARGS=epochs=1")
    assert "--reuse" not in printed("reproduce-tables") and "--sharpness" not in printed("reproduce-tables")
    assert "--sharpness" in printed("reproduce-tables", "SHARPNESS=1")
    assert "--table pilot,schedules,constant,gamma --collect" in printed("tables", "PROTOCOL=cpu")
    assert "reproduce.py --protocol quick --table gamma --collect" in printed("tables", "TABLE=gamma")
    plan = "scripts/plan.py --protocol paper --table all --images-per-second 900"
    assert plan in printed("plan", "PROTOCOL=paper", "TABLE=all", "RATE=900")
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make lint test-all"
    assert Path(ROOT / "conf" / "columns").is_dir()
