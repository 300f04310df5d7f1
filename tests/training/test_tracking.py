"""The sinks: what they write is read back, and nothing that they do can harm a run."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from rst.training.tracking import NoTracker, TensorBoard, Tracker, Wandb, log_table

NODES = sorted(Path(__file__).parents[2].glob("conf/tracker/*.yaml"))
ROWS = [
    {"epoch": e, "propagations": 150 * e, "lr": 0.1, "train_loss": 2 / e, "test_accuracy": 0.375 + e / 8}
    for e in (1, 2, 3)
]
RESULT = {
    "steps": 300,
    "propagations": 450,
    "expected_propagations": 465.0,
    "test_accuracy": 0.75,
    "best_test_accuracy": 0.875,
    "seconds": {"train": 8.5},
}


def as_logged(row: dict[str, Any]) -> dict[str, Any]:
    """The row as W&B is to get it: with the error, and with what is drawn over propagations."""
    headline = {"test_error_percent": 100 * (1 - row["test_accuracy"])}
    headline |= {key: row[key] for key in ("train_loss", "test_accuracy")}
    return row | headline | {f"by_propagations/{key}": value for key, value in headline.items()}


def run_in(folder: Path, **changes: Any) -> dict[str, Any]:
    labels = {"run_name": folder.name, "group": "quick", "job_type": "sam", "tags": ["sam"]}
    return labels | {"folder": folder, "config": {"method": {"name": "sam", "rho": 0.1}}} | changes


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "rst.training.tracking" and r.levelno >= 30]


def wandb_records(folder: Path) -> dict[str, list[Any]]:
    """The records of the folder's only W&B run by type, each type's in order."""
    (run,) = (folder / "wandb").glob("*run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records: dict[str, list[Any]] = {}
    for record in map(json.loads, lines):
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def history(records: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The logged rows, without the keys that W&B adds."""
    return [{k: v for k, v in record["item"].items() if k[0] != "_"} for record in records.get("history", [])]


def summary(records: dict[str, list[Any]]) -> dict[str, Any]:
    """The run's summary as it ends, without the keys that W&B adds."""
    updates = (record["update"].items() for record in records["summary"])
    return {k: v for update in updates for k, v in update if k[0] != "_"}


def python(script: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user who has no W&B key, settings or variables but those given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    clean |= {"HOME": str(home), "WANDB_CONFIG_DIR": str(home)} | environment
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean, cwd=home
    )


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    with NoTracker(**run_in(tmp_path)) as t:
        t.log(ROWS[0])
        t.summary(RESULT)
    assert not list(tmp_path.iterdir())


def test_wandb_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Wandb(**run_in(tmp_path), project="a-project", mode="offline") as t:
        for row in ROWS:
            t.log(row)
        t.summary(RESULT)
    assert capfd.readouterr() == ("", "")
    records = wandb_records(tmp_path)
    assert history(records) == [as_logged(row) for row in ROWS]
    (run,) = records["run"]
    assert run["project"] == "a-project"
    assert (run["display_name"], run["tags"]) == (tmp_path.name, ["sam"])
    assert (run["run_group"], run["job_type"]) == ("quick", "sam")
    assert run["config"]["update"]["method"] == {"name": "sam", "rho": 0.1}
    assert [record["exit_code"] for record in records["exit"]] == [0]


def test_wandb_draws_metrics_over_epochs_and_headlines_over_propagations_too(tmp_path: Path) -> None:
    with Wandb(**run_in(tmp_path), mode="offline") as t:
        t.log(ROWS[0])
    defined = wandb_records(tmp_path)["metric"]
    axes = {m.get("glob_name", m.get("name")): m.get("step_metric") for m in defined}
    headline = ("test_error_percent", "test_accuracy", "test_loss", "train_loss")
    over_propagations = {f"by_propagations/{name}": "propagations" for name in headline}
    assert axes == {"epoch": None, "*": "epoch"} | over_propagations


def test_wandb_summary_holds_the_result_with_errors_and_propagations_a_step(tmp_path: Path) -> None:
    with Wandb(**run_in(tmp_path), mode="offline") as t:
        t.log(ROWS[0])
        t.summary(RESULT)
    found = summary(wandb_records(tmp_path))
    derived = {"test_error_percent": 25.0, "best_epoch_error_percent": 12.5, "eta": 1.5, "eta_expected": 1.55}
    logged = {key: ROWS[0][key] for key in ("epoch", "lr", "train_loss")}  # and nothing of by_propagations
    assert found == logged | RESULT | derived


def fail_after_an_epoch(tracker: Tracker) -> None:
    with tracker as t:
        t.log(ROWS[0])
        raise ZeroDivisionError


def test_a_failed_run_is_marked_failed_and_its_error_is_left_to_the_caller(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_after_an_epoch(Wandb(**run_in(tmp_path), mode="offline"))
    assert capfd.readouterr() == ("", "")
    records = wandb_records(tmp_path)
    assert [record["exit_code"] for record in records["exit"]] == [1]
    assert history(records) == [as_logged(ROWS[0])]


def test_wandb_runs_of_one_process_do_not_merge(tmp_path: Path) -> None:
    left_open = Wandb(**run_in(tmp_path / "a"), mode="offline").__enter__()
    left_open.log(ROWS[0])
    with Wandb(**run_in(tmp_path / "b"), mode="offline", run_group="mine") as t:
        t.log(ROWS[1])
    a, b = wandb_records(tmp_path / "a"), wandb_records(tmp_path / "b")
    assert (history(a), history(b)) == ([as_logged(ROWS[0])], [as_logged(ROWS[1])])
    assert a["run"][0]["run_id"] != b["run"][0]["run_id"]
    assert (a["run"][0]["run_group"], b["run"][0]["run_group"]) == ("quick", "mine")


def test_jobs_of_a_sweep_are_runs_of_their_own_and_a_failed_one_is_marked(
    tmp_path: Path, run_train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process, the diverging job first: nothing of it may reach the other's run."""
    command = ["-m", "protocol=quick", "epochs=2", "method=sgd", "clip_norm=null", "seed=0"]
    lrs, table = "optimizer.lr=1e30,0.1", "tracker.run_group=a-table"
    for name, value in {"HOME": str(tmp_path), "WANDB_MODE": "offline", "WANDB_RUN_ID": "same"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="the loss is nan at step 1"):
        run_train(*command, lrs, "tracker=wandb", table, f"outputs={tmp_path / 'out'}")
    assert "error in" in capsys.readouterr().out
    ends, ids = {}, set()
    for folder in (tmp_path / "out").glob("digits*"):
        records = wandb_records(folder)
        (run,), (end,) = records["run"], records["exit"]
        assert (run["display_name"], run["run_group"], run["job_type"]) == (folder.name, "a-table", "sgd")
        assert run["config"]["update"]["choices"]["schedule"] == "constant"
        ids.add(run["run_id"])
        lr = run["config"]["update"]["optimizer"]["lr"]
        ends[lr] = (end["exit_code"], [row["epoch"] for row in history(records)])
    assert ends == {1e30: (1, []), 0.1: (0, [1, 2])} and len(ids) == 2


@pytest.fixture
def table_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # W&B copies an artifact's files to it
    files = [tmp_path / f"overview.{suffix}" for suffix in ("md", "csv", "tex", "png", "pdf")]
    for file in files:
        file.write_text(f"the {file.suffix}")
    files[1].write_text("label,mean,note\nSGD,4.5,\nSAM,,best\n")
    Image.new("RGB", (4, 3)).save(files[3])
    return files


def test_a_table_is_one_run_of_its_group_with_all_its_files(table_files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "table"
    log_table(
        table_files, name="quick-overview", group="overview", folder=folder, project="p", mode="offline"
    )
    records = wandb_records(folder)
    (run,), (end,) = records["run"], records["exit"]
    assert (run["project"], run["display_name"], run["run_group"]) == ("p", "quick-overview", "overview")
    assert (run["job_type"], end["exit_code"]) == ("table", 0)
    (artifact,) = (a for a in records["artifact"] if a["type"] == "table")
    assert artifact["name"] == "quick-overview" and artifact["finalize"]
    kept = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    contents = {file.name: file.read_bytes() for file in table_files}
    assert {name: path.read_bytes() for name, path in kept.items()} == contents
    (image,) = folder.glob("wandb/offline-run-*/files/media/images/figure/*.png")
    assert image.read_bytes() == contents["overview.png"]
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/table/*.json")
    rows = [["SGD", 4.5, None], ["SAM", None, "best"]]
    assert json.loads(table.read_text()) == {"columns": ["label", "mean", "note"], "data": rows}
    assert {key.split(".")[0] for key in summary(records)} == {"figure/overview", "table/overview"}
    assert "metric" not in records


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (
            {"files": [Path("gone.csv")]},
            "WandbTable stopped logging, the run goes on: ValueError: Path is not",
        ),
        ({"name": "a b"}, "WandbTable stopped logging, the run goes on: ValueError: Artifact name"),
        ({"mode": "ofline"}, "the table is not logged: W&B's mode is one of"),
    ],
    ids=["file", "name", "mode"],
)
def test_a_table_that_cannot_be_logged_costs_a_warning(
    changes: dict[str, Any],
    cause: str,
    table_files: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {"files": table_files, "name": "t", "group": "g", "folder": tmp_path / "t", "mode": "offline"}
    log_table(**given | changes)
    (warning,) = warnings_of(caplog)
    assert warning.startswith(cause)
    if "mode" not in changes:
        assert [record["exit_code"] for record in wandb_records(tmp_path / "t")["exit"]] == [1]


def test_wandb_mode_follows_key_and_variable_and_never_asks(tmp_path: Path) -> None:
    script = """
import os
from pathlib import Path
from rst.training.tracking import Wandb
def log(name, mode):
    run = {"run_name": name, "group": "g", "tags": [], "folder": Path(name), "config": {}}
    with Wandb(**run, mode=mode) as t:
        t.log({"epoch": 0, "propagations": 7})
log("auto without key", "auto")
log("online without key", "online")
os.environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}
log("auto with variable", "auto")
"""
    run = python(script, tmp_path)
    for name in ("auto without key", "auto with variable"):
        assert history(wandb_records(tmp_path / name)) == [{"epoch": 0, "propagations": 7}]
    assert run.stdout == ""
    (warning,) = run.stderr.splitlines()
    assert warning.startswith("Wandb stopped logging, the run goes on: ")
    assert "run `wandb login`" in warning


def test_an_unreachable_server_costs_a_warning_and_no_key_is_written(tmp_path: Path) -> None:
    """Nobody listens on port 9 of this machine. Resumed in its folder, a run asks for its W&B run again."""
    script = """
from pathlib import Path
from rst.training.tracking import Wandb, log_table
for folder in "a", "a", "b":
    run = {"run_name": "same", "group": "g", "tags": [], "folder": Path(folder), "config": {}}
    with Wandb(**run, init_timeout=1) as t:
        t.log({"epoch": 0, "propagations": 7})
        t.log({"epoch": 1, "propagations": 14})
        t.summary({"test_accuracy": 0.75})
    print("done")
log_table([], name="t", group="g", folder=Path("t"), init_timeout=1)
"""
    key = "0123456789abcdef" * 2 + "01234567"
    run = python(script, tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")
    assert run.stdout == "done\n" * 3
    warnings = run.stderr.splitlines()
    assert len(warnings) == 4
    assert warnings[0].startswith("Wandb stopped logging, the run goes on: CommError: ")
    assert warnings[3].startswith("WandbTable stopped logging, the run goes on: CommError: ")
    first, second = ({f.name[-8:] for f in (tmp_path / name).glob("wandb/run-*")} for name in "ab")
    assert len(first) == len(second) == 1
    assert first != second
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and key.encode() in f.read_bytes()]


class Broken(Tracker):
    """Raises in one hook, and records which hooks were called."""

    def __init__(self, hook: str, error: BaseException, **run: Any) -> None:
        super().__init__(**run)
        self.calls: list[str] = []
        for name in ("start", "log", "summary", "finish"):
            setattr(self, f"_{name}", lambda *_args, name=name: self.call(name, hook, error))

    def call(self, name: str, hook: str, error: BaseException) -> None:
        self.calls.append(name)
        if name == hook:
            raise error


@pytest.mark.parametrize(
    ("hook", "calls"),
    [
        ("start", ["start", "finish"]),
        ("log", ["start", "log", "finish"]),
        ("summary", ["start", "log", "log", "summary", "finish"]),
        ("finish", ["start", "log", "log", "summary", "finish"]),
    ],
)
def test_a_broken_sink_warns_once_and_falls_silent(
    hook: str, calls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Broken(hook, OSError("disk full\nand more"), **run_in(tmp_path)) as t:
        t.log(ROWS[0])
        t.log(ROWS[1])
        t.summary({})
    assert t.calls == calls
    assert warnings_of(caplog) == ["Broken stopped logging, the run goes on: OSError: disk full"]


def test_an_interrupt_is_not_a_sinks_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Broken("log", KeyboardInterrupt(), **run_in(tmp_path)) as t:
        t.log(ROWS[0])


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    with TensorBoard(**run_in(tmp_path)) as t:
        for row in ROWS:
            t.log(row | {"note": "text is left out"})
    scalars = tensorboard_scalars(tmp_path)
    assert scalars.keys() == {"propagations", "lr", "train_loss", "test_accuracy"}
    assert scalars["propagations"] == [(1, 150), (2, 300), (3, 450)]
    assert scalars["test_accuracy"] == [(1, 0.5), (2, 0.625), (3, 0.75)]
    with TensorBoard(**run_in(tmp_path)) as t:
        for epoch in (3, 4):
            t.log({"epoch": epoch, "test_accuracy": 0.25})
    assert tensorboard_scalars(tmp_path)["test_accuracy"] == [(1, 0.5), (2, 0.625), (3, 0.25), (4, 0.25)]


def test_tensorboard_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"needs the tensorboard package: pip install -e '.\[tensorboard\]'"):
        TensorBoard(**run_in(tmp_path))


def test_wandb_refuses_an_unknown_mode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of auto, online, offline, disabled, got 'ofline'"):
        Wandb(**run_in(tmp_path), mode="ofline")


def test_a_sink_is_imported_only_when_used() -> None:
    script = "import sys, rst.training.tracking as _; print({'wandb', 'tensorboard'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.stem)
def test_every_config_node_builds(path: Path, tmp_path: Path) -> None:
    assert isinstance(instantiate(OmegaConf.load(path))(**run_in(tmp_path)), Tracker)
    assert not logging.getLogger("rst.training.tracking").handlers
