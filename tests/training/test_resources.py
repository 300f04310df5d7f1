"""A machine that runs out of disk, memory or processes, and names that are not to be trusted."""

import errno
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import get_worker_info

from rst import files
from rst.data import evaluation_batches, image_files, image_folder
from rst.training import checkpoint
from rst.training.run import LONGEST_NAME, Run

RUN = ["protocol=quick", "model.width=8", "checkpoint.every_epochs=1"]


@contextmanager
def largest_file(n_bytes):
    """Within it no file can grow beyond that: as a full disk to a checkpoint, but not to the small files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["training"]["model"]


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_when_there_is_space(run_train, tmp_path):
    run_train(*RUN, "epochs=2", f"outputs={tmp_path / 'whole'}")
    (whole,) = (tmp_path / "whole").iterdir()
    (tmp_path / "full" / whole.name).mkdir(parents=True)
    folder = tmp_path / "full" / whole.name
    shutil.copy(whole / "checkpoint-previous.pt", folder / "checkpoint.pt")  # of the first epoch
    first = (folder / "checkpoint.pt").read_bytes()
    again = [*RUN, "epochs=2", f"outputs={tmp_path / 'full'}"]
    with largest_file(len(first) // 2), pytest.raises(SystemExit) as stopped:
        run_train(*again)
    reason = os.strerror(errno.EFBIG)
    assert stopped.value.code == (
        f"error: cannot write {folder / 'checkpoint.pt'} ({reason}); the one before it is intact"
    )
    assert (folder / "checkpoint.pt").read_bytes() == first
    left = {path.name for path in folder.iterdir()}
    assert left == {"checkpoint.pt", "config.yaml", "metrics.jsonl", ".lock", ".holder"}
    run_train(*again)
    assert (folder / "result.json").exists()
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(folder).items())


def test_a_full_disk_from_the_start(run_train, tmp_path):
    with largest_file(8), pytest.raises(SystemExit) as stopped:
        run_train(*RUN, f"outputs={tmp_path}")
    assert stopped.value.code == (
        f"error: cannot write to outputs={tmp_path} ({os.strerror(errno.EFBIG)}); choose another folder"
    )


def test_a_checkpoint_that_does_not_fit(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"w": torch.zeros(1000)}, "id")
    small = path.read_bytes()
    with (
        largest_file(10_000),
        pytest.raises(OSError, match=r"^cannot write .*; the one before it is intact$"),
    ):
        checkpoint.save(path, {"w": torch.zeros(10_000)}, "id")
    assert path.read_bytes() == small and list(tmp_path.iterdir()) == [path]
    with (
        largest_file(10_000),
        pytest.raises(OSError, match=r"^cannot write [^;]*$"),
    ):  # there is none before it
        files.write_atomically(tmp_path / "new", lambda file: file.write(bytes(10_001)))
    assert list(tmp_path.iterdir()) == [path]


def test_space_is_asked_for_before(tmp_path):
    folder = tmp_path / "not yet" / "there"
    free = shutil.disk_usage(tmp_path).free
    checkpoint.require_space(folder, free // 2)
    with pytest.raises(
        OSError, match=rf"^not enough space in {folder}: \d+ MiB are needed for checkpoints, \d+ MiB"
    ):
        checkpoint.require_space(folder, 2 * free)
    folder.mkdir(parents=True)
    for name in ("checkpoint.pt", ".checkpoint.pt.1.tmp"):  # the latter of a process that was killed
        path = folder / name
        with path.open("wb") as file:
            file.truncate(2 * free)  # sparse; it makes room for the one that replaces it
        checkpoint.require_space(folder, 2 * free)
        path.unlink()


def test_out_of_memory_names_what_to_change(run_train, tmp_path):
    # A convolution of 2²·10¹² weights: more than a process can address, so that nothing is ever allocated.
    with pytest.raises(SystemExit) as stopped:
        run_train("protocol=quick", "model.width=2000000", f"outputs={tmp_path / 'outputs'}")
    assert stopped.value.code == (
        "error: out of memory with batch_size=64 and model=resnet8: try "
        "grad_accumulation=2, precision=bf16, a smaller batch_size or a smaller model"
    )
    assert not (tmp_path / "outputs").exists()


@pytest.fixture
def images(tmp_path):
    """A folder of 2·60 training and 2·6 test images of 8×8."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 6)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


@contextmanager
def at_most(seconds):
    """Raises TimeoutError where the block takes longer, waiting for a lock included."""

    def stop(number, frame):
        raise TimeoutError(f"not done in {seconds} seconds")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def streamed(images, outputs):
    return [
        "dataset=image_folder", f"dataset.root={images}", "dataset.in_memory=false", "dataset.workers=2",
        "model=resnet8", "model.width=4", "augment=none", "batch_size=2", "threads=1", f"outputs={outputs}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        pytest.param(
            signal.SIGKILL,
            "Killed; probably for lack of memory: use fewer dataset.workers",
            marks=pytest.mark.slow,
        ),
        (signal.SIGBUS, "Bus error; shared memory is full: enlarge /dev/shm, or set dataset.workers=0"),
    ],
    ids=["SIGKILL", "SIGBUS"],
)
def test_a_worker_that_is_killed(number, hint, images, tmp_path, run_train, monkeypatch):
    """At work, as for lack of memory, and in the middle of an epoch."""
    open_image, opened = image_files.open_image, []

    def die(place, mode):
        opened.append(place)
        if (worker := get_worker_info()) and worker.id == 0 and len(opened) == 20:
            os.kill(os.getpid(), number)
        return open_image(place, mode)

    monkeypatch.setattr(image_files, "open_image", die)
    with at_most(120), pytest.raises(SystemExit) as stopped:
        run_train(*streamed(images, tmp_path / "outputs"))
    assert stopped.value.code.startswith(f"error: a process that decodes images was killed: {hint}")
    del stopped  # whose traceback holds on to the other worker
    gc.collect()
    assert not multiprocessing.active_children()


def test_an_error_while_workers_are_at_work_ends_the_run(run_train, images, tmp_path):
    diverging = ["method=sgd", "clip_norm=null", "optimizer.lr=1e30"]
    with at_most(60), pytest.raises(SystemExit, match=r"is (nan|inf|-inf) at step"):
        run_train(*streamed(images, tmp_path / "outputs"), *diverging)


@pytest.mark.slow
def test_workers_that_nobody_tells_to_end(images, tmp_path):
    """As where an error interrupts the telling. `multiprocessing` sends them SIGTERM when the main process
    exits, and waits for as long as it takes."""
    code = (
        "import runpy\n"
        "from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Workers\n"
        "shutdown = Workers._shutdown_workers\n"
        "def interrupted(self):\n"
        "    Workers._shutdown_workers = shutdown\n"
        "    self._shutdown = True\n"
        "    raise RuntimeError('in the middle of it')\n"
        "Workers._shutdown_workers = interrupted\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    arguments = [*streamed(images, tmp_path / "outputs"), "epochs=1"]
    done = command(sys.executable, "-c", code, *arguments, timeout=60)
    assert done.returncode == 0 and "in the middle of it" in done.stderr
    assert len(list(tmp_path.glob("outputs/*/result.json"))) == 1


def test_workers_leave_signals_to_the_main_process_but_end_by_sigterm(images):
    data = image_folder(str(images), in_memory=False, workers=1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    batches = evaluation_batches(data, 1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, number)
    assert len(list(batches)) == 11 and worker.exitcode == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before

    batches = evaluation_batches(data, 1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    time.sleep(0.2)  # until it waits: killed as it holds one of PyTorch's locks, it would hold it for ever
    subprocess.run(["kill", str(worker.pid)], check=True)  # not from its parent, for which it ends with 0
    time.sleep(0.2)  # where PyTorch's own error would come
    with at_most(30), pytest.raises(ChildProcessError, match="killed: Terminated"):
        list(batches)
    assert worker.exitcode == -signal.SIGTERM


def test_a_signal_to_the_process_group_leaves_the_workers_at_work(images, start_process):
    """As `timeout` and torchrun send it; the run then ends in order, for which it may need more batches."""
    code = (
        "import sys\n"
        "from rst.data import evaluation_batches, image_folder\n"
        "from rst.training.interruption import Interruption\n"
        "data = image_folder(sys.argv[1], in_memory=False, workers=2)\n"
        "with Interruption() as interruption:\n"
        "    batches = evaluation_batches(data, 1)\n"
        "    next(batches), next(batches)  # one of each worker\n"
        "    print('begun', flush=True)\n"
        "    while not interruption.requested(): pass\n"
        "    print(len(list(batches)), flush=True)\n"
        "    interruption.end()"
    )
    main = start_process([sys.executable, "-c", code, images], stdout=subprocess.PIPE)
    assert main.stdout.readline() == b"begun\n"
    os.killpg(main.pid, signal.SIGTERM)
    assert main.communicate(timeout=30) == (b"10\n", None)
    assert main.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("batches_taken", [1, 12])
def test_workers_end_at_once_with_the_epoch(batches_taken, images):
    data = image_folder(str(images), in_memory=False, workers=2)
    batches = evaluation_batches(data, 1)
    for _ in range(batches_taken):
        next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    with at_most(4):  # PyTorch gives up on a worker after 5 seconds
        batches.close()
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.slow
def test_workers_end_with_a_main_process_that_is_killed(images, start_process):
    code = (
        "import sys; from rst.data import evaluation_batches, image_folder\n"
        "data = image_folder(sys.argv[1], in_memory=False, workers=2)\n"
        "batches = evaluation_batches(data, 1); next(batches); print('begun', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    main = start_process([sys.executable, "-c", code, images], **pipes)
    assert main.stdout.readline() == b"begun\n"
    main.kill()
    assert main.communicate(timeout=30) == (b"", None)  # the end of a pipe that the workers hold too


def test_a_worker_whose_parent_is_gone_before_it_begins():
    context = multiprocessing.get_context("fork")
    for parent, code in ((os.getpid(), 0), (os.getppid(), 1)):
        worker = context.Process(target=image_files._begin_worker, args=(parent, 0))
        worker.start()
        worker.join()
        assert worker.exitcode == code


TEXTS = st.text(max_size=300) | st.sampled_from(["", ".", "..", "../..", "a/b", "/etc", "\0", "é" * 300])


@given(
    texts=st.lists(TEXTS, min_size=6, max_size=6),
    seed=st.integers(0) | TEXTS,
    choice=st.sampled_from(["timm", ".."]),
)
def test_a_run_stays_in_the_outputs_folder(texts, seed, choice):
    groups = ("dataset", "augment", "method", "schedule", "tracker")
    choices = dict(zip(groups, texts, strict=False)) | {"model": choice}
    outputs = Path("outputs")
    run = Run(outputs, {"seed": seed, "model": {"name": texts[5]}}, choices, "")
    assert run.folder.parent == run.checkpoint.parent.parent == outputs
    assert os.path.normpath(run.folder) == str(run.folder) and run.name.endswith(run.id)
    assert len(os.fsencode(run.name)) <= LONGEST_NAME + 1 + len(run.id) <= 255


def test_the_longest_name_can_be_a_folders(tmp_path):
    run = Run(
        tmp_path,
        {"seed": 0, "model": {"name": "x" * 1000}},
        dict.fromkeys(["dataset", "augment", "method", "schedule"], "y" * 99) | {"model": "timm"},
        "",
    )
    with run.lock():
        run.open([])
    assert (run.folder / "config.yaml").exists()
