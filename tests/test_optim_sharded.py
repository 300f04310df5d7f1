"""RST with sharded parameters: fully_shard (FSDP2) and tensor parallelism, in one process and in two."""

import copy
import os
from datetime import timedelta

import pytest
import reference
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from reference import adamw, assert_close, assert_same_bits, batches, sgd
from test_rivals import RIVALS
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from rst import RST

pytestmark = pytest.mark.slow

STEPS, SEED, RANKS = 6, 2, 2
CASES = {
    "sam": {},
    "gnp": {"gamma": 0.5},
    "asam": {"gamma": 2.0, "adaptive": True},
    "normalized": {"gamma": 2.0, "mix": "normalized"},
    "zeroing": {"gamma": 2.0},
}
SOME = ["asam", "zeroing"]
CHECKPOINTS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


def build(kind) -> nn.Sequential:
    """One of two ranks has less of the head than the other, and nothing of the slope."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.up = nn.Linear(6, 8)
    model.act = nn.Tanh()
    model.down = nn.Linear(8, 6)
    model.norm = nn.LayerNorm(6)
    model.head = nn.Linear(6, 3)
    if kind != "parallel":
        model.slope = nn.PReLU(init=0.7)
    return model.double()


def sharded(model, mesh):
    for layer in model.up, model.down:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def parallel(model, mesh):
    """The LayerNorm's gradients are sums still to be made over the ranks. A slope stays a plain tensor."""
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "head": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def both(model, mesh):
    """Tensor parallelism, sharded over a second dimension of the mesh (of one rank, as two are all)."""
    mesh = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "tensor"))
    return fully_shard(parallel(model, mesh["tensor"]), mesh=mesh["data"])


KINDS = {"sharded": sharded, "parallel": parallel, "partly parallel": parallel, "both": both}
RUNS = [(1, kind, case) for kind in KINDS for case in SOME]
RUNS += [(RANKS, kind, case) for kind in KINDS for case in (SOME if kind == "partly parallel" else CASES)]


# With tensor parallelism some gradients are sums still to be made over the ranks.
SHARDED_RIVALS = [("sharded", name) for name in RIVALS] + [("parallel", "looksam"), ("parallel", "vsam")]


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(model):
    return [full(p).detach().clone() for p in model.parameters()]


def loss_of(model, kind, t):
    """With sharded parameters a rank has its part of the batch, with tensor parallelism all of it."""
    x, y = (tensor[t] for tensor in batches())
    if kind == "sharded":
        x, y = (tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in (x, y))
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def start(kind, p=0.5, **rule):
    model = KINDS[kind](build(kind), init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, RST(adamw(model.parameters()), p, 2 * STEPS, rho=0.3, module=model, seed=SEED, **rule)


def train(kind, case):
    model, optimizer = start(kind, **CASES[case])

    def closure(t):
        if "zeroing" in case:
            optimizer.zero_grad()
        return loss_of(model, kind, t)

    for t in range(STEPS):
        optimizer.step(lambda t=t: closure(t))
    return {"weights": weights(model), "sam_steps": optimizer.sam_steps}


def train_twin(kind, p, **rule):
    """The coins and the weights of the reference, in one process."""
    twin = build(kind)
    X = reference.train(
        twin,
        adamw(twin.parameters()),
        lambda t: reference.loss_of(twin, t),
        lambda t, T: p,
        STEPS,
        rho=0.3,
        seed=SEED,
        **rule,
    )
    return X, weights(twin)


def train_rival(name, model, closure):
    optimizer = RIVALS[name]((sgd if name == "msam" else adamw)(model.parameters()), module=model)
    for t in range(STEPS):
        optimizer.step(lambda t=t: closure(model, t))
    return {"weights": weights(model), "propagations": optimizer.propagations}


def look_again():
    """Weights after SAM steps whose body ends with a forward pass, after which parameters stay gathered."""
    model, optimizer = start("sharded", p=1.0, gamma=2.0)

    def closure(t):
        loss = loss_of(model, "sharded", t)
        with torch.no_grad():
            model(batches()[0][t])
        return loss

    for t in range(STEPS):
        optimizer.step(lambda t=t: closure(t))
    return weights(model)


def gradients_of_others():
    """Of a layer that RST does not have, after the clean pass and after the step, of an evaluated model."""
    model, _ = start("sharded")
    layers = (model.up, model.down)
    some = [p for layer in layers for p in layer.parameters()]
    optimizer = RST(sgd(some), 1.0, STEPS, rho=0.3, module=model)
    with torch.no_grad():
        model(batches()[0][0])
    for which in optimizer.passes():
        loss_of(model, "sharded", 0)
        if which == "clean":
            clean = full(model.head.weight.grad).clone()
    return clean, full(model.head.weight.grad)


def own_coin(kind, rank, turned):
    """What a step says where each rank has a coin of its own. `turned`: the parameters in the other order, so
    that another mesh comes first."""
    model, optimizer = start(kind)
    if turned:
        optimizer.param_groups[0]["params"].reverse()
    optimizer.seed = rank
    try:
        optimizer.step(lambda: loss_of(model, kind, 0))
    except ValueError as error:
        return str(error)
    return "accepted"


def collectives():
    """How often each kind is called in a plain step and in a SAM step, after the first step."""
    counts = []
    for p in 0.0, 1.0:
        model, optimizer = start("sharded", p)
        optimizer.step(lambda model=model: loss_of(model, "sharded", 0))
        with CommDebugMode() as log:
            optimizer.step(lambda model=model: loss_of(model, "sharded", 0))
        counts.append({str(kind): n for kind, n in log.get_comm_counts().items()})
    return counts


def resume(folder, options, make=RST):
    """Weights of a run that went on, and of one resumed from what the first had saved; the counters."""

    def begin():
        model, optimizer = start("sharded", gamma=2.0)
        return model, optimizer if make is RST else make(optimizer.base, module=model)

    model, optimizer = begin()
    for t in range(3):
        optimizer.step(lambda t=t: loss_of(model, "sharded", t))
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    again, resumed = begin()
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    if not options.full_state_dict:
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
        saved = get_optimizer_state_dict(again, resumed, options=options)
        dcp.load({"optimizer": saved}, checkpoint_id=folder)
    set_optimizer_state_dict(again, resumed, copy.deepcopy(saved), options=options)
    counters = [(o.steps, o.sam_steps, o.propagations) for o in (optimizer, resumed)]
    for m, o in (model, optimizer), (again, resumed):
        for t in range(3, STEPS):
            o.step(lambda m=m, t=t: loss_of(m, "sharded", t))
    return counters, weights(model), weights(again)


def zero_in_place(kind):
    model, optimizer = start(kind, p=1.0, gamma=2.0)
    before = weights(model)

    def closure():
        model.zero_grad(set_to_none=False)
        return loss_of(model, kind, 0)

    try:
        optimizer.step(closure)
    except RuntimeError as error:
        assert_same_bits(weights(model), before)
        return str(error)
    return "accepted"


def left_gradients(rank, value, has_step):
    """What a step says to gradients that were left on rank 0 alone: by a skipped step, or by another pass."""
    model, optimizer = start("sharded", p=1.0)
    loss_of(model, "sharded", 0)
    if has_step:
        optimizer.zero_grad()
        optimizer.gradient(lambda: loss_of(model, "sharded", 0))
    for p in model.parameters():
        p.grad.to_local().fill_(value if rank == 0 else 0.0)
    try:
        optimizer.gradient(lambda: loss_of(model, "sharded", 1))
    except RuntimeError as error:
        return str(error)
    return "accepted"


def work(rank, folder):
    """One process: first in a world of its own, then with the other; results go to a file."""
    torch.set_num_threads(1)
    results = {}
    for world in 1, RANKS:
        group = {"rank": rank, "world_size": RANKS} if world == RANKS else {"rank": 0, "world_size": 1}
        name = "together" if world == RANKS else f"alone{rank}"
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{name}", timeout=timedelta(minutes=2), **group
        )
        results[world] = {(kind, case): train(kind, case) for w, kind, case in RUNS if w == world}
        results[world]["zero in place"] = [zero_in_place(kind) for kind in KINDS]
        results[world]["look again"] = look_again()
        results[world]["others"] = gradients_of_others()
        if world == 1:
            dist.destroy_process_group()
    results["collectives"] = collectives()
    mesh = init_device_mesh("cpu", (RANKS,))
    for kind, name in SHARDED_RIVALS:
        model = KINDS[kind](build(kind), mesh)
        results[kind, name] = train_rival(name, model, lambda m, t, kind=kind: loss_of(m, kind, t))
    for name, options in CHECKPOINTS.items():
        results[name] = resume(f"{folder}/{name}", options)
        results[name, "rst-look"] = resume(f"{folder}/look-{name}", options, RIVALS["rst-look"])
    results["own coin"] = [own_coin(kind, rank, turned) for kind in KINDS for turned in (False, True)]
    results["skipped"] = left_gradients(rank, torch.inf, has_step=True)
    results["foreign"] = left_gradients(rank, 1.0, has_step=False)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # on a busy machine gloo's threads have aborted an orderly end


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A list over ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("world", "kind", "case"), RUNS)
def test_sharded_steps_are_those_of_one_process(world, kind, case, trained):
    """Of the whole batch, with the norm over all shards."""
    X, expected = train_twin(kind, 0.5, **CASES[case])
    assert 0 < sum(X) < STEPS
    for result in trained:
        assert result[world][kind, case]["sam_steps"] == sum(X)
        assert_close(result[world][kind, case]["weights"], expected)


@pytest.mark.parametrize(("kind", "name"), SHARDED_RIVALS)
def test_sharded_rivals_are_those_of_one_process(kind, name, trained):
    expected = train_rival(name, build(kind), lambda model, t: reference.loss_of(model, t))
    for result in trained:
        assert result[kind, name]["propagations"] == expected["propagations"]
        assert_close(result[kind, name]["weights"], expected["weights"])


def test_a_sam_step_gathers_and_scatters_twice_as_often(trained):
    """Parameters are gathered anew for each pass, and no more; the norm is one all-reduce."""
    for result in trained:
        plain, sam = result["collectives"]
        kinds = [kind for kind in plain if "gather" in kind or "scatter" in kind]
        assert len(kinds) == 2 and all(plain[kind] > 0 for kind in kinds)
        assert {kind: sam[kind] for kind in kinds} == {kind: 2 * plain[kind] for kind in kinds}
        assert sum(n for kind, n in sam.items() if kind not in kinds) <= 1


@pytest.mark.parametrize("name", [*CHECKPOINTS, *((name, "rst-look") for name in CHECKPOINTS)], ids=str)
def test_distributed_checkpoint(name, trained):
    for result in trained:
        counters, straight, resumed = result[name]
        assert counters[0] == counters[1] and counters[0][0] == 3
        assert_same_bits(straight, resumed)


@pytest.mark.parametrize("world", [1, RANKS])
def test_zeroing_in_place_is_refused(world, trained):
    for result in trained:
        assert all("zero_grad" in message for message in result[world]["zero in place"])


@pytest.mark.parametrize("world", [1, RANKS])
def test_the_perturbed_pass_gathers_theta_plus_eps_whatever_the_body_ends_with(world, trained):
    _, expected = train_twin("sharded", 1.0, gamma=2.0)
    for result in trained:
        assert_close(result[world]["look again"], expected)


@pytest.mark.parametrize("world", [1, RANKS])
def test_gradients_of_others_are_those_of_the_clean_pass(world, trained):
    for result in trained:
        assert_same_bits(*([grad] for grad in result[world]["others"]))


def test_ranks_with_coins_of_their_own_are_refused(trained):
    for result in trained:
        assert all("ranks must take the same SAM steps" in message for message in result["own coin"])


def test_ranks_agree_about_gradients_that_were_left(trained):
    """Else one would wait for the other for ever."""
    assert [result["skipped"] for result in trained] == ["accepted"] * RANKS
    assert all("outside" in result["foreign"] for result in trained)
