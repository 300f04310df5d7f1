"""The memory that a SAM step takes beyond a plain one, and parameters that share theirs."""

import gc
import itertools

import pytest
import torch
from reference import assert_close, loss_of, network, sgd, state
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rst import RST


def peak_bytes(work) -> int:
    """Most bytes that torch's CPU allocator held at once beyond those before, by the profiler's records."""
    gc.collect()  # else garbage of earlier tests, freed during `work`, would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        work()
    events = [e for e in records.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


LAYERS, WIDTH = 16, 256
PARAMETERS = 4 * LAYERS * WIDTH**2  # bytes


def build():
    torch.manual_seed(0)
    linear = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
    return nn.Sequential(*(m for layer in linear for m in (layer, nn.Tanh())))


def extra_bytes(batch, zeroing=False, **rule) -> int:
    """Peak of two SAM steps less that of two of SGD, which keeps its gradients' memory between steps, as
    accumulating gradients does.

    If SGD frees them instead, it has none while activations are at their peak, but a SAM step still needs
    ∇L(θ) then. From a fresh model each, so that whatever is allocated once is counted.
    """
    inputs = torch.randn(batch, WIDTH)
    model, other = build(), build()
    optimizer = RST(sgd(model.parameters()), 1.0, 2, module=model, **rule)
    base = sgd(other.parameters())

    def closure(m):
        m(inputs).square().mean().backward()

    def sharpness_aware():
        for _ in range(2):
            for _ in optimizer.passes():
                if zeroing:
                    model.zero_grad()
                closure(model)
            optimizer.step()

    def plain():
        for _ in range(2):
            base.zero_grad(set_to_none=False)
            closure(other)
            base.step()

    return peak_bytes(sharpness_aware) - peak_bytes(plain)


SLACK = 2**15  # beside 4 MiB of parameters: random number states and scalars


@pytest.mark.parametrize("batch", [4, 512], ids=["weights dominate", "activations dominate"])
@pytest.mark.parametrize(
    "rule",
    [{}, {"gamma": 0.5}, {"gamma": 2.0, "mix": "normalized"}, {"gamma": 0.5, "adaptive": True}],
    ids=["sam", "gnp", "normalized", "asam"],
)
def test_extra_memory_is_one_copy_of_the_parameters(rule, batch):
    assert 0 < extra_bytes(batch, **rule) <= PARAMETERS + SLACK


def test_zeroing_in_the_second_pass_takes_another_copy():
    """Only where the clean gradients have to be held meanwhile."""
    assert extra_bytes(4, zeroing=True) <= PARAMETERS + SLACK
    assert PARAMETERS + SLACK < extra_bytes(4, zeroing=True, gamma=0.5) <= 2 * PARAMETERS + SLACK


def in_one_buffer(model):
    """Make the parameters views of one tensor, as libraries with flat parameters do, and return it."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    parts = flat.split([p.numel() for p in model.parameters()])
    for p, part in zip(model.parameters(), parts, strict=True):
        p.data = part.view_as(p)
    return flat


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_parameters_in_one_buffer_stay_there(adaptive):
    model, other = network(plain=True), network(plain=True)
    flat = in_one_buffer(model)
    for m in model, other:
        RST(sgd(m.parameters()), 1.0, 10, adaptive=adaptive, rho=0.5).step(lambda m=m: loss_of(m, 0))
    assert_close(state(model), state(other), rtol=1e-14, atol=1e-14)
    assert torch.equal(flat, nn.utils.parameters_to_vector(model.parameters()))


def test_weights_come_back_where_there_is_no_memory_for_their_copy(monkeypatch):
    model = network(plain=True)
    start = in_one_buffer(model).clone()
    optimizer = RST(sgd(model.parameters()), 1.0, 10)

    attempts = itertools.count()

    def fail_once(tensor, allocate=torch.empty_like):
        if next(attempts) == 0:
            raise torch.OutOfMemoryError("no memory")
        return allocate(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", fail_once)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(lambda: loss_of(model, 0))
    assert torch.equal(start, nn.utils.parameters_to_vector(model.parameters()))
    optimizer.step(lambda: loss_of(model, 0))
