"""What several test modules share: running train.py in this process or as a user does."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_train(monkeypatch):
    """`run_train("method=sam", ...)` is `python train.py method=sam ...` without a new process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        GlobalHydra.instance().clear()
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return run


def command(*arguments, **options):
    """Run a command from the repository's root, with one thread, and return it completed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        list(map(str, arguments)), cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def train_command(*arguments, **options):
    return command(sys.executable, "train.py", *arguments, **options)
