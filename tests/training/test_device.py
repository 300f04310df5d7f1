"""One GPU a run in a sweep: leases between processes. Needs no GPU."""

import contextlib
import json
import multiprocessing
import os
import time

import pytest
import torch

from rst.training.device import cpu_threads, first_free, lease, pick_device

FORK = multiprocessing.get_context("fork")


def hold(folder, ids, wait, results, seconds):
    with first_free(folder, ids, wait, poll=0.02) as index:
        results.put((index, time.monotonic()))
        time.sleep(seconds)
        results.put((index, time.monotonic()))


def test_jobs_fill_the_devices_and_further_ones_wait_for_their_turn(tmp_path):
    results = FORK.Queue()
    jobs = [FORK.Process(target=hold, args=(tmp_path, ["a", "b"], True, results, 0.3)) for _ in range(5)]
    for job in jobs:
        job.start()
    events = [results.get(timeout=30) for _ in range(10)]
    spans = {0: [], 1: []}
    for index in spans:
        times = sorted(when for which, when in events if which == index)
        spans[index] = list(zip(times[::2], times[1::2], strict=True))
        # On one device, one begins after the other has ended.
        assert all(end <= begin for (_, end), (begin, _) in zip(spans[index], spans[index][1:], strict=False))
    assert all(spans.values())
    for job in jobs:
        job.join()


def test_none_without_waiting_if_all_are_taken(tmp_path):
    with first_free(tmp_path, ["a"], wait=False) as first:
        assert first == 0
        results = FORK.Queue()
        job = FORK.Process(target=hold, args=(tmp_path, ["a"], False, results, 0))
        job.start()
        assert results.get(timeout=30)[0] is None
        job.join()
    with first_free(tmp_path, ["a"], wait=False) as again:
        assert again == 0


def test_a_dead_process_releases_its_device(tmp_path):
    results = FORK.Queue()
    job = FORK.Process(target=hold, args=(tmp_path, ["a"], True, results, 60))
    job.start()
    assert results.get(timeout=30)[0] == 0
    job.kill()
    job.join()
    with first_free(tmp_path, ["a"], wait=True, poll=0.02) as index:
        assert index == 0


def test_two_gpus(tmp_path, monkeypatch):
    """`lease` with CUDA's answers given: locks have UUIDs for names, so visible numbers do not matter."""

    class Properties:
        def __init__(self, uuid):
            self.uuid = uuid

    monkeypatch.setattr("rst.training.device.tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("rst.training.device.pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties(f"GPU-{i}"))
    with lease("auto", wait=True) as first:
        assert first == torch.device("cuda:0")
        with lease("cuda:0", wait=True) as asked_for:
            assert asked_for == torch.device("cuda:0")
        (folder,) = tmp_path.iterdir()
        assert sorted(os.listdir(folder)) in (["GPU-0.lock"], ["GPU-0.lock", "GPU-1.lock"])


def test_the_cpu_is_shared():
    with lease("cpu", wait=True) as first, lease("cpu", wait=True) as second:
        assert first == second == torch.device("cpu")


def test_unknown_device():
    with pytest.raises(ValueError, match="device=tpu cannot be used"):
        pick_device("tpu")


def test_threads_are_set_and_set_back():
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before


def test_each_job_sets_tf32_by_its_precision(run_train, tmp_path):
    for precision in ("tf32", "fp32"):
        size = ["epochs=1", "model.width=4", "dataset.train_size=64", f"outputs={tmp_path}"]
        run_train("protocol=quick", "method=sgd", f"precision={precision}", *size)
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert allowed == (precision == "tf32",) * 2
    paths = list(tmp_path.glob("*/result.json"))
    losses = {json.loads(path.read_text())["test_loss"] for path in paths}
    assert len(paths) == 2 and len(losses) == 1  # two runs, and a CPU has no TF32
