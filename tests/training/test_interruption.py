"""Signals: the first ends a run in order, Ctrl-C after it at once; handlers of other programs."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import wait_until

from rst.training.interruption import SIGNALS, Interruption
from rst.training.run import Run


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interruption() as interruption:
        assert not interruption.requested()
        os.kill(os.getpid(), number)
        wait_until(interruption.requested)
        with pytest.raises(SystemExit) as ended:
            interruption.end()
    assert ended.value.code == 128 + number
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_handler_that_was_there_gets_the_signal_after_the_checkpoint():
    """As submitit's, which puts the job back into Slurm's queue, or passes a SIGTERM over."""
    heard = []
    former = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with Interruption() as interruption:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR2)
                wait_until(interruption.requested)
                assert len(heard) < 2
                interruption.end()
                assert not interruption.requested()
            os.kill(os.getpid(), signal.SIGINT)  # the first of what is a new interruption
            wait_until(interruption.requested)
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert heard == [signal.SIGUSR2] * 2


def test_another_rank_was_told_to_end():
    with Interruption() as interruption, pytest.raises(SystemExit) as ended:
        interruption.end()
    assert ended.value.code == 128 + signal.SIGTERM


def test_ctrl_c_after_another_signal_ends_the_process_within_a_long_operation(start_process):
    """One of Python's own, in C, in which it runs no handlers; a repeated SIGTERM does not end it."""
    code = (
        "from rst.training.interruption import Interruption\n"
        "with Interruption() as interruption:\n"
        "    print('ready', flush=True)\n"
        "    while not interruption.requested(): pass\n"
        "    print('noted', flush=True)\n"
        "    sum(range(10**10))"
    )
    process = start_process([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", None)
    assert process.returncode == -signal.SIGINT


def test_ignored_signals_stay_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interruption.requested()
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(interruption.requested)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_signal_at_the_very_end_of_a_run_ends_its_sweep(tmp_path, run_train, monkeypatch):
    complete = Run.complete

    def complete_and_interrupt(run, measured):
        os.kill(os.getpid(), signal.SIGTERM)
        return complete(run, measured)

    monkeypatch.setattr(Run, "complete", complete_and_interrupt)
    size = ["protocol=quick", "method=sgd", "epochs=1", f"outputs={tmp_path}", f"hydra.sweep.dir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        run_train("-m", "seed=0,1", *size)
    assert ended.value.code == 128 + signal.SIGTERM
    (result,) = tmp_path.glob("*/result.json")
    assert "-s0-" in result.parent.name


@pytest.mark.slow
def test_a_run_ends_in_order_and_resumes(tmp_path, run_train, start_process):
    """Eight epochs of six steps of 0.3 s or so, with a checkpoint after each epoch."""
    size = ["batch_size=216", "model.width=32", "epochs=8", "checkpoint.every_epochs=1"]
    arguments = ["protocol=quick", "method=sam", *size, f"outputs={tmp_path}"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = start_process(
        [sys.executable, "train.py", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, **options
    )
    wait_until(lambda: list(tmp_path.glob("*/checkpoint.pt")))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    (folder,) = tmp_path.glob("*/")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    steps = state["optimizer"]["param_groups"][0]["rst"]["steps"]
    assert steps == 6 * len(state["metrics"]) + state["epoch"]["steps"] < 48
    assert not (folder / "result.json").exists() and not list(folder.glob(".*.tmp"))
    run_train(*arguments)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 9))
    assert json.loads((folder / "result.json").read_text())["steps"] == 48
