"""From nothing to tables, from half of it, and what goes wrong on the way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT, command, wait_until
from PIL import Image

from rst.experiments.driver import reproduce

# Four rows (SGD, SAM, RST and G-RST), one seed: long enough to be interrupted, short enough for a test.
pytestmark = pytest.mark.slow  # the docs' commands, in tests/test_docs.py, run a driver too

TABLE = ["--table", "imagenet"]
SHORT = ["epochs=2", "model.width=4", "seed=0"]


def script(folder, *arguments):
    return ["scripts/reproduce.py", "--outputs", folder / "outputs", "--jobs", 2, *TABLE, *arguments]


def in_a_process(folder, *arguments, short=SHORT, **options):
    """As a user does; `run_script(*script(folder, ...), *SHORT)` is faster."""
    return command(sys.executable, *script(folder, *arguments), *short, **options)


def results_of(folder):
    return folder / "outputs" / "results" / "quick"


def finished_runs(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "outputs").glob("*/result.json")}


def losses(folder):
    return pd.read_csv(results_of(folder) / "runs.csv", index_col="id")["test_loss"].sort_index()


def lose(folder, pattern):
    (run,) = (folder / "outputs").glob(pattern)
    shutil.rmtree(run)
    return run


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The folder of a table, and what making it printed."""
    folder = tmp_path_factory.mktemp("reproduced")
    done = in_a_process(folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


@pytest.fixture
def again(reproduced, tmp_path):
    """A copy of it, to spoil."""
    shutil.copytree(reproduced[0], tmp_path / "again")
    return tmp_path / "again"


@pytest.fixture
def planned(run_script, capsys):
    """`planned("--outputs", ...)` is the total of a plan: runs, done, failed, to do, steps, propagations."""

    def total(*arguments):
        capsys.readouterr()
        run_script("scripts/plan.py", "--images-per-second", 1000, *TABLE, *arguments, *SHORT)
        return [*map(int, capsys.readouterr().out.split("total")[1].split()[:6])]

    return total


def test_from_nothing_to_a_table(reproduced):
    folder, printed = reproduced
    assert printed.startswith("4 runs, 4 to do\n[1/4, ")
    assert re.findall(r"^\[\d/4", printed, re.MULTILINE) == [f"[{i}/4" for i in range(1, 5)]
    assert re.search(r"^\[.*\] imagenet / SAM, seed 0: test accuracy \d\d\.\d\d %$", printed, re.MULTILINE)
    visible = {path.name for path in results_of(folder).glob("[!.]*")}
    assert visible == {"runs.csv", "curves.csv", "imagenet"}
    page = (results_of(folder) / "imagenet" / "README.md").read_text()
    assert page.partition("\n## ")[0] in printed
    for label in ("SGD", "SAM", "RST linear", "G-RST linear"):
        assert f"| {label} " in page
    assert len(losses(folder)) == 4


def test_the_plan_foresees_what_is_done(reproduced, planned):
    folder, _ = reproduced
    runs = pd.read_csv(results_of(folder) / "runs.csv")
    steps, propagations = planned("--outputs", folder / "nothing")[4:]
    assert runs["steps"].sum() == steps
    assert abs(propagations - runs["propagations"].sum()) <= 4 * (runs["propagations_std"] ** 2).sum() ** 0.5
    assert planned("--outputs", folder / "outputs") == [4, 4, 0, 0, 0, 0]


def test_only_what_is_missing_is_run(again, run_script, capsys):
    before = losses(again)
    lose(again, "*-sam-*")
    kept = finished_runs(again)
    run_script(*script(again, "--launcher", "basic"), *SHORT)  # the others were joblib's
    printed = capsys.readouterr().out
    assert printed.startswith("4 runs, 1 to do\n[4/4] imagenet / SAM, seed 0")
    assert finished_runs(again).items() >= kept.items()
    pd.testing.assert_series_equal(losses(again), before)


def test_from_the_records_alone_the_table_is_made_again(again, planned, run_script, capsys):
    results = results_of(again)
    before = {
        path: path.read_bytes() for path in results.rglob("*") if path.suffix in (".md", ".csv", ".json")
    }
    shutil.rmtree(results / "imagenet")
    for folder in (again / "outputs").glob("digits*"):
        shutil.rmtree(folder)
    run_script(*script(again, "--reuse", "--print"), *SHORT)
    assert "4 runs, 0 to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert (results / "imagenet" / "table.tex").exists()
    places = ["--outputs", again / "outputs", "--results", results.parent]
    assert planned(*places)[:4] == [4, 0, 0, 4]
    assert planned(*places, "--reuse")[:4] == [4, 4, 0, 0]


def test_records_stay_when_their_runs_are_repeated(again, run_script):
    """To compare a result of one's own with the record."""
    before = (results_of(again) / "runs.csv").read_bytes()
    (result,) = (again / "outputs").glob("*-sam-*/result.json")
    changed = json.loads(result.read_text()) | {"test_loss": 9.0, "finished": "2030-01-01T00:00:00+00:00"}
    result.write_text(json.dumps(changed))
    run_script(*script(again, "--reuse"), *SHORT)
    assert (results_of(again) / "runs.csv").read_bytes() == before
    run_script(*script(again), *SHORT)
    assert losses(again).eq(9.0).sum() == 1


def test_a_completed_run_counts_whatever_failed_before(again, run_script):
    """Its folder may have been copied over one in which it had failed."""
    (run,) = (again / "outputs").glob("*-sam-*")
    (run / "failed.json").write_text('{"error": "no data"}')
    run_script(*script(again, "--collect"), *SHORT)
    assert "no data" not in (results_of(again) / "imagenet" / "README.md").read_text()
    run_script(*script(again), *SHORT)


def test_tables_are_where_the_whole_ones_are_only_if_they_are_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def page(*overrides):
        before = {*tmp_path.rglob("README.md")}
        assert reproduce(["imagenet"], ROOT / "conf", "quick", overrides, only_collect=True) == {}
        (new,) = {*tmp_path.rglob("imagenet/README.md")} - before
        return new.relative_to(tmp_path).as_posix(), new.read_text()

    where, text = page("device=cpu", "checkpoint.every_epochs=2", "tracker=wandb", "tracker.mode=disabled")
    assert where == "results/quick/imagenet/README.md" and "not run" in text
    assert page("epochs=1")[0] == "outputs/results/quick/imagenet/README.md"
    (tmp_path / "outputs/results/quick/imagenet/README.md").unlink()
    assert page("rho=0.3")[0] == "outputs/results/quick/imagenet/README.md"
    assert not [*tmp_path.glob("outputs/digits*")]


def test_a_recorded_run_counts_whatever_failed_here_before(again, run_script):
    """In another attempt, say, that had no data."""
    run = next((again / "outputs").glob("digits*"))
    shutil.move(run / "result.json", run / "was.json")
    (run / "failed.json").write_text('{"error": "no data"}')
    run_script(*script(again, "--reuse"), *SHORT)
    assert "failed" not in (results_of(again) / "imagenet" / "README.md").read_text()


def test_if_all_runs_fail_the_tables_that_are_there_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reproduce(["imagenet"], ROOT / "conf", "quick", ["seed=0"], only_collect=True)
    (page,) = tmp_path.rglob("imagenet/README.md")
    before = page.read_text()

    def run_all(cells, *_):
        for cell in cells:
            cell.run.fail("no folder")

    monkeypatch.setattr("rst.experiments.driver.run_all", run_all)
    with pytest.raises(ValueError, match="no folder"):
        reproduce(["imagenet"], ROOT / "conf", "quick", ["seed=0"])
    assert page.read_text() == before


def test_failed_runs_leave_the_others_alone_and_are_named(again, run_script, capsys):
    """One that raises, one whose loss is not finite, one whose process is killed; and one that is well."""
    for method in ("sgd", "sam", "rst", "grst"):
        lose(again, f"*-{method}-*")
    # Every process of Python imports it at its start.
    (again / "hook").mkdir()
    (again / "hook" / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'LokyProcess' not in ' '.join(sys.orig_argv):\n"
        "    raise ImportError  # only for the processes that train\n"
        "import rst.training.fit as module\n"
        "original = module.fit\n"
        "def fit(run, *arguments, **keywords):\n"
        "    if run.choices['method'] == 'sgd':\n"
        "        raise RuntimeError('the disk is on fire')\n"
        "    if run.choices['method'] == 'sam':\n"
        "        raise FloatingPointError('the loss is not finite at step 3')\n"
        "    if run.choices['method'] == 'grst':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(run, *arguments, **keywords)\n"
        "module.fit = fit\n"
    )
    done = in_a_process(again, env={"PYTHONPATH": str(again / "hook")})
    assert done.returncode == 1, done.stdout + done.stderr
    reasons = {
        "sgd": "RuntimeError: the disk is on fire",
        "sam": "the loss is not finite at step 3",
        "grst": "its process was killed",
    }
    path = results_of(again) / "imagenet" / "README.md"
    page = path.read_text()
    assert len(re.findall(r"^\[.*\] imagenet / .*: FAILED: ", done.stdout, re.MULTILINE)) == 3
    for method, reason in reasons.items():
        assert re.search(rf"^failed: python train.py .*method={method}.*{reason}", done.stderr, re.MULTILINE)
        assert reason in page
    assert [path.parent.name.split("-")[3] for path in finished_runs(again)] == ["rst"]
    run_script(*script(again, "--collect"), *SHORT)
    assert path.read_text() == page  # not made of the records of when they had not failed
    capsys.readouterr()
    run_script(*script(again, "--launcher", "basic"), *SHORT)  # without what made them fail
    assert "3 to do" in capsys.readouterr().out
    assert "failed" not in path.read_text().lower()


@pytest.fixture
def start(start_process):
    def start(folder, *arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return start_process([sys.executable, *script(folder, *arguments), *SHORT], env=environment, **pipes)

    return start


@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_a_driver_that_ends_early_loses_and_repeats_nothing(reproduced, tmp_path, how, run_script, start):
    driver = start(tmp_path)
    wait_until(lambda: finished_runs(tmp_path) or driver.poll() is not None, seconds=300)
    assert driver.poll() is None, driver.communicate()
    if how == "killed":
        driver.kill()
        driver.communicate(timeout=300)  # ends when its processes, which hold its pipes, have ended too
    else:
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        printed, errors = driver.communicate(timeout=300)
        assert (driver.returncode, errors) == (130, "")
        assert "interrupted: repeat the command to resume\n" in printed
    kept = finished_runs(tmp_path)
    run_script(*script(tmp_path, "--launcher", "basic"), *SHORT)
    assert finished_runs(tmp_path).items() >= kept.items()
    pd.testing.assert_series_equal(losses(tmp_path), losses(reproduced[0]))


ORPHAN = """
import multiprocessing, os, time
from rst.experiments.command_line import end_with_parent

def work():
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.05)
    end_with_parent()
    time.sleep(100)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    os._exit(0)
"""


def test_a_process_that_begins_after_its_driver_was_killed_ends(tmp_path):
    (tmp_path / "driver.py").write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Returns when all that hold its pipes have ended.
    subprocess.run([sys.executable, tmp_path / "driver.py"], env=environment, capture_output=True, timeout=60)


def test_two_drivers_at_once_share_the_runs(reproduced, tmp_path, start):
    drivers = [start(tmp_path, "--launcher", "basic") for _ in range(2)]
    outcomes = [driver.communicate(timeout=300) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outcomes
    # Each run was completed by one of them: a second completion would have kept the first's result.
    assert not list((tmp_path / "outputs").glob("*/result.json.old"))
    pd.testing.assert_series_equal(losses(tmp_path), losses(reproduced[0]))


def test_claims_and_strength_are_of_all_tables(tmp_path, capsys):
    """A command for some of them leaves the figure of all alone."""
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results" / "quick", results / "quick")
    figure = results / "quick" / "strength.png"
    before = figure.read_bytes()

    def printed(*tables):
        settings = {"outputs": tmp_path, "results": results, "only_collect": True, "reuse": True}
        reproduce(tables, ROOT / "conf", "quick", **settings)
        return capsys.readouterr().out

    assert "claims not tested: they need label_noise, too" in printed("budget")
    text = printed("label_noise", "budget")
    assert "claims tested" in text and "strength.png not redrawn: it needs overview, rivals, too" in text
    assert figure.read_bytes() == before
    for other in ("overview", "rivals"):
        shutil.rmtree(results / "quick" / other)
    assert "strength.png" not in printed("label_noise", "budget") and figure.read_bytes() != before


def test_streamed_images_under_joblib(tmp_path, run_script, capsys):
    """Its processes start the loader's. The records need no images."""
    for split, n in (("train", 4), ("test", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 40), (i * 50, 0, 0)).save(folder / f"{i}.png")
    short = ["dataset=image_folder", f"dataset.root={tmp_path / 'images'}", "dataset.in_memory=false"]
    short += ["dataset.workers=2", "augment=inception", "batch_size=4", "epochs=1", "model.width=4", "seed=0"]
    done = in_a_process(tmp_path, short=short)
    assert done.returncode == 0, done.stderr
    assert len(finished_runs(tmp_path)) == 4
    shutil.rmtree(tmp_path / "images")
    run_script(*script(tmp_path, "--reuse"), *short)
    assert "4 runs, 0 to do" in capsys.readouterr().out


def test_submitit_and_its_settings(again, run_script, capsys):
    """Its local executor, as its Slurm one runs them on a cluster."""
    before = losses(again)
    lose(again, "*-sam-*")
    run_script(*script(again, "--launcher", "submitit_local", "hydra.launcher.timeout_min=5"), *SHORT)
    assert "1 to do" in capsys.readouterr().out
    pd.testing.assert_series_equal(losses(again), before)


def test_a_tracked_tables_runs_are_a_group_and_the_table_is_logged(tmp_path, run_script):
    tracker = ["tracker=wandb", "tracker.mode=offline"]
    run_script(*script(tmp_path, "--launcher", "basic"), *tracker, *SHORT)
    assert len([*tmp_path.glob("outputs/digits*/wandb/offline-run-*")]) == 4
    (logged,) = tmp_path.glob("outputs/.wandb/quick-imagenet/wandb/offline-run-*/*.wandb")
    # A process of W&B's writes it. In a run's file it can only be the group.
    for file in (logged, *tmp_path.glob("outputs/digits*/wandb/offline-run-*/*.wandb")):
        wait_until(lambda file=file: b"imagenet" in file.read_bytes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "nothing"], "unknown table nothing: choose from "),
        (["--protocol", "nothing"], "choose from"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_unknown_arguments_list_the_choices(arguments, message, run_script, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script("scripts/reproduce.py", *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epoch=3"], "epoch"),
        (["--launcher", "nothing"], "joblib"),
        (["--results", "/dev/null/results"], "cannot write to /dev/null/results/quick (Not a directory)"),
        (["schedule.p=0.1,0.2"], "only seed= may sweep here"),
        (["--launcher", "submitit_slurm"], "srun"),
        (["hydra.launcher.partition=gpu"], "partition"),  # joblib has none
    ],
)
def test_bad_input_is_one_line_and_runs_nothing(tmp_path, arguments, message, run_script, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(*script(tmp_path, *arguments), *SHORT)
    error = ended.value.code  # a text: Python prints it on stderr and exits with 1
    assert isinstance(error, str) and error.startswith("error: ") and message in error
    assert "\n" not in error and capsys.readouterr().err == ""
    assert not list(tmp_path.glob("outputs/digits*"))


def test_make_calls_the_scripts():
    def printed(*arguments):
        return " ".join(command("make", "--dry-run", *arguments).stdout.split())

    expected = (
        "scripts/reproduce.py --protocol quick --table overview --reuse --launcher joblib --jobs 3 epochs=1"
    )
    assert expected in printed("reproduce-tables", "JOBS=3", "REUSE=1", "ARGS=epochs=1")
    options = printed("reproduce-tables", "SHARPNESS=1", "PRINT=1")
    assert "--sharpness" in options and "--print" in options and "--reuse" not in options
    assert "--table pilot,schedules,constant,gamma --collect" in printed("tables", "PROTOCOL=cpu")
    assert "reproduce.py --protocol quick --table gamma --collect" in printed("tables", "TABLE=gamma")
    plan = "scripts/plan.py --protocol paper --table all --images-per-second 900"
    assert plan in printed("plan", "PROTOCOL=paper", "TABLE=all", "RATE=900")
