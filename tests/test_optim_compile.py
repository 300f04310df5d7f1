"""RST with a compiled model, and in a compiled training step. What needs a GPU is in test_optim_cuda.py."""

import pytest
import torch
from reference import assert_close, loss_of, network, sgd, state, take_steps

from rst import RST

STEPS = 10


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_compiled_steps_equal_eager_ones(gamma):
    """Without another compilation for the perturbed pass. No dropout, whose numbers are not eager's."""
    torch.compiler.reset()  # what other tests have compiled
    models = []
    for compiled in (False, True):
        model = network(torch.float32)
        model[3].p = 0.0
        models.append(model)
        if compiled:
            model.compile()
        optimizer = RST(sgd(model.parameters()), 0.5, STEPS, rho=0.3, gamma=gamma, module=model)
        with torch._dynamo.config.patch(error_on_recompile=True):
            take_steps(model, optimizer, STEPS, dtype=torch.float32)
        assert 0 < optimizer.sam_steps < STEPS
    assert_close(*map(state, models), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("compiled", ["step", "body"])
def test_compiled_training_equals_eager_training(compiled, gamma):
    """The whole step, or forward and backward together."""
    torch.compiler.reset()
    model, other = network(plain=True), network(plain=True)
    optimizers = [
        RST(sgd(m.parameters()), 0.5, STEPS, rho=0.3, gamma=gamma, module=m) for m in (model, other)
    ]

    def body(t):
        loss_of(model, t)

    if compiled == "body":
        body = torch.compile(body, backend="aot_eager")

    def step(t):
        for _ in optimizers[0].passes():
            body(t)
        optimizers[0].step()

    if compiled == "step":
        step = torch.compile(step, backend="aot_eager")
    for t in range(STEPS):
        step(t)
    take_steps(other, optimizers[1], STEPS)
    assert 0 < optimizers[0].sam_steps == optimizers[1].sam_steps
    assert_close(state(model), state(other), rtol=1e-12, atol=1e-12)
