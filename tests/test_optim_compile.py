"""RST with a compiled model. What needs a GPU is in test_optim_cuda.py."""

import pytest
import torch
from reference import assert_close, network, sgd, state, take_steps

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
