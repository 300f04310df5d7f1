"""Sharpness against dense references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from rst.models import create
from rst.reporting import sharpness
from rst.reporting.sharpness import lambda_max, loss_in_ball, losses_along, mean_loss, measure


def some_batches(side=4, n=(7, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shape = 3, side, side
    return [
        (
            torch.randn(k, *shape, generator=generator, dtype=dtype),
            torch.randint(3, (k,), generator=generator),
        )
        for k in n
    ]


def tiny(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).to(dtype)
    model[1].running_mean += 0.3
    model[1].running_var *= 2.0
    return model.eval()


def whole_loss(model, batches):
    """The mean over all images as a function of one flat vector of parameters."""
    parameters = dict(model.named_parameters())
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        named = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, named, (x,)), y)

    return loss, torch.cat([p.detach().flatten() for p in parameters.values()])


class Attention(nn.Module):
    """The rows of an image attend to each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(4, 12, dtype=torch.float64)
        self.head = nn.Linear(12 * 4, 3, dtype=torch.float64)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1))


@pytest.mark.parametrize("make", [tiny, Attention], ids=["convolution", "attention"])
def test_lambda_max_is_that_of_the_dense_hessian(make):
    model, batches = make(), some_batches()
    loss, flat = whole_loss(model, batches)
    with sdpa_kernel(SDPBackend.MATH):  # the one with a second derivative
        dense = torch.autograd.functional.hessian(loss, flat)
    expected = torch.linalg.eigvalsh(dense)[-1].item()
    assert expected > 0.01
    assert lambda_max(model, batches) == pytest.approx(expected, rel=1e-4)


def power_iteration(times, size, n=100):
    """The eigenvalue of largest modulus."""
    v = torch.randn(size, generator=torch.Generator().manual_seed(2))
    for _ in range(n):
        v = times(v / v.norm())
    return v.norm().item()


@pytest.mark.slow
def test_lambda_max_is_that_of_power_iteration_on_resnet8():
    torch.manual_seed(0)
    model = create("resnet8", num_classes=3, in_chans=3, image_size=(8, 8), width=4)
    batches = some_batches(8, (16, 16), torch.float32)
    model.train()
    for x, _ in batches:
        model(x)  # running statistics of some use
    model.eval()
    parameters = list(model.parameters())

    def hessian_times(v):
        parts = v.split([p.numel() for p in parameters])
        vectors = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        total = torch.zeros_like(v)
        for x, y in batches:
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
            products = torch.autograd.grad(gradients, parameters, vectors)
            total += torch.cat([product.flatten() for product in products]) / len(batches)
        return total

    size = sum(p.numel() for p in parameters)
    largest = power_iteration(hessian_times, size)  # of whichever sign
    shifted = power_iteration(lambda v: hessian_times(v) + largest * v, size)  # all above 0
    assert lambda_max(model, batches) == pytest.approx(shifted - largest, rel=1e-3)


def test_the_balls_loss_written_out():
    model, batches, rho = tiny(), some_batches(), 0.1
    loss, flat = whole_loss(model, batches)
    (gradient,) = torch.autograd.grad(loss(flat.requires_grad_()), flat)
    expected = loss(flat + rho * gradient / gradient.norm()).item()
    before = [p.detach().clone() for p in model.parameters()]
    assert loss_in_ball(model, batches, rho) == pytest.approx(expected, rel=1e-12)
    assert mean_loss(model, batches) == pytest.approx(loss(flat).item(), rel=1e-12)
    assert expected > loss(flat).item()
    for p, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, kept) and p.grad is None


def test_directions_are_filter_normalised():
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    generator = torch.Generator().manual_seed(1)
    direction = sharpness._filter_normalised(weight, generator)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    assert not sharpness._filter_normalised(weight[:, 0, 0, 0], generator).any()


def test_the_losses_along_directions_written_out():
    model, batches = tiny(), some_batches()
    loss, flat = whole_loss(model, batches)
    generator = torch.Generator().manual_seed(0)
    expected = []
    for _ in range(sharpness.DIRECTIONS):
        parts = [sharpness._filter_normalised(p.detach(), generator) for p in model.parameters()]
        d = torch.cat([part.flatten() for part in parts])
        expected.append([loss(flat - d / 2).item(), loss(flat + d / 2).item()])
    np.testing.assert_allclose(losses_along(model, batches, 0), np.mean(expected, 0), rtol=1e-9)


def test_the_losses_along_directions_do_not_see_the_scale_of_a_filter_before_a_norm():
    """What filter normalisation is for: in evaluation mode too, once the running statistics scale along."""
    batches = some_batches()
    one, other = tiny(), tiny()
    with torch.no_grad():
        for p in (other[0].weight, other[0].bias, other[1].running_mean):
            p *= 7.0
        other[1].running_var *= 49.0
        other[1].eps *= 49.0
    np.testing.assert_allclose(losses_along(one, batches, 0), losses_along(other, batches, 0), rtol=1e-9)


def test_measuring_changes_nothing_and_repeats():
    model, batches = tiny(), some_batches()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = (measure(model, batches, 0.1, seed=3) for _ in range(2))
    assert first == second and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert first.in_ball > 0
    assert measure(model, batches, 0.1, seed=4).along != first.along
