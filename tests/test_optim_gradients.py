"""Gradients that are infinite, zero, missing in a pass, or zeroed by the closure."""

import itertools

import pytest
import reference
import torch
from reference import assert_close, assert_same_bits, batches, loss_of, network, sgd, state
from torch import nn

from rst import RST, Constant

GAMMAS = pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])


def sam(model: nn.Module, **rule) -> RST:
    """An optimizer whose every step is a SAM step."""
    return RST(sgd(model.parameters()), Constant(1.0), 100, module=model, **rule)


@GAMMAS
@pytest.mark.parametrize("mix", ["gradient", "normalized"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("where", ["everywhere", "one entry"])
def test_infinite_gradient(where, adaptive, mix, gamma):
    """θ + ε is nan then. Neither θ nor the running statistics may keep any of it."""
    model, clean = network(torch.float32), network(torch.float32)
    torch.manual_seed(5)
    loss_of(clean, 0, torch.float32)

    def closure():
        loss = loss_of(model, 0, torch.float32)
        for p in model.parameters() if where == "everywhere" else [model[4].weight]:
            p.grad.view(-1)[0] = torch.inf
        return loss

    optimizer = sam(model, adaptive=adaptive, mix=mix, gamma=gamma)
    torch.manual_seed(5)
    optimizer.gradient(closure)
    assert_same_bits(state(model), state(clean))
    # GradScaler and clip_grad_norm_ must be able to see it.
    assert not model[4].weight.grad.isfinite().all()


@GAMMAS
@pytest.mark.parametrize("mix", ["gradient", "normalized"])
@pytest.mark.parametrize("zeroing", [False, True])
def test_gradient_missing_in_one_pass(zeroing, mix, gamma):
    """A missing gradient counts as zero; a parameter that no pass reaches keeps None and is not decayed."""

    def setting():
        torch.manual_seed(0)
        sizes = {"both": 4, "clean_only": 3, "perturbed_only": 3, "neither": 1}
        model = nn.ParameterDict({k: torch.randn(n, dtype=torch.float64) for k, n in sizes.items()})
        calls = itertools.count()

        def closure():
            if zeroing:
                nn.Module.zero_grad(model)
            reached = model["clean_only"] if next(calls) % 2 == 0 else model["perturbed_only"]
            loss = model["both"].sin().sum() * reached.cos().prod()
            loss.backward()
            return loss

        return model, closure

    twin, twin_closure = setting()
    model, closure = setting()
    optimizer = sam(model, gamma=gamma, mix=mix)
    params = list(twin.parameters())
    for _ in range(2):
        before = state(model)
        expected = reference.gradient(
            twin, params, twin_closure, sam=True, rho=[0.1] * 4, gamma=gamma, mix=mix
        ).g
        optimizer.zero_grad()
        optimizer.gradient(closure)
        assert_same_bits(state(model), before)
        assert [x is None for x in expected].count(True) == 1
        for p, x in zip(model.parameters(), expected, strict=True):
            assert (p.grad is None) == (x is None)
            if x is not None:
                torch.testing.assert_close(p.grad, x, rtol=1e-12, atol=1e-12)
    neither = model["neither"].clone()
    optimizer.step()
    assert torch.equal(model["neither"], neither)


@pytest.mark.parametrize("mix", ["gradient", "normalized"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_zero_gradient_has_no_perturbation(adaptive, mix):
    model = network(torch.float32)
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in model.parameters()])
        loss = 0 * model(batches(torch.float32)[0][0]).sum()
        loss.backward()
        return loss

    sam(model, adaptive=adaptive, mix=mix, gamma=0.5).gradient(closure)
    assert_same_bits(seen[0], seen[1])
    assert all((p.grad == 0).all() for p in model.parameters())


ZEROING = {
    "optimizer.zero_grad()": lambda optimizer, model: optimizer.zero_grad(),
    "base.zero_grad()": lambda optimizer, model: optimizer.base.zero_grad(),
    "model.zero_grad()": lambda optimizer, model: model.zero_grad(),
}


@GAMMAS
@pytest.mark.parametrize("zero", ZEROING)
def test_closure_that_zeroes_gradients(zero, gamma):
    """PyTorch's documented idiom. It makes no difference."""
    model, other = network(), network()
    optimizer = RST(sgd(model.parameters()), Constant(0.5), 10, gamma=gamma, module=model)
    plain = RST(sgd(other.parameters()), Constant(0.5), 10, gamma=gamma, module=other)

    def closure(t):
        ZEROING[zero](optimizer, model)
        return loss_of(model, t)

    torch.manual_seed(5)
    for t in range(10):
        optimizer.step(lambda t=t: closure(t))
    torch.manual_seed(5)
    for t in range(10):
        plain.step(lambda t=t: loss_of(other, t))
    assert 0 < optimizer.sam_steps < 10
    assert_close(state(model), state(other), rtol=1e-12, atol=1e-12)


def zero_in_place_from(first_pass, model):
    """A closure that calls zero_grad(set_to_none=False) in this pass (1 or 2) and those after it."""
    calls = itertools.count(1)

    def closure():
        if next(calls) >= first_pass:
            model.zero_grad(set_to_none=False)
        return loss_of(model, 0)

    return closure


def test_closure_that_zeroes_in_place():
    model, other = network(), network()
    for m, closure in (model, zero_in_place_from(1, model)), (other, lambda: loss_of(other, 0)):
        torch.manual_seed(5)
        sam(m).step(closure)
    assert_same_bits(state(model), state(other))


@pytest.mark.parametrize("first_pass", [1, 2])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_closure_that_zeroes_in_place_loses_the_clean_gradient(gamma, first_pass):
    """So it is refused, unless γ is 1."""
    model = network()
    optimizer = sam(model, gamma=gamma)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.gradient(zero_in_place_from(first_pass, model))
    assert_same_bits(list(model.parameters()), before)
    assert optimizer.steps == 0
    optimizer.step(lambda: loss_of(model, 0))


def test_zeroing_after_another_backward_pass():
    """As where the gradient of a layer is looked at first: where it touched no .grad it makes no difference,
    and else it is refused, unless γ is 1."""

    def closure(model, look):
        loss = loss_of(model, 1) if look == "backward" else None
        if look == "grad":
            torch.autograd.grad(model(batches()[0][1]).sum(), model[2].weight)
        model.zero_grad()
        loss_of(model, 0)
        return loss

    for gamma, look in (1.0, "backward"), (1.0, "grad"), (2.0, "grad"):
        model, other = network(plain=True), network(plain=True)
        sam(model, gamma=gamma).step(lambda m=model, look=look: closure(m, look))
        sam(other, gamma=gamma).step(lambda m=other: loss_of(m, 0))
        assert_close(state(model), state(other), rtol=1e-12, atol=1e-12)
    model = network(plain=True)
    with pytest.raises(RuntimeError, match="after another backward"):
        sam(model, gamma=2.0).gradient(lambda: closure(model, "backward"))


def test_gradients_in_one_flat_buffer():
    """They share their count of changes: the arrival of one is not taken for the zeroing of another."""
    model, other = network(plain=True), network(plain=True)
    optimizer = sam(model, gamma=2.0)
    for which in optimizer.passes():
        if which == "clean":
            sizes = [p.numel() for p in model.parameters()]
            parts = torch.zeros(sum(sizes), dtype=torch.float64).split(sizes)
            for p, part in zip(model.parameters(), parts, strict=True):
                p.grad = part.view_as(p)
        loss_of(model, 0)
    optimizer.step()
    sam(other, gamma=2.0).step(lambda: loss_of(other, 0))
    assert_same_bits(state(model), state(other))
