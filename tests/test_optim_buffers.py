"""What a SAM step leaves alone: buffers and random numbers."""

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_bits, batches, loss_of, network, sgd
from torch import nn

from rst import RST

GAMMAS = pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])


def sam(model: nn.Module, **rule) -> RST:
    """An optimizer whose every step is a SAM step."""
    return RST(sgd(model.parameters()), 1.0, 100, module=model, **rule)


@GAMMAS
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_statistics_are_the_clean_pass_s(gamma, momentum):
    """momentum=None averages over the batches counted so far, so the count must not move either."""
    model, clean = network(), network()
    for m in model, clean:
        m[1].momentum = momentum
    optimizer = sam(model, gamma=gamma, rho=1.0)
    for t in range(3):
        clean.load_state_dict(model.state_dict())
        torch.manual_seed(t)
        loss_of(clean, t)
        torch.manual_seed(t)
        optimizer.step(lambda t=t: loss_of(model, t))
        assert model[1].num_batches_tracked == t + 1
        assert_same_bits(list(model.buffers()), list(clean.buffers()))


def test_batchnorm_in_eval_mode_uses_its_statistics_in_both_passes():
    """A frozen layer inside a model in training."""
    model = network()
    model[1] = nn.BatchNorm1d(8, affine=False, dtype=torch.float64)
    for inputs in batches()[0][:5]:
        model(inputs)
    frozen = model[1].eval()
    mean, var = frozen.running_mean.clone(), frozen.running_var.clone()
    seen = []
    frozen.register_forward_hook(lambda layer, x, y: seen.append((x[0], y)))
    sam(model).gradient(lambda: loss_of(model, 0))
    assert len(seen) == 2
    for x, y in seen:
        torch.testing.assert_close(y, F.batch_norm(x, mean, var))
    assert not frozen.training
    assert model.training
    assert_same_bits(list(model.buffers())[:2], [mean, var])


def test_dropout_masks_are_equal_in_both_passes():
    model = network()
    masks = []
    model[3].register_forward_hook(lambda layer, x, y: masks.append(y == 0))
    optimizer = sam(model)
    for t in range(3):
        optimizer.step(lambda t=t: loss_of(model, t))
    first, second, third, fourth, *_ = masks
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    # 64 draws a mask: two independent ones agree with probability 0.625^64, 1e-13.
    assert not torch.equal(first, third)


@GAMMAS
def test_noise_goes_on_where_the_clean_pass_left_it(gamma):
    """Else the draws of a run would depend on which steps were SAM steps."""
    model = network()
    other = network()
    torch.manual_seed(5)
    loss_of(other, 0)
    noise = torch.get_rng_state()
    torch.manual_seed(5)
    sam(model, gamma=gamma).step(lambda: loss_of(model, 0))
    assert torch.equal(torch.get_rng_state(), noise)


class Replacing(nn.Module):
    """Puts another tensor in its buffer's place, as layers that write `self.mean = ...` do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


class Counting(nn.Module):
    """Changes a buffer in place that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x):
        self.calls += 1
        return x


class Expanded(nn.Module):
    """A constant whose elements share memory, so that nothing can write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 1).expand(1, 8))

    def forward(self, x):
        return x * self.mask


class Inferred(nn.Module):
    """Keeps a constant that was made in an evaluation under inference mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("shift", torch.ones(8, dtype=torch.float64), persistent=False)

    def forward(self, x):
        return x + self.shift


LAYERS = {
    "expanded": Expanded,
    "inference": Inferred,
    "InstanceNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Flatten()
    ),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral_norm, the old one": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "replacing": Replacing,
    "counting": Counting,
}


@GAMMAS
@pytest.mark.parametrize("kind", LAYERS)
def test_buffers_are_the_clean_pass_s(kind, gamma):
    model, clean = (
        nn.Sequential(nn.Linear(6, 8), LAYERS[kind](), nn.Linear(8, 3)).double() for _ in range(2)
    )
    clean.load_state_dict(model.state_dict())
    buffers = list(model.buffers())
    assert buffers
    optimizer = sam(model, gamma=gamma, rho=1.0)
    for t in range(2):
        for p, q in zip(clean.parameters(), model.parameters(), strict=True):
            p.data = q.detach().clone()
        loss_of(clean, t)
        optimizer.step(lambda t=t: loss_of(model, t))
        assert_same_bits(list(model.buffers()), list(clean.buffers()))


def test_without_module_buffers_move_in_both_passes():
    model = network()
    RST(sgd(model.parameters()), 1.0, 100).step(lambda: loss_of(model, 0))
    assert model[1].num_batches_tracked == 2
