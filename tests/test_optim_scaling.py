"""Loss scaling, GradScaler and reduced precision on the CPU."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, assert_same_bits, batches, network, sgd, state

from rst import RST, Constant, Linear

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


def train_scaled(model, scaler, steps, autocast=None, **rule):
    """The usual loop with GradScaler; returns the optimizer."""
    inputs, labels = batches(torch.float32)
    optimizer = RST(sgd(model.parameters()), Linear(0.2, 1.0), steps, module=model, **rule)
    torch.manual_seed(5)
    for t in range(steps):

        def closure(t=t):
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(inputs[t]), labels[t])
            scaler.scale(loss).backward()
            return loss.detach()

        optimizer.gradient(closure)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return optimizer


@GAMMAS
def test_grad_scaler_changes_nothing_in_float32(gamma):
    models = network(torch.float32), network(torch.float32)
    for model, enabled in zip(models, [True, False], strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=7, enabled=enabled)
        optimizer = train_scaled(model, scaler, 40, gamma=gamma)
        assert 0 < optimizer.sam_steps < 40
    assert_close(*map(state, models), rtol=1e-6, atol=1e-6)


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
    assert optimizer.steps == 2
    assert scaler.get_scale() == 2.0**20
    assert all(x.isfinite().all() for x in state(model))
    model.zero_grad()  # these gradients are of the other optimizer
    train_scaled(model, scaler, 4, autocast=torch.float16)
    assert all(x.isfinite().all() for x in state(model))
    assert not torch.equal(model[0].weight, start[0])


def test_autocast_around_the_whole_step():
    """Its cache of low-precision weights must not outlive the exchange of the weights."""
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
        losses[place] = seen
    assert losses["around"] == losses["inside"]
    clean, perturbed = losses["around"]
    assert perturbed > clean + 1  # so it was a SAM step
