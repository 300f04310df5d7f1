"""train.py as a user runs it: methods, sweeps, resuming, trackers."""

import json
import math
import os
import socket
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import interrupted_after
from filelock import FileLock

from rst import expected_propagations, propagations_std
from rst.schedule import Linear
from rst.training.run import Run

SHORT = ["protocol=quick", "epochs=2", "model.width=4"]


def only(paths):
    (path,) = paths
    return path


def results(outputs):
    found = [json.loads(path.read_text()) for path in outputs.glob("*/result.json")]
    return {(r["choices"]["method"], r["choices"]["schedule"], r["seed"]): r for r in found}


def without_times(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def test_each_method(tmp_path, run_train):
    run_train("-m", *SHORT, "method=sgd,sam,asam,gnp,rst,grst", "seed=0", f"outputs={tmp_path}")
    found = {method: result for (method, _, _), result in results(tmp_path).items()}
    eta = {method: result["propagations"] / result["steps"] for method, result in found.items()}
    assert {m: eta[m] for m in ("sgd", "sam", "asam", "gnp")} == {"sgd": 1, "sam": 2, "asam": 2, "gnp": 2}
    for method in ("rst", "grst"):
        result = found[method]
        assert result["sam_steps"] == result["propagations"] - result["steps"]
        assert result["expected_propagations"] == expected_propagations(Linear(0, 1), result["steps"])
        assert result["propagations_std"] == propagations_std(Linear(0, 1), result["steps"])
        deviation = abs(result["propagations"] - result["expected_propagations"])
        assert deviation <= 4 * result["propagations_std"]
    # Same seed, same coin: the two differ in their gradients only.
    assert found["rst"]["sam_steps"] == found["grst"]["sam_steps"]
    assert len({result["test_loss"] for result in found.values()}) == 6
    for result in found.values():
        assert result["epochs"] == 2 and result["steps"] == 40
        assert 0 < result["test_accuracy"] <= result["best_test_accuracy"] <= 1
        assert math.isfinite(result["test_loss"]) and result["images_per_second"] > 0
        assert set(result["seconds"]) == {"train", "evaluate", "data", "total"}
        assert result["peak_memory_bytes"] is None and result["threads"] == 1  # memory of a GPU
        assert result["versions"]["torch"] == torch.__version__
        assert result["host"] and result["command"].startswith("python train.py ")


def test_each_rival(tmp_path, run_train):
    """As η is published, or for AE-SAM measured."""
    methods = "looksam,vsam,aesam,aelooksam,msam,stale,partial"
    run_train("-m", *SHORT, "epochs=1", f"method={methods}", "seed=0", f"outputs={tmp_path}")
    found = {method: result for (method, _, _), result in results(tmp_path).items()}
    eta = {method: result["propagations"] / result["steps"] for method, result in found.items()}
    known = {"looksam": 1.2, "vsam": 1.2, "msam": 1.0, "stale": 1.0, "partial": 1.25}
    assert {method: eta[method] for method in known} == pytest.approx(known)
    for method, result in found.items():
        expected = result["expected_propagations"], result["propagations_std"]
        assert expected == ((result["propagations"], 0) if method in known else (None, None))
    assert 1 < eta["aesam"] < 2 and 1 < eta["aelooksam"] < 2
    assert len({result["test_loss"] for result in found.values()}) == 7


@pytest.mark.slow
def test_an_interrupted_rival_resumes(tmp_path, run_train):
    """With what it carries from step to step, in reduced precision."""
    arguments = [*SHORT, "epochs=3", "method=aelooksam", "precision=fp16", "warmup_epochs=1"]
    run_train(*arguments, f"outputs={tmp_path / 'whole'}")
    broken = [*arguments, "checkpoint.every_steps=25", "checkpoint.every_epochs=null"]
    broken += [f"outputs={tmp_path / 'broken'}"]
    with interrupted_after(2), pytest.raises(SystemExit):  # 15 steps after the last checkpoint
        run_train(*broken)
    assert not list((tmp_path / "broken").glob("*/result.json"))
    run_train(*broken)
    whole, broken = (only((tmp_path / name).glob("digits*")) for name in ("whole", "broken"))
    assert without_times(broken) == without_times(whole)
    assert_same_weights(broken, whole)


def assert_same_weights(*folders):
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders]
    for key, value in states[0]["training"]["model"].items():
        assert torch.equal(value, states[1]["training"]["model"][key]), key


def test_a_job_in_a_sweep_equals_the_same_job_alone(tmp_path, run_train):
    sweep, alone = tmp_path / "sweep", tmp_path / "alone"
    run_train(*SHORT, "schedule=piecewise", "seed=1", f"outputs={alone}")
    run_train("-m", *SHORT, "schedule=constant,piecewise", "seed=0,1", f"outputs={sweep}")
    assert len(results(sweep)) == 4
    single = only(alone.glob("*/result.json")).parent
    same = sweep / single.name  # the last one of the sweep
    assert without_times(same) == without_times(single)
    assert_same_weights(same, single)


def test_a_complete_run_returns_at_once_and_an_interrupted_one_resumes(run_train, tmp_path):
    arguments = [*SHORT, "epochs=3", "method=grst", f"outputs={tmp_path / 'whole'}"]
    run_train(*arguments)
    whole = only((tmp_path / "whole").glob("digits*"))
    written = (whole / "result.json").stat().st_mtime_ns
    run_train(*arguments)
    assert (whole / "result.json").stat().st_mtime_ns == written

    broken = [*SHORT, "epochs=3", "method=grst", f"outputs={tmp_path / 'broken'}"]
    with interrupted_after(2), pytest.raises(SystemExit) as stopped:
        run_train(*broken)
    assert stopped.value.code == 130
    folder = only((tmp_path / "broken").glob("digits*"))
    assert len(without_times(folder)) == 2 and not (folder / "result.json").exists()
    run_train(*broken)
    assert without_times(folder) == without_times(whole)
    assert_same_weights(folder, whole)


def test_wandb_offline_holds_accuracy_and_propagations(tmp_path, run_train, monkeypatch, capsys):
    key = "0123456789abcdef" * 2 + "01234567"
    for name, value in {"WANDB_MODE": "offline", "WANDB_API_KEY": key, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run_train(*SHORT, "evaluate_every=1", "tracker=wandb", "method=sam", f"outputs={tmp_path}")
    folder = only(tmp_path.glob("digits*"))
    offline = only((folder / "wandb").glob("offline-run-*"))
    read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)]
    printed = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert "epoch 2: train loss" in capsys.readouterr().out
    logged = [(row["epoch"], row["test_accuracy"], row["propagations"]) for row in history]
    expected = [(r["epoch"], r["test_accuracy"], r["propagations"]) for r in without_times(folder)]
    assert logged == expected and len(expected) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not any(key.encode() in path.read_bytes() for path in files)


def test_precision_and_augmentation(run_train, tmp_path):
    for precision in ("bf16", "fp16"):
        run_train(
            *SHORT, "epochs=1", f"precision={precision}", f"outputs={tmp_path / precision}", "augment=cutout",
            "augment.cutout=4", "augment.crop_padding=2", "optimizer=adamw", "l2=0",
        )  # fmt: skip
        (result,) = results(tmp_path / precision).values()
        assert math.isfinite(result["test_loss"])
        folder = only((tmp_path / precision).glob("digits*"))
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
        assert ("scale" in state["scaler"]) == (precision == "fp16")
        convolution = next(
            value for value in state["model"].values() if value.ndim == 4 and value.shape[1] > 1
        )
        assert convolution.is_contiguous(memory_format=torch.channels_last)


def test_a_model_that_diverges_in_its_last_step_is_no_result(run_train, tmp_path):
    """All training losses are finite: one step an epoch, and it is the update that ruins the weights."""
    arguments = [*SHORT, "method=sgd", "clip_norm=null", "batch_size=1297", f"outputs={tmp_path}"]
    with pytest.raises(SystemExit, match="the test loss is not finite after epoch 1"):
        run_train(*arguments, "epochs=1", "optimizer.lr=1e30")
    folder = only(tmp_path.glob("digits*"))
    assert not (folder / "result.json").exists() and not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "content", ["", '{"schema": 1, "id": "r1234567"}'], ids=["damaged", "of another run"]
)
def test_a_result_that_does_not_count_is_kept_and_the_run_done_again(run_train, tmp_path, content, capsys):
    arguments = [*SHORT, "epochs=1", f"outputs={tmp_path}"]
    run_train(*arguments)
    folder = only(tmp_path.glob("digits*"))
    whole = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(content)
    run_train(*arguments)
    assert capsys.readouterr().out.count("does not count as complete") == 1
    assert (folder / "result.json.old").read_text() == content
    assert json.loads((folder / "result.json").read_text())["test_loss"] == whole["test_loss"]


def test_a_run_that_another_process_is_running_is_left_alone(run_train, tmp_path):
    arguments = [*SHORT, "epochs=1", f"outputs={tmp_path}"]
    run_train(*arguments)
    folder = only(tmp_path.glob("digits*"))
    (folder / "result.json").unlink()
    run = Run(tmp_path, {}, {}, "")
    with mock.patch.object(Run, "folder", folder), run.lock():
        process = f"process {os.getpid()} on {socket.gethostname()}"
    with FileLock(folder / ".lock"), pytest.raises(SystemExit) as ended:
        run_train(*arguments)
    assert ended.value.code == f"error: {folder} is being run by {process}"
    with FileLock(folder / ".lock"):
        run_train("-m", *arguments)  # in a sweep it may be another job's, as SGD is one run at any rho
    assert not (folder / "result.json").exists()
    run_train(*arguments)  # the lock is free again
    assert (folder / "result.json").exists()


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(run_train, tmp_path):
    arguments = [*SHORT, "method=sgd", "clip_norm=null", "optimizer.lr=1e30"]
    with pytest.raises(SystemExit, match=r"the loss is \S+ at step \d+ \(epoch 1, batch \d+\)"):
        run_train(*arguments, f"outputs={tmp_path / 'at once'}")
    folder = only((tmp_path / "at once").glob("digits*"))
    assert not (folder / "result.json").exists() and not (folder / "checkpoint.pt").exists()
    later = ["warmup_epochs=1", "checkpoint.every_steps=1"]  # the first step moves nothing
    with pytest.raises(SystemExit, match="not finite after step 1; the last checkpoint is kept"):
        run_train(*arguments, *later, f"outputs={tmp_path / 'later'}")
    folder = only((tmp_path / "later").glob("digits*"))
    assert not (folder / "result.json").exists()
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    assert kept["optimizer"]["param_groups"][0]["rst"]["steps"] > 0
    assert all(x.isfinite().all() for x in kept["model"].values())
