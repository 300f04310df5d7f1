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

from rst.tracking import NoTracker, TensorBoard, Tracker, Wandb

NODES = sorted(Path(__file__).parents[1].glob("conf/tracker/*.yaml"))
ROWS = [{"epoch": e, "propagations": 150 * (e + 1), "test_accuracy": 0.5 + e / 8} for e in range(3)]


def run_in(folder: Path, **changes: Any) -> dict[str, Any]:
    identity = {"run_name": folder.name, "group": "quick", "tags": ["sam"], "folder": folder}
    return identity | {"config": {"method": {"name": "sam", "rho": 0.1}}} | changes


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "rst.tracking" and r.levelno >= 30]


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
    return [{k: v for k, v in record["item"].items() if k[0] != "_"} for record in records["history"]]


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
        t.summary({"test_accuracy_last": 0.75})
    assert not list(tmp_path.iterdir())


def test_wandb_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Wandb(**run_in(tmp_path), project="a-project", mode="offline") as t:
        for row in ROWS:
            t.log(row)
        t.summary({"test_accuracy_last": 0.75, "sam_steps": 40})
    assert capfd.readouterr() == ("", "")
    records = wandb_records(tmp_path)
    assert history(records) == ROWS
    (run,) = records["run"]
    assert run["project"] == "a-project"
    assert (run["display_name"], run["run_group"], run["tags"]) == (tmp_path.name, "quick", ["sam"])
    assert run["config"]["update"]["method"] == {"name": "sam", "rho": 0.1}
    axes = {m.get("glob_name", m.get("name")): m.get("step_metric") for m in records["metric"]}
    assert axes == {"epoch": None, "*": "epoch"}
    summary: dict[str, Any] = {}
    for record in records["summary"]:
        summary |= record["update"]
    assert (summary["test_accuracy_last"], summary["sam_steps"]) == (0.75, 40)
    assert [record["exit_code"] for record in records["exit"]] == [0]


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
    assert history(records) == ROWS[:1]


def test_wandb_runs_of_one_process_do_not_merge(tmp_path: Path) -> None:
    left_open = Wandb(**run_in(tmp_path / "a"), mode="offline").__enter__()
    left_open.log(ROWS[0])
    with Wandb(**run_in(tmp_path / "b"), mode="offline", run_group="mine") as t:
        t.log(ROWS[1])
    a, b = wandb_records(tmp_path / "a"), wandb_records(tmp_path / "b")
    assert (history(a), history(b)) == ([ROWS[0]], [ROWS[1]])
    assert (a["run"][0]["run_group"], b["run"][0]["run_group"]) == ("quick", "mine")


def test_wandb_mode_follows_key_and_variable_and_never_asks(tmp_path: Path) -> None:
    script = """
import os
from pathlib import Path
from rst.tracking import Wandb
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
from rst.tracking import Wandb
for folder in "a", "a", "b":
    run = {"run_name": "same", "group": "g", "tags": [], "folder": Path(folder), "config": {}}
    with Wandb(**run, init_timeout=1) as t:
        t.log({"epoch": 0, "propagations": 7})
        t.log({"epoch": 1, "propagations": 14})
        t.summary({"test_accuracy_last": 0.75})
    print("done")
"""
    key = "0123456789abcdef" * 2 + "01234567"
    run = python(script, tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")
    assert run.stdout == "done\n" * 3
    warnings = run.stderr.splitlines()
    assert len(warnings) == 3
    assert warnings[0].startswith("Wandb stopped logging, the run goes on: CommError: ")
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
    assert tensorboard_scalars(tmp_path) == {
        "propagations": [(0, 150), (1, 300), (2, 450)],
        "test_accuracy": [(0, 0.5), (1, 0.625), (2, 0.75)],
    }
    with TensorBoard(**run_in(tmp_path)) as t:
        for epoch in (2, 3):
            t.log({"epoch": epoch, "test_accuracy": 0.25})
    assert tensorboard_scalars(tmp_path)["test_accuracy"] == [(0, 0.5), (1, 0.625), (2, 0.25), (3, 0.25)]


def test_tensorboard_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"needs the tensorboard package: pip install -e '.\[tensorboard\]'"):
        TensorBoard(**run_in(tmp_path))


def test_wandb_refuses_an_unknown_mode(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of auto, online, offline, disabled, got 'ofline'"):
        Wandb(**run_in(tmp_path), mode="ofline")


def test_a_sink_is_imported_only_when_used() -> None:
    script = "import sys, rst.tracking; print({'wandb', 'torch.utils.tensorboard'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.stem)
def test_every_config_node_builds(path: Path, tmp_path: Path) -> None:
    assert isinstance(instantiate(OmegaConf.load(path))(**run_in(tmp_path)), Tracker)
    assert not logging.getLogger("rst.tracking").handlers
