"""What several test modules share: running train.py, in this process or as a user does; tiny CIFARs."""

import hashlib
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from torchvision import datasets

from rst.training.run import Run

ROOT = Path(__file__).parent.parent
PER_CIFAR_FILE = 20

# A shell has what it starts in the background ignore it, and so all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


def pytest_collection_modifyitems(items):
    """The slow ones first, so that none of them begins when all else has ended."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def run_script(monkeypatch):
    """`run_script("scripts/plan.py", "epochs=1")` is `python scripts/plan.py epochs=1` without a new process,
    which takes seconds to start. Raises SystemExit for an exit code other than 0."""

    def run(path, *arguments):
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        # Put back afterwards, as scripts add to the path and move to the root.
        monkeypatch.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        GlobalHydra.instance().clear()
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise

    return run


@pytest.fixture
def run_train(run_script):
    """`run_train("method=sam", ...)` is `python train.py method=sam ...` without a new process."""
    return partial(run_script, "train.py")


def command(*arguments, **options):
    """Run a command from the repository's root, with one thread, and return it completed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"} | options.pop("env", {})
    return subprocess.run(
        list(map(str, arguments)), cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def train_command(*arguments, **options):
    return command(sys.executable, "train.py", *arguments, **options)


@pytest.fixture
def start_process():
    """`subprocess.Popen` from the repository's root, in a process group that ends with the test."""
    started = []

    def start(arguments, **options):
        arguments = list(map(str, arguments))
        started.append(subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, **options))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def interrupted_after(epoch):
    """Within it, runs in this process are interrupted after the line of that epoch, before its checkpoint."""
    append = Run.append

    def append_and_interrupt(run, metrics):
        append(run, metrics)
        if metrics["epoch"] == epoch:
            raise KeyboardInterrupt

    with mock.patch.object(Run, "append", append_and_interrupt):
        yield


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_pickle(path: Path, content: dict[str, object]) -> str:
    """Returns the file's MD5."""
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature in the official layout whose checksums torchvision is told: 100 + 20 images.

    Pixel (0, 0) of channel 0 is an image's index in its split; labels are the index modulo 10.
    """
    root = tmp_path / "official"
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, first: int) -> list[str]:
        pixels = rng.integers(0, 256, (PER_CIFAR_FILE, 3072), dtype=np.uint8)
        index = np.arange(first, first + PER_CIFAR_FILE)
        pixels[:, 0] = index
        content = {"data": pixels, "labels": (index % 10).tolist(), "filenames": [""] * PER_CIFAR_FILE}
        return [name, write_pickle(folder / name, content)]

    train = [write(f"data_batch_{i + 1}", PER_CIFAR_FILE * i) for i in range(5)]
    test = [write("test_batch", 0)]
    names = [f"class{i}" for i in range(10)]
    md5 = write_pickle(folder / "batches.meta", {"label_names": names})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5})
    return root


@pytest.fixture
def cifar100_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "official"
    folder = root / datasets.CIFAR100.base_folder
    folder.mkdir(parents=True)
    lists = {}
    for name, n in (("train", 200), ("test", 100)):
        pixels = np.zeros((n, 3072), dtype=np.uint8)
        fine = [i % 100 for i in range(n)]
        content = {"data": pixels, "fine_labels": fine, "coarse_labels": [i // 5 for i in fine]}
        lists[name] = [[name, write_pickle(folder / name, content)]]
    md5 = write_pickle(folder / "meta", {"fine_label_names": [f"fine{i}" for i in range(100)]})
    monkeypatch.setattr(datasets.CIFAR100, "train_list", lists["train"])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", lists["test"])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": md5})
    return root
