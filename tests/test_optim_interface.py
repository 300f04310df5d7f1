"""RST as a torch optimizer: calls, counters, arguments, schedulers."""

import gc
import math
import re
import warnings
import weakref

import pytest
import torch
from reference import assert_close, assert_same_bits, loss_of, network, sgd, state, take_steps

from rst import RST, Constant, Linear, Periodic, uniform


def test_a_plain_function_is_a_schedule():
    model = network()

    def late(step, total_steps):
        return 1.0 if step >= total_steps - 3 else 0.0

    X = take_steps(model, RST(sgd(model.parameters()), late, 10, module=model), 10)
    assert X == [False] * 7 + [True] * 3


def test_the_coin_decides():
    model = network()
    optimizer = RST(sgd(model.parameters()), Linear(1.0, 0.2), 50, module=model, seed=11)
    assert take_steps(model, optimizer, 50) == [uniform(11, t) < 1 - 0.8 * t / 50 for t in range(50)]


def test_loss_is_the_clean_pass_s():
    model = network()
    torch.manual_seed(5)
    expected = loss_of(model, 0).item()
    model = network()
    torch.manual_seed(5)
    optimizer = RST(sgd(model.parameters()), Constant(1.0), 1, rho=1.0, module=model)
    seen = []

    def closure():
        seen.append(loss_of(model, 0))
        return seen[-1]

    assert float(optimizer.gradient(closure)) == expected
    # With ρ = 1 the passes differ, or the line above would prove nothing.
    assert seen[0].item() == expected != seen[1].item()


def test_closures_have_gradients_enabled():
    """Whatever they are called in, as `torch.optim` does."""
    model, other = network(), network()
    for m, mode in (model, torch.no_grad), (other, torch.enable_grad):
        optimizer = RST(sgd(m.parameters()), Constant(1.0), 1, module=m)
        torch.manual_seed(5)
        with mode():
            optimizer.step(lambda m=m: loss_of(m, 0))
    assert_same_bits(state(model), state(other))


@pytest.mark.parametrize("sampling", ["independent", "systematic"])
def test_attributes_of_the_coin_may_be_changed(sampling):
    model = network()
    optimizer = RST(sgd(model.parameters()), 0.0, 10, module=model, sampling=sampling)
    take_steps(model, optimizer, 10)
    optimizer.schedule, optimizer.total_steps = Constant(1.0), 15
    take_steps(model, optimizer, 5)
    assert (optimizer.steps, optimizer.sam_steps) == (15, 5)


def test_stepping_past_the_end():
    model = network()
    optimizer = RST(sgd(model.parameters()), Constant(0.5), 17, module=model)
    take_steps(model, optimizer, 17)
    before = state(model)
    with pytest.raises((ValueError, RuntimeError), match=r"17\b") as caught:
        optimizer.gradient(lambda: loss_of(model, 17))
    # Both numbers: the step asked for (counted from 0 or from 1) and the total.
    assert len(re.findall(r"\b1[78]\b", str(caught.value))) >= 2
    assert optimizer.steps == 17
    assert_same_bits(state(model), before)


def test_matched_gamma():
    """1/mean p over the run's steps, so Linear(0, 1), whose mean over T steps is (T−1)/2T, gives 2T/(T−1)."""

    def gamma(schedule, T):
        return RST(sgd(network().parameters()), schedule, T, gamma="matched").gamma

    assert gamma(Constant(0.25), 40) == pytest.approx(4, rel=1e-14)
    assert gamma(Constant(1.0), 40) == 1
    assert gamma(Linear(0.0, 1.0), 40) == pytest.approx(80 / 39, rel=1e-14)
    assert gamma(Periodic(5), 40) == pytest.approx(5, rel=1e-14)
    assert gamma(lambda t, T: 0.5 if t < T / 2 else 0.0, 40) == pytest.approx(4, rel=1e-14)
    with pytest.raises(ValueError, match="matched"):
        gamma(Constant(0.0), 40)


def test_matched_gamma_is_the_one_used():
    models = []
    for gamma in "matched", 2.5:
        models.append(network())
        torch.manual_seed(5)
        optimizer = RST(sgd(models[-1].parameters()), Constant(0.4), 30, gamma=gamma, module=models[-1])
        take_steps(models[-1], optimizer, 30)
    assert_close(*map(state, models))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rho": -1.0}, ["rho", "-1"]),
        ({"rho": math.nan}, ["rho", "nan"]),
        ({"gamma": 0.0}, ["gamma", "0"]),
        ({"gamma": -0.5}, ["gamma", "-0.5"]),
        ({"gamma": "mached"}, ["gamma", "mached", "matched"]),
        ({"mix": "mean"}, ["mix", "mean", "gradient", "normalized"]),
        ({"total_steps": 0}, ["total_steps", "0"]),
        ({"seed": -1}, ["seed", "-1"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_invalid_arguments(wrong, words):
    arguments = {"schedule": Constant(0.5), "total_steps": 10} | wrong
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        RST(sgd(network().parameters()), **arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_base_that_is_wrapped_again_is_perturbed_by_the_new_rho():
    model = network(plain=True)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    base = sgd(model.parameters())
    for rho in 0.05, 0.5:
        for which in RST(base, Constant(1.0), 10, rho=rho, module=model).passes():
            loss_of(model, 0)
            if which == "perturbed":
                moved = torch.cat([p.detach().flatten() for p in model.parameters()])
                assert (moved - theta).norm().item() == pytest.approx(rho)
        base.zero_grad()


def test_invalid_rho_of_a_group():
    model = network()
    with pytest.raises(ValueError, match=r"rho.*-2"):
        RST(sgd([{"params": model.parameters(), "rho": -2.0}]), Constant(0.5), 10)


def test_learning_rate_scheduler():
    """Attached to RST it drives the base, and without torch's warning about the order of the calls."""
    model, alone = network(), network()
    optimizer, base = RST(sgd(model.parameters()), Constant(0.0), 10, module=model), sgd(alone.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10) for o in (optimizer, base)]
        for t in range(10):
            torch.manual_seed(t)
            optimizer.step(lambda t=t: loss_of(model, t))
            torch.manual_seed(t)
            base.zero_grad()
            loss_of(alone, t)
            base.step()
            for scheduler in schedulers:
                scheduler.step()
            assert optimizer.base.param_groups[0]["lr"] == base.param_groups[0]["lr"] < 0.05
    assert_same_bits(state(model), state(alone))


def test_a_schedule_that_gives_no_probability_is_refused():
    for p in (1.5, -0.1, float("nan")):
        model = network()
        optimizer = RST(sgd(model.parameters()), lambda step, total_steps, p=p: p, 10, module=model)
        with pytest.raises(ValueError, match="no probability"):
            optimizer.step(lambda model=model: loss_of(model, 0))


def test_a_finished_optimizer_is_freed_at_once():
    model = network()
    optimizer = RST(sgd(model.parameters()), Constant(1.0), 10, module=model)
    optimizer.step(lambda: loss_of(model, 0))
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
