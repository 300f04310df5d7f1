"""RST on a GPU: beside the reference twin, no waiting for it, compiled models, CUDA graphs, float16."""

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import adamw, assert_close, assert_same_bits, batches, loss_of, network, sgd, state
from torch import nn

from rst import RST, Linear

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 20
GAMMAS = pytest.mark.parametrize("gamma", [1.0, 2.0])
RULES = pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])


def on_gpu(dtype=torch.float64):
    """A model without dropout, whose numbers differ between devices; inputs and labels."""
    model = network(dtype)
    model[3].p = 0.0
    inputs, labels = batches(dtype)
    return model.cuda(), inputs.cuda(), labels.cuda()


def train(model, inputs, labels, optimizer, start=0, steps=STEPS):
    for t in range(start, start + steps):
        for _ in optimizer.passes():
            F.cross_entropy(model(inputs[t]), labels[t]).backward()
        optimizer.step()


@RULES
@GAMMAS
@pytest.mark.parametrize("base", [sgd, adamw])
def test_a_gpu_trains_as_the_twin_does_on_a_cpu(base, gamma, adaptive):
    rule = {"rho": 0.3, "gamma": gamma, "adaptive": adaptive}
    model, inputs, labels = on_gpu()
    optimizer = RST(base(model.parameters()), Linear(0.2, 1.0), STEPS, module=model, **rule)
    train(model, inputs, labels, optimizer)
    other = network()
    other[3].p = 0.0
    steps = reference.train(
        other, base(other.parameters()), lambda t: loss_of(other, t), Linear(0.2, 1.0), STEPS, **rule
    )
    assert optimizer.sam_steps == sum(steps)
    assert_close([x.cpu() for x in state(model)], state(other))


def test_dropout_masks_are_equal_in_both_passes():
    model, inputs, labels = on_gpu(torch.float32)
    model[3].p = 0.5
    masks = []
    model[3].register_forward_hook(lambda layer, x, y: masks.append(y == 0))
    train(model, inputs, labels, RST(sgd(model.parameters()), 1.0, STEPS, module=model), steps=2)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


@RULES
@GAMMAS
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_step_does_not_wait_for_the_gpu(p, gamma, adaptive):
    model, inputs, labels = on_gpu(torch.float32)
    optimizer = RST(sgd(model.parameters()), p, STEPS, gamma=gamma, adaptive=adaptive, module=model)
    train(model, inputs, labels, optimizer, steps=2)  # what is made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, inputs, labels, optimizer, start=2, steps=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GAMMAS
def test_parameters_keep_their_addresses(gamma):
    model, inputs, labels = on_gpu()
    optimizer = RST(sgd(model.parameters()), 1.0, STEPS, gamma=gamma, module=model)
    addresses = set()
    for _ in optimizer.passes():
        addresses.add(tuple(p.data_ptr() for p in model.parameters()))
        F.cross_entropy(model(inputs[0]), labels[0]).backward()
    optimizer.step()
    addresses.add(tuple(p.data_ptr() for p in model.parameters()))
    assert len(addresses) == 1


@pytest.mark.parametrize(("mode", "gamma"), [("default", 1.0), ("default", 2.0), ("reduce-overhead", 1.0)])
@RULES
def test_compiled_models(adaptive, mode, gamma):
    """With reduce-overhead, CUDA graphs are recorded in some passes and replayed in later ones, also those
    with the other weights. That is for γ = 1, as gradients cannot accumulate from one replay to the next."""
    torch.compiler.reset()  # or another mode would count as a recompilation
    models = []
    for compiled in (False, True):
        model, inputs, labels = on_gpu(torch.float32)
        models.append(model)
        if compiled:
            model.compile(mode=mode)
        rule = {"rho": 0.3, "gamma": gamma, "adaptive": adaptive}
        optimizer = RST(sgd(model.parameters()), 0.5, STEPS, module=model, **rule)
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(model, inputs, labels, optimizer)
        assert 0 < optimizer.sam_steps < STEPS
    assert_close(*map(state, models), rtol=1e-4, atol=1e-5)


@RULES
@GAMMAS
def test_float16(gamma, adaptive):
    """Near the run in full precision. The first step overflows, and GradScaler skips it."""
    parameters = []
    for enabled in (False, True):
        model, inputs, labels = on_gpu(torch.float32)
        parameters.append(list(model.parameters()))
        start = [p.detach().clone() for p in model.parameters()]
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, backoff_factor=2.0**-30, enabled=enabled)
        optimizer = RST(sgd(model.parameters()), 1.0, 100, gamma=gamma, adaptive=adaptive, module=model)
        for t in ([0] if enabled else []) + list(range(STEPS)):
            for _ in optimizer.passes():
                with torch.autocast("cuda", torch.float16, enabled=enabled):
                    loss = F.cross_entropy(model(inputs[t]), labels[t])
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            if enabled and optimizer.steps == 1:
                assert scaler.get_scale() == 2.0**10
                assert_same_bits(list(model.parameters()), start)
    assert_close(*parameters, rtol=0.05, atol=0.05)
