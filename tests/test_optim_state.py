"""Saving and resuming, copies, parameter groups."""

import copy
import pickle
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference import BASES, assert_same_bits, loss_of, network, sgd, state, take_steps
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from rst import RST, Constant, Linear


def build(base, steps=40):
    model = network()
    return model, RST(BASES[base](model.parameters()), Linear(0.2, 1.0), steps, gamma=0.5, module=model)


@pytest.mark.parametrize("base", BASES)
def test_state_dict_continues_identically(base, tmp_path):
    model, optimizer = build(base)
    torch.manual_seed(5)
    X = take_steps(model, optimizer, 20)
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], tmp_path / "state.pt")
    X += take_steps(model, optimizer, 20, start=20)

    again, resumed = build(base)
    states = torch.load(tmp_path / "state.pt")
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    torch.set_rng_state(states[2])
    expected = {"steps": 20, "sam_steps": sum(X[:20]), "propagations": 20 + sum(X[:20])}
    (group,) = states[1]["param_groups"]
    assert expected.items() <= group["rst"].items() == resumed.state_dict()["param_groups"][0]["rst"].items()
    assert take_steps(again, resumed, 20, start=20) == X[20:]
    assert_same_bits(state(again), state(model))
    assert resumed.propagations == optimizer.propagations


def test_groups_stay_the_base_s_after_loading():
    """`base.load_state_dict` puts new dicts in `param_groups`; an old reference would miss later changes."""
    model, optimizer = build("sgd")
    take_steps(model, optimizer, 5)
    saved = optimizer.state_dict()

    again, resumed = build("sgd")
    again.load_state_dict(model.state_dict())

    def shared():
        pairs = zip(resumed.param_groups, resumed.base.param_groups, strict=True)
        return all(a is b for a, b in pairs)

    assert shared()
    resumed.base.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    assert shared()
    resumed.load_state_dict(saved)
    assert shared()
    torch.optim.lr_scheduler.LambdaLR(resumed, lambda epoch: 0.0)
    before = [p.clone() for p in again.parameters()]
    take_steps(again, resumed, 1, start=5)
    assert_same_bits(list(again.parameters()), before)


def test_state_of_a_bare_base_can_be_loaded_into_the_base():
    bare = network()
    base = sgd(bare.parameters())
    loss_of(bare, 0)
    base.step()

    model, optimizer = build("sgd")
    model.load_state_dict(bare.state_dict())
    optimizer.base.load_state_dict(base.state_dict())
    take_steps(model, optimizer, 40)
    assert optimizer.sam_steps > 0


def test_state_without_counters_is_refused():
    _, optimizer = build("sgd")
    with pytest.raises(ValueError, match="base"):
        optimizer.load_state_dict(sgd(network().parameters()).state_dict())


def test_a_group_added_later():
    """It trains, and is perturbed, like a group that was there from the start."""
    model, other = network(), network()
    optimizer = RST(sgd(model[:4].parameters()), Constant(1.0), 5, module=model)
    optimizer.add_param_group({"params": model[4].parameters(), "rho": 0.3})
    groups = [{"params": other[:4].parameters()}, {"params": other[4].parameters(), "rho": 0.3}]
    for m, o in (model, optimizer), (other, RST(sgd(groups), Constant(1.0), 5, module=other)):
        torch.manual_seed(5)
        take_steps(m, o, 5)
    assert_same_bits(state(model), state(other))
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "rho": -1.0})


def test_groups_may_be_replaced():
    """As Lightning does to restore those that were unfrozen."""
    model = network()
    optimizer = RST(sgd(model.parameters()), 0.5, 10)
    first, *others = model.parameters()
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": part} for part in ([first], others)]
    assert [len(group["params"]) for group in optimizer.base.param_groups] == [1, len(others)]


def test_state_may_be_replaced():
    """To forget the momentum; nothing is forgotten in the making of an RST."""
    model = network()
    base = sgd(model.parameters())
    take_steps(model, RST(base, 1.0, 10, module=model), 2)
    optimizer = RST(base, 1.0, 10, module=model)
    assert len(base.state) == len(list(model.parameters()))
    optimizer.state = defaultdict(dict)
    assert len(base.state) == 0
    take_steps(model, optimizer, 1)


def test_a_copy_goes_on_by_itself():
    model = network(plain=True)  # no dropout
    optimizer = RST(sgd(model.parameters()), Constant(1.0), 10, module=model)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # it puts a `step` into the optimizer
    optimizer.step(lambda: loss_of(model, 0))
    model_copy, copied = copy.deepcopy((model, optimizer))
    for t in (1, 2):
        optimizer.step(lambda t=t: loss_of(model, t))
        copied.step(lambda t=t: loss_of(model_copy, t))
    assert_same_bits(state(model), state(model_copy))
    assert copied.propagations == optimizer.propagations == 6
    copied.load_state_dict(optimizer.state_dict())
    assert copied.param_groups is copied.base.param_groups is not optimizer.param_groups


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("bases", ["one", "two"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(bases, flat, tmp_path):
    """Also into an optimizer that was never asked for its state, whose own is then made by a step of lr 0."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def start():
        model = network(plain=True)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        if bases == "one":
            base = BASES["adamw"](model.parameters())
        else:
            base = [torch.optim.Muon(matrices, lr=0.01), BASES["adamw"](others)]
        return model, RST(base, Linear(0.2, 1.0), 40, gamma=0.5, module=model)

    model, optimizer = start()
    take_steps(model, optimizer, 10)
    counters = (optimizer.steps, optimizer.sam_steps, optimizer.propagations)
    assert 0 < optimizer.sam_steps < 10
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    weights = copy.deepcopy(model.state_dict())
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    saved = copy.deepcopy(saved)
    take_steps(model, optimizer, 10, start=10)

    for way in "files", "memory":
        again, resumed = start()
        theirs = saved
        if way == "files":
            theirs = get_optimizer_state_dict(again, resumed, options=options)
            dcp.load({"optimizer": theirs}, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(again, resumed, theirs, options=options)
        assert (resumed.steps, resumed.sam_steps, resumed.propagations) == counters
        again.load_state_dict(weights)
        take_steps(again, resumed, 10, start=10)
        assert_same_bits(state(again), state(model))


def test_hooks_of_state_dicts():
    """Each is called once, with RST, and may put another state in the place of its own."""
    model, optimizer = build("sgd")
    take_steps(model, optimizer, 3)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("before saving", o)))
    optimizer.register_state_dict_post_hook(
        lambda o, s: calls.append(("after saving", o)) or {**s, "mine": 1}
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: calls.append(("before loading", o)) or {k: v for k, v in s.items() if k != "mine"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(("after loading", o)))
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    optimizer.load_state_dict(saved)
    assert calls == [
        (when, optimizer) for when in ("before saving", "after saving", "before loading", "after loading")
    ]


@pytest.mark.parametrize(
    ("name", "other"),
    [("seed", {"seed": 1}), ("total_steps", {"total_steps": 50}), ("schedule", {"schedule": 0.5})],
)
def test_resuming_another_run_warns(name, other):
    """A plain function as a schedule is the same function, wherever in memory."""

    def start(**differences):
        arguments = {"schedule": Linear(0.0, 1.0), "total_steps": 40, "seed": 0} | differences
        return RST(sgd(network().parameters()), **arguments)

    saved = start().state_dict()
    with pytest.warns(UserWarning, match=f"{name}=") as caught:
        start(**other).load_state_dict(saved)
    assert len(caught) == 1


def test_resuming_the_same_run_does_not_warn():
    def schedule():
        return lambda step, total_steps: 0.5

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in Linear(0.0, 1.0), 0.5, schedule:
            saved, resumed = (
                RST(sgd(network().parameters()), p() if p is schedule else p, 40) for _ in range(2)
            )
            resumed.load_state_dict(saved.state_dict())


def test_a_state_with_numpy_s_integers_can_be_loaded(tmp_path):
    model = network()

    def schedule(step, total_steps):
        return np.interp(step, [0, total_steps], [0.5, 1.0])

    optimizer = RST(sgd(model.parameters()), schedule, total_steps=np.int64(40), seed=np.int64(1))
    take_steps(model, optimizer, 10)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))


class Counting(torch.optim.SGD):
    """Has a counter beside the states of its parameters, as MADGRAD does."""

    def step(self, closure=None):
        self.state["k"] = self.state.get("k", 0) + 1
        return super().step(closure)


def test_state_of_a_base_that_is_no_parameter_s():
    models = network(), network()
    optimizer, resumed = (
        RST([sgd(models[0].parameters()), Counting(models[1].parameters(), lr=0.1)], 0.5, 40)
        for _ in range(2)
    )
    for _ in range(3):
        optimizer.step(lambda: [loss_of(model, 0) for model in models])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.bases[1].state["k"] == 3


def test_going_back_to_a_checkpoint_after_the_loop():
    """As after a loss that is not finite: the gradient of the step that is not taken is dropped."""
    model = network()
    optimizer = RST(sgd(model.parameters()), 0.5, 40, module=model)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.gradient(lambda: loss_of(model, 0))
    optimizer.load_state_dict(saved)
    optimizer.step(lambda: loss_of(model, 0))
    assert optimizer.steps == 1


def test_pickle():
    """Of the whole optimizer, as multiprocessing sends it, with its model."""
    model = network(plain=True)
    optimizer = RST(sgd(model.parameters()), Linear(0.2, 1.0), 40, gamma=2.0, module=model)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # it puts a `step` into the optimizer
    take_steps(model, optimizer, 5)
    again, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in (model, optimizer), (again, resumed):
        take_steps(m, o, 5, start=5)
    assert_same_bits(state(again), state(model))
    assert resumed.propagations == optimizer.propagations


def test_other_groups_than_saved_are_refused():
    saved = build("sgd")[1].state_dict()
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters()}]
    with pytest.raises(ValueError, match="1 parameter groups, not 2"):
        RST(sgd(groups), 0.5, 40).load_state_dict(saved)
