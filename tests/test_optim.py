"""The update rule: many steps against the float64 twin of `reference`, and its limits."""

import math

import pytest
import pytorch_optimizer
import reference
import torch
from reference import (
    BASES,
    WAYS,
    assert_close,
    assert_same_bits,
    by_passes,
    loss_of,
    network,
    sgd,
    state,
    take_steps,
)

from rst import RST, Constant, Cosine, Linear, Periodic, Piecewise

STEPS = 50

# p(t) is written out a second time so that a slip in a schedule cannot hide in both columns.
SCHEDULES = {
    "constant": (Constant(0.4), lambda t, T: 0.4),
    "sam": (Constant(1.0), lambda t, T: 1.0),
    "piecewise": (Piecewise(0.2, 0.9, 0.3), lambda t, T: 0.2 if t <= 0.3 * T else 0.9),
    "linear": (Linear(0.0, 1.0), lambda t, T: t / T),
    "trigonometric": (Cosine(0.9, 0.1), lambda t, T: 0.5 + 0.4 * math.cos(math.pi * t / T)),
    "periodic": (Periodic(3), lambda t, T: 1.0 if t % 3 == 0 else 0.0),
}


def assert_twins_agree(schedule, base, steps, way=by_passes, **rule):
    """Weights, buffers, decisions and random numbers.

    Both round differently, by 1e-16 of numbers of order 1 a step. On one machine the largest difference
    after 200 steps is 3e-15, so 1e-10 leaves room for any other's arithmetic.
    """
    fast_schedule, p = SCHEDULES[schedule]
    # ASAM's ε is rescaled by |θ|, so it takes a larger ρ to matter as much.
    rho = 0.5 if rule.get("adaptive") else 0.1

    twin = network()
    torch.manual_seed(5)
    expected = reference.train(
        twin, BASES[base](twin.parameters()), lambda t: loss_of(twin, t), p, steps, rho=rho, seed=3, **rule
    )
    noise = torch.get_rng_state()

    model = network()
    torch.manual_seed(5)
    optimizer = RST(
        BASES[base](model.parameters()), fast_schedule, steps, rho=rho, module=model, seed=3, **rule
    )
    assert take_steps(model, optimizer, steps, way=way) == expected
    assert_close(state(model), state(twin))
    assert torch.equal(torch.get_rng_state(), noise)
    assert (optimizer.steps, optimizer.sam_steps) == (steps, sum(expected))
    assert optimizer.propagations == steps + sum(expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mix", ["gradient", "normalized"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0], ids="gamma{}".format)
def test_update_rule(gamma, adaptive, mix, way):
    base = "sgd" if mix == "gradient" else "adamw"
    assert_twins_agree("linear", base, 40, WAYS[way], gamma=gamma, adaptive=adaptive, mix=mix)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule, base):
    assert_twins_agree(schedule, base, 100, gamma=0.5)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_rho_is_per_group(adaptive):
    """A group's ε has the group's ρ, the norm goes over all groups; a ρ of the base's groups is kept."""

    def groups(model):
        return [{"params": model[0].parameters(), "rho": 0.02}, {"params": model[1:].parameters()}]

    twin = network()
    rule = {"rho": [0.02, 0.3], "adaptive": adaptive}
    torch.manual_seed(5)
    reference.train(twin, sgd(groups(twin)), lambda t: loss_of(twin, t), lambda t, T: 1.0, 20, **rule)
    model = network()
    torch.manual_seed(5)
    optimizer = RST(sgd(groups(model)), Constant(1.0), 20, rho=0.3, adaptive=adaptive, module=model)
    take_steps(model, optimizer, 20)
    assert_close(state(model), state(twin))


@pytest.mark.parametrize("base", BASES)
def test_p_zero_is_the_base_optimizer(base):
    alone = network(torch.float32)
    torch.manual_seed(5)
    optimizer = BASES[base](alone.parameters())
    for t in range(STEPS):
        optimizer.zero_grad()
        loss_of(alone, t, torch.float32)
        optimizer.step()
    noise = torch.get_rng_state()

    model = network(torch.float32)
    torch.manual_seed(5)
    optimizer = RST(BASES[base](model.parameters()), Constant(0.0), STEPS, gamma=0.5, module=model)
    take_steps(model, optimizer, STEPS, dtype=torch.float32)
    assert_same_bits(state(model), state(alone))
    assert torch.equal(torch.get_rng_state(), noise)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_p_one_gamma_one_is_sam(adaptive):
    """Neither BatchNorm nor dropout here: the other implementation takes care of neither."""
    steps = 50
    theirs = network(torch.float32, plain=True)
    sam = pytorch_optimizer.SAM(
        theirs.parameters(),
        torch.optim.SGD,
        rho=0.2,
        adaptive=adaptive,
        lr=0.05,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-3,
    )
    for t in range(steps):
        sam.zero_grad()
        loss_of(theirs, t, torch.float32)
        sam.step(lambda t=t: loss_of(theirs, t, torch.float32))

    model = network(torch.float32, plain=True)
    optimizer = RST(sgd(model.parameters()), Constant(1.0), steps, rho=0.2, adaptive=adaptive, module=model)
    take_steps(model, optimizer, steps, dtype=torch.float32)
    assert_close(state(model), state(theirs), rtol=1e-6, atol=1e-6)


def test_linear_without_slope_is_constant():
    models = []
    for schedule in Linear(0.3, 0.3), Constant(0.3):
        models.append(network(torch.float32))
        torch.manual_seed(5)
        optimizer = RST(sgd(models[-1].parameters()), schedule, STEPS, gamma=1.7, module=models[-1])
        take_steps(models[-1], optimizer, STEPS, dtype=torch.float32)
        assert 0 < optimizer.sam_steps < STEPS
    assert_same_bits(*map(state, models))
