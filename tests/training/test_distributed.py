"""One run on two ranks, against the same run in one process."""

import io
import json
import logging
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, wait_until
from test_loop import L2, assert_equal_state, some_data
from test_train import only
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from rst import RST, VSAM, Constant, LookSAM, StaleAscent
from rst.data import Augment, train_batches
from rst.training import distributed
from rst.training.calibration import cross_fitted_loss
from rst.training.loop import Training
from rst.training.lr_schedule import cosine
from rst.training.run import Run

RANKS, EPOCHS, BATCH = 2, 3, 4
CASES = {
    "sgd": {"p": 0.0},
    "sam": {"p": 1.0},
    "sync": {"p": 1.0, "sync_perturbation": True},
    "sync_grst": {"p": 0.5, "gamma": 2.0, "sync_perturbation": True},
    "sync_asam_adamw": {"p": 0.5, "adaptive": True, "sync_perturbation": True, "base": torch.optim.AdamW},
    "sync_accumulate": {"p": 0.5, "sync_perturbation": True, "grad_accumulation": 2},
    "sync_looksam": {"rival": LookSAM, "schedule": 0.5, "grad_accumulation": 2},
    "sync_vsam": {"rival": VSAM, "schedule": 0.5},
    "sync_stale": {"rival": StaleAscent},
    "batchnorm": {"p": 0.5, "gamma": 0.5},
}


class Double(torch.nn.Module):
    def forward(self, x):
        return x.double()


def start(case):
    """A run in float64, so that only the order of sums sets it apart from another number of ranks."""
    rule = dict(CASES[case])
    torch.manual_seed(0)
    hidden = [torch.nn.Linear(16, 8), torch.nn.Tanh()]
    if case == "batchnorm":
        hidden += [torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)]
    model = torch.nn.Sequential(Double(), torch.nn.Flatten(), *hidden, torch.nn.Linear(8, 3)).double()
    model = distributed.replicate(model, torch.device("cpu"))
    base = rule.pop("base", torch.optim.SGD)(model.parameters(), lr=0.1)
    settings = {"grad_accumulation": rule.pop("grad_accumulation", 1), "l2": L2, "clip_norm": 0.7}
    if rival := rule.pop("rival", None):
        optimizer = rival(base, total_steps=100, rho=0.3, module=model, **rule)
    else:
        optimizer = RST(base, Constant(rule.pop("p")), 100, rho=0.3, module=model, seed=1, **rule)
    augment = Augment(flip=True, cutout=2, per_batch=True)
    arguments = {"epochs": EPOCHS, "batch_size": BATCH, "seed": 1} | settings
    return Training(model, optimizer, cosine, some_data(n=13), augment, **arguments)


def saved(run):
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    return file.getvalue()


def resume(run, content):
    run.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return run


def train_rank(rank, folder, begun):
    """One rank: each case, from its state in `begun` where there is one; what happened goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {}
    for case in CASES:
        run = start(case)
        if case in begun:
            resume(run, begun[case])
        n_bytes, weights = [0], []

        def count(group, bucket, n_bytes=n_bytes):
            n_bytes[-1] += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        run.model.register_comm_hook(None, count)
        states = []
        for _ in run.run():
            states.append(saved(run))
            weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
            n_bytes.append(0)
        results[case] = {"states": states, "weights": weights, "n_bytes": n_bytes}

    # A request to stop on the last rank alone, in training and in an evaluation.
    for points in (1, 4):
        run, taken = start("sgd"), []
        for _ in run.run(lambda taken=taken, points=points: rank == RANKS - 1 and len(taken) == points):
            taken.append(1)
            if run.guard.stopping:
                break
        results[f"stopped {points}"] = len(taken)

    # An image that is not a number on the last rank alone.
    run = start("sgd")
    if rank == RANKS - 1:
        run.network[2].register_forward_hook(lambda module, x, y: y * math.nan)
    weights = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(FloatingPointError) as stopped:
        next(run.run())
    assert_equal_state([p.detach() for p in run.model.parameters()], weights)
    results["not finite"] = str(stopped.value)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # on a busy machine gloo's threads have aborted an orderly end


def spawn(folder, begun):
    torch.multiprocessing.spawn(train_rank, args=(str(folder), begun), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return spawn(tmp_path_factory.mktemp("ranks"), {})


@pytest.mark.parametrize("case", CASES)
def test_weights_are_equal_on_all_ranks_after_every_step(case, trained):
    first, second = (result[case]["weights"] for result in trained)
    assert len(first) == len(second) == EPOCHS * (3 + 2 + 1)  # 3 batches, 2 of the test set, an epoch's end
    assert_equal_state(first, second)
    assert len({tuple(weights.tolist()) for weights in first}) == EPOCHS * 3


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("sync") or case == "sgd"])
def test_synchronized_ranks_equal_one_process(case, trained):
    run = start(case)
    list(run.run())
    state = torch.load(io.BytesIO(trained[0][case]["states"][-1]), weights_only=True)
    for key, value in run.network.state_dict().items():
        assert torch.allclose(state["model"][key], value, rtol=0, atol=1e-6)
    for ours, alone in zip(state["metrics"], run.metrics, strict=True):
        for key, value in alone.items():
            if not key.startswith("seconds"):
                assert ours[key] == pytest.approx(value, rel=1e-6), key
    assert (
        state["optimizer"]["param_groups"][0]["rst"] == run.optimizer.state_dict()["param_groups"][0]["rst"]
    )


def test_a_sam_step_sends_as_many_bytes_as_a_plain_one(trained):
    for result in trained:
        parameters = result["sgd"]["weights"][0].nbytes
        for case, passes in {"sgd": 1, "sam": 1, "sync": 2}.items():
            sent = [n for n in result[case]["n_bytes"] if n]
            assert sent == [passes * parameters] * EPOCHS * 3, case


def test_evaluation_covers_the_test_set_once(trained):
    """7 images on 2 ranks, with rank 0's BatchNorm statistics."""
    state = torch.load(io.BytesIO(trained[0]["batchnorm"]["states"][-1]), weights_only=True)
    data, run = some_data(n=13), start("batchnorm")
    run.network.load_state_dict(state["model"])
    with torch.no_grad():
        logits = run.network.eval()((data.test_images / 255 - 0.5) / 0.3)
    right = (logits.argmax(1) == data.test_labels).sum().item()
    assert state["metrics"][-1]["test_accuracy"] == right / 7
    assert state["metrics"][-1]["test_loss"] == pytest.approx(
        F.cross_entropy(logits, data.test_labels).item()
    )
    scaled = cross_fitted_loss(logits.numpy(), data.test_labels.numpy())
    assert state["metrics"][-1]["calibrated_test_loss"] == pytest.approx(scaled, rel=1e-5)


def test_all_ranks_stop_at_the_same_point(trained):
    for points in (1, 4):
        assert [result[f"stopped {points}"] for result in trained] == [points + 1] * RANKS


def test_all_ranks_stop_before_an_update_that_is_not_finite(trained):
    assert [result["not finite"].split(";")[0] for result in trained] == [
        "the loss is nan at step 0 (epoch 1, batch 0)"
    ] * RANKS


@pytest.mark.slow
def test_resuming_on_two_ranks_then_one_then_two(trained, tmp_path):
    """Left within the first epoch, resumed in one process, left within the second epoch, resumed on two."""
    begun = {}
    for case in CASES:
        run = resume(start(case), trained[0][case]["states"][1])
        points = run.run()
        for _ in range(6):
            next(points)
        assert run.optimizer.steps == 5
        begun[case] = saved(run)
    again = spawn(tmp_path, begun)
    for case in CASES:
        ends = [
            torch.load(io.BytesIO(result[case]["states"][-1]), weights_only=True)
            for result in (trained[0], again[0])
        ]
        assert [metrics["steps"] for metrics in ends[1]["metrics"]] == [3, 6, 9]
        assert ends[0]["optimizer"]["param_groups"] == ends[1]["optimizer"]["param_groups"]
        if case.startswith("sync") or case == "sgd":
            for key, value in ends[0]["model"].items():
                assert torch.allclose(ends[1]["model"][key], value, rtol=0, atol=1e-6)
            losses = [[metrics["train_loss"] for metrics in end["metrics"]] for end in ends]
            assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 3)
    monkeypatch.setattr(distributed, "replicate", lambda model, device: model)
    with pytest.raises(ValueError, match="batch_size=4 must be divisible by 6, twice the number of ranks"):
        start("sgd")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py"]
# Eight epochs of six steps, and with ε from the whole batch and without BatchNorm one result for all ranks.
ARGUMENTS = ["protocol=quick", "batch_size=216", "epochs=8", "method=sam", "method.sync_perturbation=true"]
ARGUMENTS += [
    "checkpoint.every_epochs=1",
    "model=timm",
    "model.name=vit_tiny_patch16_224",
    "+model.patch_size=4",
    "+model.depth=2",
    "+model.embed_dim=96",
    "optimizer.lr=0.01",
]


@pytest.fixture
def started(start_process):
    def start(outputs):
        """torchrun as a process of its own; what it prints goes to outputs/log."""
        outputs.mkdir(exist_ok=True)
        with (outputs / "log").open("a") as log:
            environment = os.environ | {"HYDRA_FULL_ERROR": "0"}  # run_train leaves another there
            command = [*TORCHRUN, *ARGUMENTS, f"outputs={outputs}"]
            return start_process(command, env=environment, stdout=log, stderr=log)

    return start


def epochs_in(outputs):
    return sum(path.read_text().count("\n") for path in outputs.glob("*/metrics.jsonl"))


def ranks_of(process):
    listed = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.slow
def test_torchrun_killed_interrupted_and_resumed_in_one_process(tmp_path, run_train, monkeypatch, started):
    """Rank 1 is killed; on two ranks again, told to end; in one process, told to end; on two, to the last."""
    whole, outputs = tmp_path / "whole", tmp_path / "outputs"
    run_train(*ARGUMENTS, f"outputs={whole}")

    job = started(outputs)
    wait_until(lambda: epochs_in(outputs) >= 1)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    assert job.wait(40) != 0  # torchrun gives the others 30 s

    reached = epochs_in(outputs)
    job = started(outputs)
    wait_until(lambda: epochs_in(outputs) > reached)
    job.send_signal(signal.SIGTERM)  # torchrun passes it on
    assert job.wait(60) != 0
    (folder,) = outputs.glob("*/")
    assert "Connection closed" not in (outputs / "log").read_text().split("steps on")[-1]
    steps = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]["optimizer"]["param_groups"][
        0
    ]["rst"]["steps"]
    assert steps >= 6 * (reached + 1)

    reached = epochs_in(outputs)
    append = Run.append

    def append_and_interrupt(run, metrics):
        append(run, metrics)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "append", append_and_interrupt)
    with pytest.raises(SystemExit) as ended:
        run_train(*ARGUMENTS, f"outputs={outputs}")
    assert ended.value.code == 128 + signal.SIGINT and epochs_in(outputs) == reached + 1

    assert started(outputs).wait(300) == 0
    result, expected = (
        json.loads(only(where.glob("*/result.json")).read_text()) for where in (outputs, whole)
    )
    assert result["ranks"] == "2+1" and expected["ranks"] == "1"
    assert (result["steps"], result["propagations"]) == (48, 96)
    assert result["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-2)  # float32, 48 steps
    log = (outputs / "log").read_text()
    assert log.count("the first") == 2 and f'File "{ROOT}/rst' not in log  # no traceback of ours
    assert "error: another rank has ended" in log


@pytest.fixture
def under_torchrun(monkeypatch):
    values = {"TORCHELASTIC_RUN_ID": "1", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    yield
    logging.disable(logging.NOTSET)


def test_a_rank_has_the_gpu_of_its_number_on_the_machine(under_torchrun, monkeypatch):
    assert distributed.is_launched() and not distributed.is_first()
    assert distributed.device_of_rank("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.device_of_rank("auto") == distributed.device_of_rank("cuda") == "cuda:1"
    with pytest.raises(ValueError, match="under torchrun device must be auto, cuda or cpu, got cuda:0"):
        distributed.device_of_rank("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"4 processes for 2 GPUs: use --nproc_per_node=2"):
        distributed.device_of_rank("cuda")


def test_a_sweep_under_torchrun_is_refused(under_torchrun, run_train, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: torchrun is for one run on several devices"):
        run_train("-m", "protocol=quick", "seed=0,1", f"outputs={tmp_path}")
    assert not list(tmp_path.glob("digits*"))


def test_shares_of_a_batch_make_the_batch():
    """With mixup's partners, and cutout's square of the whole batch."""
    augment = Augment(flip=True, crop_padding=1, cutout=2, mixup=1.0, per_batch=True)
    arguments = some_data(n=31), 12, augment, 3, 1
    for whole, *shares in zip(
        train_batches(*arguments),
        *(train_batches(*arguments, rank=r, ranks=3) for r in range(3)),
        strict=True,
    ):
        # Each share is some of the front and, mirrored, of the back.
        for part, shared in zip(whole, zip(*shares, strict=True), strict=True):
            front, back = [s[:2] for s in shared], [s[2:] for s in reversed(shared)]
            assert torch.equal(torch.cat([*front, *back]), part)
