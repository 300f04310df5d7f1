"""The rivals that carry something from step to step, where not every pass has every parameter's gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import adamw, assert_close, batches, sgd
from torch import nn

from rst import VSAM, LookSAM, PartialAscent, StaleAscent


class Heads(nn.Module):
    """Two heads on a trunk, of which a pass uses one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 5, dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))

    def loss(self, head, t=0):
        x, y = (tensor[t] for tensor in batches())
        return F.cross_entropy(self.heads[head](torch.tanh(self.trunk(x))), y)


def carried(optimizer, module):
    return [optimizer.state[p][optimizer.KEY] for p in module.parameters()]


@pytest.mark.parametrize("rule", [partial(LookSAM, schedule=1.0), partial(VSAM, schedule=1.0), StaleAscent])
def test_what_is_carried_is_zero_where_there_was_no_gradient(rule):
    model = Heads()
    optimizer = rule(sgd(model.parameters()), total_steps=9)
    for head in (0, 1):
        optimizer.step(lambda head=head: model.loss(head).backward())
        assert all(x.any() for x in carried(optimizer, model.heads[head]))
    assert not any(x.any() for x in carried(optimizer, model.heads[0]))
    if isinstance(optimizer, LookSAM):  # v̂ is a unit vector
        assert torch.cat([x.flatten() for x in carried(optimizer, model)]).norm() == pytest.approx(1)


def test_a_gradient_of_the_perturbed_pass_alone_counts():
    """As the perturbed weights send an image to another expert: g is zero there, so that d = g_s."""
    model = Heads()
    optimizer = VSAM(sgd(model.parameters()), schedule=1.0, total_steps=9)
    for which in optimizer.passes():
        model.loss(0 if which == "clean" else 1).backward()
    g_s = [p.grad.clone() for p in model.heads[1].parameters()]
    optimizer.step()
    assert_close(carried(optimizer, model.heads[1]), g_s)


def test_a_gradient_that_is_left_out_of_the_step():
    """As DINO does for its last layer at first: the base has no state of it then."""
    model = Heads()
    optimizer = LookSAM(adamw(model.parameters()), schedule=1.0, total_steps=9)
    for t in range(3):
        optimizer.gradient(lambda: (model.loss(0) + model.loss(1)).backward())
        if t == 0:
            model.heads[1].zero_grad()
        optimizer.step()
    assert all(x.any() for x in carried(optimizer, model.heads[1]))


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_partial_ascent_counts_in_a_compiled_body():
    torch.compiler.reset()
    model = nn.Linear(6, 3, dtype=torch.float64)
    optimizer = PartialAscent(sgd(model.parameters()), total_steps=4, fraction=0.5)

    @torch.compile(backend="eager")
    def body(x, y):
        n = optimizer.images(len(x))
        F.cross_entropy(model(x[:n]), y[:n]).backward()

    for x, y in zip(*(tensor[:4] for tensor in batches()), strict=True):
        for _ in optimizer.passes():
            body(x, y)
        optimizer.step()
    assert optimizer.propagations == 4 * 1.5
