"""What the trackers write is read back, and nothing that happens to them can harm a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from rst.training.tracking import TensorBoard, Tracker, Wandb, log_table

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


def with_error(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"test_error_percent": 100 * (1 - row["test_accuracy"])}


def run_in(folder: Path) -> dict[str, Any]:
    labels = {"run_name": folder.name, "group": "quick", "job_type": "sam", "tags": ["sam"]}
    return labels | {"folder": folder, "config": {"method": {"name": "sam", "rho": 0.1}}}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "rst.training.tracking" and r.levelno >= 30]


def wandb_records(folder: Path) -> dict[str, list[Any]]:
    """The records of the folder's only W&B run, in order, by type."""
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
    """The run's final summary, without the keys that W&B adds."""
    updates = (record["update"].items() for record in records["summary"])
    return {k: v for update in updates for k, v in update if k[0] != "_"}


def python(script: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user with no W&B key, settings or variables but those given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    clean |= {"HOME": str(home), "WANDB_CONFIG_DIR": str(home)} | environment
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean, cwd=home
    )


def test_wandb_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Wandb(**run_in(tmp_path), project="a-project", mode="offline") as t:
        for row in ROWS:
            t.log(row)
        t.summary(RESULT)
    assert capfd.readouterr() == ("", "")
    records = wandb_records(tmp_path)
    assert history(records) == [with_error(row) for row in ROWS]
    assert [(m["glob_name"], m["step_metric"]) for m in records["metric"]] == [("*", "epoch")]
    (run,), (end,) = records["run"], records["exit"]
    assert (run["project"], run["display_name"], run["tags"]) == ("a-project", tmp_path.name, ["sam"])
    assert (run["run_group"], run["job_type"], end["exit_code"]) == ("quick", "sam", 0)
    assert run["config"]["update"]["method"] == {"name": "sam", "rho": 0.1}
    derived = {"test_error_percent": 25.0, "best_epoch_error_percent": 12.5, "eta": 1.5, "eta_expected": 1.55}
    assert summary(records) == ROWS[-1] | RESULT | derived


def test_sweep_jobs_have_separate_wandb_runs_and_a_failed_job_is_marked(
    tmp_path: Path, run_train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process, the diverging job first: nothing of it may reach the other's run."""
    command = ["-m", "protocol=quick", "epochs=2", "method=sgd", "clip_norm=null", "seed=0"]
    lrs, table = "optimizer.lr=1e30,0.1", "tracker.run_group=a-table"
    for name, value in {"HOME": str(tmp_path), "WANDB_MODE": "offline", "WANDB_RUN_ID": "same"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="the loss is nan at step 1"):
        run_train(*command, lrs, "tracker=wandb", table, f"outputs={tmp_path / 'out'}")
    assert "Traceback" not in capsys.readouterr().err
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


def test_a_run_left_open_does_not_receive_the_next_runs_metrics(tmp_path: Path) -> None:
    left_open = Wandb(**run_in(tmp_path / "a"), mode="offline").__enter__()
    left_open.log(ROWS[0])
    with Wandb(**run_in(tmp_path / "b"), mode="offline") as t:
        t.log(ROWS[1])
    for name, row in zip("ab", ROWS, strict=False):
        assert history(wandb_records(tmp_path / name)) == [with_error(row)]


@pytest.fixture
def table_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # W&B copies an artifact's files to it
    (tmp_path / "overview" / "noise").mkdir(parents=True)
    names = ("README.md", "table.csv", "forest.png", "noise/forest.png")
    files = [tmp_path / "overview" / name for name in names]
    files[0].write_text("the table")
    files[1].write_text("label,mean,note\nSGD,4.5,\nSAM,,best\n")
    for width, file in enumerate(files[2:], 3):
        Image.new("RGB", (width, 3)).save(file)
    return files


def test_a_table_is_one_run_of_its_group_with_all_its_files(table_files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "table"
    log_table(table_files, name="quick-overview", group="overview", folder=folder, mode="offline")
    records = wandb_records(folder)
    (run,), (end,) = records["run"], records["exit"]
    assert (run["display_name"], run["run_group"]) == ("quick-overview", "overview")
    assert (run["job_type"], end["exit_code"]) == ("table", 0)
    (artifact,) = (a for a in records["artifact"] if a["type"] == "table")
    assert artifact["name"] == "quick-overview" and artifact["finalize"]
    copies = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    contents = {file.relative_to(tmp_path / "overview").as_posix(): file.read_bytes() for file in table_files}
    assert {name: path.read_bytes() for name, path in copies.items()} == contents
    images = {path.read_bytes() for path in folder.glob("wandb/offline-run-*/files/media/images/**/*.png")}
    assert images == {contents["forest.png"], contents["noise/forest.png"]}
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/table/*.json")
    rows = [["SGD", 4.5, None], ["SAM", None, "best"]]
    assert json.loads(table.read_text()) == {"columns": ["label", "mean", "note"], "data": rows}


def test_a_table_that_cannot_be_logged_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_table([Path("missing.csv")], name="t", group="g", folder=tmp_path, mode="offline")
    assert [w.split(": ")[0] for w in warnings_of(caplog)] == ["Wandb stopped logging, the run goes on"]
    assert [record["exit_code"] for record in wandb_records(tmp_path)["exit"]] == [1]


def test_wandb_mode_follows_key_and_variable_and_never_asks(tmp_path: Path) -> None:
    script = """
import os
from pathlib import Path
from rst.training.tracking import Wandb
def log(name, mode):
    with Wandb(run_name=name, group="g", folder=Path(name), mode=mode) as t:
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
from rst.training.tracking import Wandb
for folder in "a", "a", "b":
    with Wandb(run_name="same", group="g", folder=Path(folder), init_timeout=1) as t:
        t.log({"epoch": 0, "propagations": 7})
        t.summary({"test_accuracy": 0.75})
    print("done")
"""
    key = "0123456789abcdef" * 2 + "01234567"
    run = python(script, tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")
    assert run.stdout == "done\n" * 3
    warnings = run.stderr.splitlines()
    assert len(warnings) == 3
    assert all(w.startswith("Wandb stopped logging, the run goes on: ") for w in warnings)
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
def test_a_broken_tracker_warns_once_and_falls_silent(
    hook: str, calls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Broken(hook, OSError("disk full\nand more"), **run_in(tmp_path)) as t:
        t.log(ROWS[0])
        t.log(ROWS[1])
        t.summary({})
    assert t.calls == calls
    assert warnings_of(caplog) == ["Broken stopped logging, the run goes on: OSError: disk full"]


def test_an_interrupt_while_logging_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Broken("log", KeyboardInterrupt(), **run_in(tmp_path)) as t:
        t.log(ROWS[0])


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_and_a_resumed_run_replaces_the_epochs_it_repeats(tmp_path: Path) -> None:
    with TensorBoard(**run_in(tmp_path)) as t:
        for row in ROWS:
            t.log(row | {"note": "text is left out"})
    scalars = tensorboard_scalars(tmp_path)
    assert scalars.keys() == {"propagations", "lr", "train_loss", "test_accuracy"}
    assert scalars["propagations"] == [(1, 150), (2, 300), (3, 450)]
    with TensorBoard(**run_in(tmp_path)) as t:
        for epoch in (3, 4):
            t.log({"epoch": epoch, "test_accuracy": 0.25})
    assert tensorboard_scalars(tmp_path)["test_accuracy"] == [(1, 0.5), (2, 0.625), (3, 0.25), (4, 0.25)]


def test_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[tensorboard\]'"):
        TensorBoard(**run_in(tmp_path))


def test_wandb_refuses_an_unknown_mode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of auto, online, offline, disabled, got 'ofline'"):
        Wandb(**run_in(tmp_path), mode="ofline")


def test_services_are_imported_only_when_used() -> None:
    script = "import sys, rst.training.tracking as _; print({'wandb', 'tensorboard'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.stem)
def test_every_config_node_builds(path: Path, tmp_path: Path) -> None:
    assert isinstance(instantiate(OmegaConf.load(path))(**run_in(tmp_path)), Tracker)
