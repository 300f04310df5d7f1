"""RST under DistributedDataParallel: two processes on the CPU, against the twin in one process."""

import copy
import itertools
import os
import warnings

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from by_hand import CountAveraging
from reference import assert_close, assert_same_bits, batches, network, sgd, state
from test_rivals import RIVALS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rst import RST, Linear, uniform

STEPS, SEED = 12, 2
RANKS = 2

# The rule; beside it how the model is wrapped, and whether the loop's body calls zero_grad().
CASES = {
    "sam": {"gamma": 1.0},
    "zeroing": {"gamma": 1.0},
    "gnp": {"gamma": 0.5},
    "normalized": {"gamma": 2.0, "mix": "normalized"},
    "batchnorm": {"gamma": 0.5},
    "bucket_view": {"gamma": 0.5},
    "bound_late": {"gamma": 0.5},
    "sync": {"gamma": 1.0, "sync_perturbation": True},
    "sync_asam": {"gamma": 0.5, "adaptive": True, "sync_perturbation": True},
    "sync_bucket_view": {"gamma": 0.5, "sync_perturbation": True},
    "sync_zeroing": {"gamma": 2.0, "sync_perturbation": True},
    "sync_static_graph": {"gamma": 0.5, "sync_perturbation": True},
}


# γ, sync_perturbation, gradient_as_bucket_view; for some heads only one of the passes has a gradient.
ROUTED = [
    (gamma, sync, as_views) for gamma in (1.0, 2.0) for sync in (False, True) for as_views in (False, True)
]


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


def train(case, rank, rule):
    """The weights and what happened."""
    model = build(case)
    options = {"gradient_as_bucket_view": "bucket_view" in case, "static_graph": "static_graph" in case}
    ddp = DistributedDataParallel(model, **options)
    averaging, reductions, losses = CountAveraging(ddp), [], []
    optimizer = RST(
        sgd(model.parameters()),
        Linear(0.2, 0.8),
        STEPS,
        module=model if case == "bound_late" else ddp,
        seed=SEED,
        rho=0.3,
        **rule,
    )
    optimizer.module = ddp
    for t in range(STEPS):
        before = averaging.times
        x, y = shard(t, rank, RANKS)
        for which in optimizer.passes():
            if "zeroing" in case:
                model.zero_grad()
            loss = loss_of(ddp, x, y)
            if which == "clean":
                losses.append(loss.item())
        optimizer.step()
        reductions.append(averaging.times - before)
    return {
        "state": state(model),
        "reductions": reductions,
        "losses": losses,
        "sam_steps": optimizer.sam_steps,
    }


def train_rival(name, rank, ranks=RANKS):
    """The weights, propagations and reductions; the ranks' gradients are views of buckets."""
    model = build("rivals")
    if ranks > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        averaging = CountAveraging(model)
    optimizer = RIVALS[name](sgd(model.parameters()), module=model)
    for t in range(STEPS):
        x, y = shard(t, rank, ranks)
        for _ in optimizer.passes():
            n = optimizer.images(len(x))
            loss_of(model, x[:n], y[:n])
        optimizer.step()
    reductions = averaging.times if ranks > 1 else 0
    return [p.detach().clone() for p in model.parameters()], optimizer.propagations, reductions


class Heads(nn.Module):
    """One of three heads computes the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = network(plain=True)
        self.heads = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))

    def forward(self, x, head):
        return self.heads[head % 3](self.trunk(x))


def train_routed(rank, gamma, sync, as_views):
    """The weights after SAM steps in which ranks and passes use other heads."""
    model = Heads()
    ddp = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=as_views)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = RST(base, 1.0, 6, rho=0.3, gamma=gamma, sync_perturbation=sync, module=ddp)
    for t in range(6):
        x, y = shard(t, rank, RANKS)
        for which in optimizer.passes():
            F.cross_entropy(ddp(x, rank + t + (which == "perturbed")), y).backward()
        optimizer.step()
    return state(model)


def expected_routed(gamma, sync):
    """Of a model a rank, whose final gradients are averaged; with sync of one model with both losses."""
    models = [Heads() for _ in range(1 if sync else RANKS)]
    for t in range(6):
        gradients = []
        for number, model in enumerate(models):
            ranks, numbers = range(RANKS) if sync else [number], itertools.count()

            def closure(model=model, ranks=ranks, numbers=numbers, t=t):
                k = next(numbers)
                losses = []
                for rank in ranks:
                    x, y = shard(t, rank, RANKS)
                    losses.append(F.cross_entropy(model(x, rank + t + k), y))
                loss = sum(losses) / len(losses)
                loss.backward()
                return loss

            params = list(model.parameters())
            rho = [0.3] * len(params)
            gradients.append(reference.gradient(model, params, closure, sam=True, rho=rho, gamma=gamma).g)
        for model in models:
            with torch.no_grad():
                for p, *gs in zip(model.parameters(), *gradients, strict=True):
                    p -= 0.1 * sum(torch.zeros_like(p) if g is None else g for g in gs) / len(models)
    return state(models[0])


def others(rank):
    """Gradients of parameters in no base: of the clean pass, and after the loop."""
    model = build("others")
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    first, *rest = model.parameters()
    optimizer = RST(sgd([first]), 1.0, STEPS, rho=1.0, module=ddp, sync_perturbation=True)
    for which in optimizer.passes():
        loss_of(ddp, *shard(0, rank, RANKS))
        if which == "clean":
            clean = [p.grad.clone() for p in rest]
    return clean, [p.grad.clone() for p in rest]


def train_unwrapped(rank):
    """`module` is not the wrapper. The warnings of three steps, and the weights."""
    ddp = DistributedDataParallel(build("raw"))
    optimizer = RST(sgd(ddp.parameters()), 1.0, STEPS, module=ddp.module, rho=0.3, gamma=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for t in range(3):
            x, y = shard(t, rank, RANKS)
            optimizer.step(lambda x=x, y=y: loss_of(ddp, x, y))
    return [str(warning.message) for warning in caught], state(ddp.module)


def buffers(rank, sync_perturbation):
    """After each SAM step: those of RST, and those of the same steps in plain DistributedDataParallel."""
    first, second = DistributedDataParallel(build("batchnorm")), DistributedDataParallel(build("batchnorm"))
    base = torch.optim.SGD(first.parameters(), lr=0.1)
    optimizer = RST(base, 1.0, STEPS, module=first, gamma=0.5, sync_perturbation=sync_perturbation)
    pairs = []
    for t in range(3):
        with torch.no_grad():
            for p, q in zip(first.parameters(), second.parameters(), strict=True):
                q.copy_(p)
        x, y = shard(t, rank, RANKS)
        optimizer.step(lambda x=x, y=y: loss_of(first, x, y))
        loss_of(second, x, y)
        pairs.append([[b.clone() for b in ddp.module.buffers()] for ddp in (first, second)])
    return pairs


def refusals(rank):
    """What is refused, with the message, and whether the weights are where they were."""
    x, y = shard(0, rank, RANKS)

    def attempt(zeroing=False, all_parameters=True, seed=0, **options):
        model = build("refused")
        ddp = DistributedDataParallel(model, **options)
        params = list(model.parameters())
        own = sgd(params if all_parameters else params[:2])
        optimizer = RST(own, 1.0, 10, module=ddp, gamma=0.5, seed=seed)

        def closure():
            if zeroing:
                model.zero_grad()
            return loss_of(ddp, x, y)

        try:
            optimizer.step(closure)
        except (RuntimeError, ValueError) as error:
            same = all(map(torch.equal, params, build("refused").parameters()))
            return f"{error}" if same else "the weights moved"
        return "accepted"

    return {
        "zeroed": attempt(zeroing=True),
        "static_graph": attempt(static_graph=True),
        "others": attempt(all_parameters=False),
        "seeds": attempt(seed=rank),
    }


def train_rank(rank, folder):
    """One process: every case in turn; results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {case: train(case, rank, rule) for case, rule in CASES.items()}
    results["rivals"] = {name: train_rival(name, rank) for name in RIVALS}
    results["routed"] = {case: train_routed(rank, *case) for case in ROUTED}
    results["others"] = others(rank)
    results["unwrapped"] = train_unwrapped(rank)
    results["buffers"] = [buffers(rank, sync) for sync in (False, True)]
    results["refusals"] = refusals(rank)
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


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_in_two_processes(name, trained):
    """The ranks agree; and where ε does not depend on a rank's own images, on what one process does. A pass
    whose gradient is used, or stored, is averaged."""
    weights, propagations, _ = train_rival(name, 0, ranks=1)
    (zeroth, *others), (first, *same) = (result["rivals"][name] for result in trained)
    assert_same_bits(zeroth, first)
    assert others == same and others[0] == propagations
    averaged = STEPS if name == "partial" else propagations
    assert others[1] == averaged
    if name != "partial":
        assert_close(zeroth, weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gamma", "sync", "as_views"), ROUTED)
def test_parameters_that_one_pass_does_not_use(gamma, sync, as_views, trained):
    """As in a mixture of experts. A gradient that is missing is zero."""
    weights = expected_routed(gamma, sync)
    for result in trained:
        assert_close(result["routed"][gamma, sync, as_views], weights, rtol=1e-12, atol=1e-12)


def test_gradients_of_parameters_in_no_base_are_the_clean_pass_s(trained):
    for result in trained:
        assert_same_bits(*result["others"])


def test_module_that_is_not_the_wrapper(trained):
    """One warning that says what to set; until then both passes are averaged, so it is SAM on the whole
    batch."""
    twin = build("raw")
    reference.train(
        twin,
        sgd(twin.parameters()),
        lambda t: reference.loss_of(twin, t),
        lambda t, T: 1.0,
        3,
        rho=0.3,
        gamma=0.5,
    )
    for result in trained:
        messages, weights = result["unwrapped"]
        assert len(messages) == 1
        assert "optimizer.module" in messages[0] and "DistributedDataParallel" in messages[0]
        assert_close(weights, state(twin), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sync_perturbation", [False, True])
def test_buffers_are_those_of_a_plain_step(sync_perturbation, trained):
    """On every rank; rank 0 sends its own to the others when the next step begins."""
    for result in trained:
        for ours, plain in result["buffers"][sync_perturbation]:
            assert_same_bits(ours, plain)
    last = [result["buffers"][sync_perturbation][-1][0] for result in trained]
    assert not torch.equal(last[0][0], last[1][0])


def test_what_is_refused(trained):
    words = {"zeroed": "zero_grad", "static_graph": "static_graph=False", "others": "trainable parameters"}
    words |= {"seeds": "the same SAM steps"}
    for result in trained:
        assert result["refusals"].keys() == words.keys()
        for case, message in result["refusals"].items():
            assert words[case] in message
