"""RST under DistributedDataParallel: two processes on the CPU, against the twin in one process."""

import copy
import os

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference import assert_close, assert_same_bits, batches, network, sgd, state
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from rst import RST, Linear, uniform

STEPS, SEED = 12, 2
RANKS = 2

CASES = {
    "sam": {"gamma": 1.0},
    "gnp": {"gamma": 0.5},
    "normalized": {"gamma": 2.0, "mix": "normalized"},
    "batchnorm": {"gamma": 0.5},
    "bucket_view": {"gamma": 0.5},
    "sync": {"gamma": 1.0, "sync_perturbation": True},
    "sync_asam": {"gamma": 0.5, "adaptive": True, "sync_perturbation": True},
    "sync_bucket_view": {"gamma": 0.5, "sync_perturbation": True},
}


def build(case):
    """Dropout off: its draws would differ between one process and two."""
    model = network(plain=case != "batchnorm")
    if case == "batchnorm":
        model[3].p = 0.0
    return model


def shard(t, rank, ranks):
    inputs, labels = batches()
    return inputs[t].chunk(ranks)[rank], labels[t].chunk(ranks)[rank]


def loss_of(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def train_rank(rank, folder):
    """One process: every case in turn; weights and counts go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {}
    for case, rule in CASES.items():
        model = build(case)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view="bucket_view" in case)
        reductions, losses = [], []

        def count(group, bucket, reductions=reductions):
            reductions[-1] += 1
            return allreduce_hook(group, bucket)

        ddp.register_comm_hook(None, count)
        optimizer = RST(
            sgd(ddp.parameters()), Linear(0.2, 0.8), STEPS, module=ddp, seed=SEED, rho=0.3, **rule
        )
        for t in range(STEPS):
            reductions.append(0)
            x, y = shard(t, rank, RANKS)
            losses.append(optimizer.step(lambda x=x, y=y, ddp=ddp: loss_of(ddp, x, y)).item())
        results[case] = {
            "state": state(model),
            "reductions": reductions,
            "losses": losses,
            "sam_steps": optimizer.sam_steps,
        }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # on a busy machine gloo's threads have aborted an orderly end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A list over ranks."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(train_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def expected(case, sync_perturbation=False, **rule):
    """One model a rank: each perturbs along its own gradient, then the final ones are averaged.

    With sync_perturbation a single model on the whole batch. Returns rank 0's state, X_t and its losses.
    """
    ranks = 1 if sync_perturbation else RANKS
    models = [copy.deepcopy(build(case)) for _ in range(ranks)]
    bases = [sgd(model.parameters()) for model in models]
    X, losses = [], []
    for t in range(STEPS):
        X.append(uniform(SEED, t) < 0.2 + 0.6 * t / STEPS)
        passes = []
        for rank, model in enumerate(models):
            x, y = shard(t, rank, ranks)
            params = list(model.parameters())
            passes.append(
                reference.gradient(
                    model,
                    params,
                    lambda model=model, x=x, y=y: loss_of(model, x, y),
                    sam=X[-1],
                    rho=[0.3] * len(params),
                    **rule,
                )
            )
        losses.append([p.loss.item() for p in passes])
        average = [sum(parts) / ranks for parts in zip(*(p.g for p in passes), strict=True)]
        for model, base in zip(models, bases, strict=True):
            for p, g in zip(model.parameters(), average, strict=True):
                p.grad = g.clone()
            base.step()
    return state(models[0]), X, losses


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case, trained):
    """An all-reduce a step, two on SAM steps with sync_perturbation; weights to rounding."""
    weights, X, losses = expected(case, **CASES[case])
    assert 0 < sum(X) < STEPS
    zeroth, first = (results[case] for results in trained)
    n_params = len(list(build(case).parameters()))
    assert_same_bits(zeroth["state"][:n_params], first["state"][:n_params])
    assert_close(zeroth["state"], weights, rtol=1e-12, atol=1e-12)
    sync = CASES[case].get("sync_perturbation", False)
    for rank, result in enumerate((zeroth, first)):
        assert result["reductions"] == [1 + (sam and sync) for sam in X]
        assert result["sam_steps"] == sum(X)
        if not sync:
            assert result["losses"] == pytest.approx([loss[rank] for loss in losses], rel=1e-12)
