"""Loss scaling, GradScaler and reduced precision on the CPU."""

from contextlib import nullcontext

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_close, assert_same_bits, batches, loss_of, network, sgd, state
from torch import nn

from rst import RST, Constant, Linear, uniform

GAMMAS = pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**16], ids=["tiny", "large"])
def test_perturbation_is_invariant_to_loss_scale(scale, adaptive):
    """A constant added to the norm, as others do against division by zero, would show at the tiny scale."""
    seen = {1.0: [], scale: []}
    gradients = {}
    for s, thetas in seen.items():
        model = network(torch.float32, plain=True)

        def closure(s=s, model=model, thetas=thetas):
            thetas.append([p.detach().clone() for p in model.parameters()])
            loss = s * F.cross_entropy(model(batches(torch.float32)[0][0]), batches()[1][0])
            loss.backward()
            return loss

        optimizer = RST(sgd(model.parameters()), Constant(1.0), 1, rho=0.5, gamma=0.5, adaptive=adaptive)
        optimizer.gradient(closure)
        gradients[s] = [p.grad / s for p in model.parameters()]
    # Scaling by a power of two is exact, so ε may not even round differently.
    assert_same_bits(seen[scale][1], seen[1.0][1])
    assert not torch.equal(seen[scale][0][0], seen[scale][1][0])
    assert_close(gradients[scale], gradients[1.0], rtol=1e-6, atol=1e-7)


def train_scaled(model, scaler, steps, autocast=None, max_norm=None, max_lr=None, **rule):
    """The usual loop with GradScaler, clipping and a schedule of the learning rate; returns the optimizer."""
    inputs, labels = batches(torch.float32)
    optimizer = RST(sgd(model.parameters()), Linear(0.2, 1.0), steps, module=model, **rule)
    scheduler = max_lr and torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=steps)
    torch.manual_seed(5)
    for t in range(steps):
        for _ in optimizer.passes():
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(inputs[t]), labels[t])
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        if scheduler:
            scheduler.step()
    return optimizer


@GAMMAS
@pytest.mark.parametrize("usual", [{}, {"max_norm": 0.3, "max_lr": 0.2}], ids=["alone", "clipping, OneCycle"])
def test_grad_scaler_changes_nothing_in_float32(usual, gamma):
    models = network(torch.float32), network(torch.float32)
    for model, enabled in zip(models, [True, False], strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=7, enabled=enabled)
        optimizer = train_scaled(model, scaler, 40, gamma=gamma, **usual)
        assert 0 < optimizer.sam_steps < 40
    assert_close(*map(state, models), rtol=1e-6, atol=1e-6)


@GAMMAS
def test_clipping_and_one_cycle(gamma):
    """Against the twin, whose final gradient is clipped: once, after the mix."""
    steps, rule = 40, {"gamma": gamma, "rho": 0.2}
    model, twin = network(), network()
    inputs, labels = batches()
    optimizer = RST(sgd(model.parameters()), Linear(0.2, 1.0), steps, module=model, **rule)
    base = sgd(twin.parameters())
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=steps) for o in (optimizer, base)]
    params, n_clipped = list(twin.parameters()), 0
    for t in range(steps):
        torch.manual_seed(t)
        for _ in optimizer.passes():
            F.cross_entropy(model(inputs[t]), labels[t]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch.manual_seed(t)
        reference.gradient(
            twin,
            params,
            lambda t=t: loss_of(twin, t),
            sam=uniform(0, t) < 0.2 + 0.8 * t / steps,
            rho=[0.2] * len(params),
            gamma=gamma,
        )
        n_clipped += nn.utils.clip_grad_norm_(params, 1.0) > 1.0
        base.step()
        for scheduler in schedulers:
            scheduler.step()
    assert 0 < n_clipped < steps
    assert_close(state(model), state(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_reduced_precision(dtype):
    """Near the run in full precision: a relative rounding of 2^-9 (bf16) a number, over 40 steps."""
    reduced, full = network(torch.float32), network(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    optimizer = train_scaled(reduced, scaler, 40, autocast=dtype)
    train_scaled(full, torch.amp.GradScaler("cpu", enabled=False), 40)
    assert optimizer.sam_steps > 0
    assert_close(state(reduced), state(full), rtol=0.05, atol=0.05)
    assert not torch.equal(reduced[0].weight, full[0].weight)


def test_overflow_in_float16_skips_the_step():
    """Scales above 65504 overflow in float16. GradScaler then skips steps until it has backed off enough."""
    model = network(torch.float32)
    start = list(map(torch.clone, model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-10)
    optimizer = train_scaled(model, scaler, 2, autocast=torch.float16)
    assert_same_bits(list(model.parameters()), start)
    assert optimizer.steps == 2  # the second was not refused for the gradients that the first had left
    assert scaler.get_scale() == 2.0**20
    assert all(x.isfinite().all() for x in state(model))
    model.zero_grad()  # these gradients are of the other optimizer
    train_scaled(model, scaler, 4, autocast=torch.float16)
    assert all(x.isfinite().all() for x in state(model))
    assert not torch.equal(model[0].weight, start[0])


def test_autocast_around_the_whole_step():
    """Its cache of low-precision weights must not outlive the move of the weights."""
    losses = {}
    for place in ("inside", "around"):
        model = network(torch.float32, plain=True)
        inputs, labels = (tensor[0] for tensor in batches())
        seen = []

        def closure(model=model, place=place, seen=seen, inputs=inputs, labels=labels):
            with torch.autocast("cpu", torch.bfloat16) if place == "inside" else nullcontext():
                loss = F.cross_entropy(model(inputs.float()), labels)
            seen.append(loss.item())
            loss.backward()
            return loss

        optimizer = RST(sgd(model.parameters()), Constant(1.0), 10, rho=5.0, module=model)
        with torch.autocast("cpu", torch.bfloat16) if place == "around" else nullcontext():
            optimizer.gradient(closure)
            optimizer.zero_grad()
            closure()  # at θ again
        losses[place] = seen
    assert losses["around"] == losses["inside"]
    clean, perturbed, again = losses["around"]
    assert again == clean
    assert perturbed > clean + 1  # so it was a SAM step
