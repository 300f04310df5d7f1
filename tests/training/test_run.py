"""What a run is called, and its files."""

import json
import os

import pytest

from rst.training.run import Run, RunBusyError

CONFIG = {"seed": 0, "epochs": 2, "model": {"name": "resnet8", "width": 16}}
GROUPS = ("dataset", "model", "augment", "method", "schedule")
CHOICES = dict(zip(GROUPS, ("cifar10", "resnet8", "basic", "rst", "linear"), strict=True))


def test_a_name_is_one_safe_folder(tmp_path):
    run = Run(tmp_path, CONFIG, CHOICES, "python train.py")
    assert run.name == f"cifar10-resnet8-basic-rst-linear-s0-{run.id}"
    crafted = Run(tmp_path, CONFIG | {"model": {"name": "../../etc/x y"}}, CHOICES | {"model": "timm"}, "")
    assert crafted.folder.parent == tmp_path
    assert "/" not in crafted.name and " " not in crafted.name


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
