"""Identity, names and files of a run."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command

from rst.training.run import Run, RunBusyError, provenance, summarize

CONFIG = {
    "seed": 0,
    "epochs": 2,
    "device": "auto",
    "outputs": "outputs",
    "dataset": {"_target_": "rst.data.cifar10", "root": "data", "train_size": None, "download": True},
    "model": {"name": "resnet8", "width": 16},
    "schedule": {"p": 1, "rising": True},
    "tracker": {"_target_": "rst.training.tracking.NoTracker"},
    "milestones": [0.5, 0.75],
}
CHOICES = {
    "dataset": "cifar10",
    "model": "resnet8",
    "augment": "basic",
    "method": "rst",
    "schedule": "linear",
}


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[key] = value
    return config


def test_a_name_is_one_safe_folder(tmp_path):
    run = Run(tmp_path, CONFIG, CHOICES, "python train.py")
    assert run.name == f"cifar10-resnet8-basic-rst-linear-s0-{run.id}"
    crafted = Run(tmp_path, changed("model.name", "../../etc/x y"), CHOICES | {"model": "timm"}, "")
    assert crafted.folder.parent == tmp_path
    assert "/" not in crafted.name
    assert " " not in crafted.name


def test_files_of_a_run(tmp_path):
    run = Run(tmp_path, CONFIG, CHOICES, "python train.py seed=0")
    assert run.result() is None and run.failure() is None and not run.is_locked()
    assert not run.folder.exists()
    with run.lock():
        assert run.is_locked()
        run.open([{"epoch": 1}])
        run.append({"epoch": 2})
        assert (run.folder / "metrics.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
        run.open([{"epoch": 1}])  # as on resuming from the checkpoint of epoch 1
        assert (run.folder / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
        result = run.complete({"test_accuracy": 0.5})
        with pytest.raises(RunBusyError, match=rf"is being run by process {os.getpid()} on "), run.lock():
            pass
    assert not run.is_locked()
    assert run.result() == json.loads(json.dumps(result))
    assert result["command"] == "python train.py seed=0"
    visible = sorted(path.name for path in run.folder.iterdir() if not path.name.startswith("."))
    assert visible == ["config.yaml", "metrics.jsonl", "result.json"]


def test_a_failure_stands_until_the_run_is_taken_up_again(tmp_path):
    run = Run(tmp_path, CONFIG, CHOICES, "python train.py seed=0")
    run.fail("the loss is not finite at step 7")
    assert run.failure() == "the loss is not finite at step 7"
    assert run.result() is None
    with run.lock():
        run.open([])
    assert run.failure() is None


def test_provenance_names_versions_commit_and_machine():
    made_with = provenance(torch.device("cpu"))
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        assert head.startswith(made_with["commit"])
    else:  # an unpacked archive
        assert made_with["commit"] is None
    assert made_with["versions"]["torch"] == torch.__version__
    assert made_with["device"] == "cpu"
    assert made_with["threads"] == torch.get_num_threads()
    assert made_with["host"] and made_with["device_name"]


def test_peak_memory_starts_anew():
    # In a process of its own: in this one freed memory may be used again without the peak rising.
    code = (
        "import torch; from rst.training.run import *; cpu = torch.device('cpu')\n"
        "torch.ones(2**26)\n"  # 256 MiB, freed at once
        "high = peak_memory_bytes(cpu); reset_peak_memory(cpu); print(high, peak_memory_bytes(cpu))"
    )
    done = command(sys.executable, "-c", code)
    if "None" not in done.stdout:  # Linux
        high, anew = map(int, done.stdout.split())
        assert high >= 2**28
        assert anew < high - 2**27


def test_summary_takes_the_last_epoch_and_names_the_best():
    def row(epoch, accuracy):
        return {
            "epoch": epoch, "steps": 10 * epoch, "sam_steps": epoch, "propagations": 11 * epoch,
            "images": 100, "skipped_steps": 0,
            "test_accuracy": accuracy, "test_loss": 1.0, "train_accuracy": 0.9, "train_loss": 0.1 * epoch,
            "seconds_train": 3.0, "seconds_evaluate": 1.0, "seconds_data": 1.0,
        }  # fmt: skip

    rows = [row(1, 0.7), row(2, 0.8), row(3, 0.8), row(4, 0.75)]
    summary = summarize(rows)
    assert summary["test_accuracy"] == 0.75
    assert (summary["best_test_accuracy"], summary["best_epoch"]) == (0.8, 2)  # the earliest of equals
    assert summary["seconds"] == {"train": 12.0, "evaluate": 4.0, "data": 4.0, "total": 20.0}
    assert summary["images_per_second"] == 400 / 16
    assert (summary["steps"], summary["propagations"]) == (40, 44)
    for key in ("test_accuracy", "test_loss", "seconds_evaluate"):
        del rows[1][key]  # an epoch that was not evaluated
    summary = summarize(rows)
    assert (summary["best_test_accuracy"], summary["best_epoch"]) == (0.8, 3)
    assert summary["seconds"]["total"] == 19.0
