"""The registered networks: sizes, shapes, initialisation, and what their blocks compute."""

import math
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import rst.models  # noqa: F401  registers the models
from rst.models.registry import register
from rst.models.resnet import BasicBlock, PaddedShortcut
from rst.models.wide_resnet import WideBlock

# At 3 channels and 10 classes. For the last two these are the paper's own figures; for the CIFAR family they
# are computed from its definition in `cifar_family_parameters`.
PARAMETERS = {"resnet8": 75_290, "resnet20": 269_722, "cifar_resnet18": 11_150_874, "wrn28_10": 36_220_634}
NARROW = {"resnet8": 8, "resnet20": 8, "cifar_resnet18": 16, "wrn28_10": 16}


def narrow(name: str, seed: int = 0, **kwargs: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, width=NARROW[name], **kwargs)


def cifar_family_parameters(n: int, classes: int = 10) -> int:
    """Weights without bias, scale and shift for each convolution, a dense layer; nothing in the shortcuts."""
    layers = [(3, 16)]
    for inputs, width in ((16, 16), (16, 32), (32, 64)):
        layers += [(inputs, width)] + [(width, width)] * (2 * n - 1)
    return sum(9 * i * o + 2 * o for i, o in layers) + 64 * classes + classes


def test_the_cifar_family_has_the_parameters_of_its_definition() -> None:
    assert cifar_family_parameters(1) == PARAMETERS["resnet8"]
    assert cifar_family_parameters(3) == PARAMETERS["resnet20"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, in_chans=3)
        of_one_channel = timm.create_model(name, num_classes=100, in_chans=1)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS[name]
    features = model.head.in_features
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).out_channels
    difference = sum(p.numel() for p in of_one_channel.parameters()) - count
    assert difference == 90 * (features + 1) - 2 * 9 * stem


def test_ours_are_all_that_importing_adds_and_replace_nothing_of_timms() -> None:
    script = """
import timm
before = {name: timm.model_entrypoint(name) for name in timm.list_models()}
import rst.models
print(*sorted(set(timm.list_models()) - set(before)))
assert all(timm.model_entrypoint(name) is entrypoint for name, entrypoint in before.items())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == sorted(PARAMETERS)


def test_a_name_of_timms_is_refused() -> None:
    def resnet18() -> nn.Module:
        raise AssertionError("not to be called")

    theirs = timm.model_entrypoint("resnet18")
    with pytest.raises(RuntimeError, match="timm already has a model called resnet18"):
        register(resnet18)
    assert timm.model_entrypoint("resnet18") is theirs


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [8, 9, 32])
@pytest.mark.parametrize("name", PARAMETERS)
def test_any_image_size_and_channels(name: str, size: int, in_chans: int) -> None:
    model = narrow(name, num_classes=7, in_chans=in_chans)
    assert model(torch.zeros(2, in_chans, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_are_finite_in_every_parameter(name: str) -> None:
    model = narrow(name)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", PARAMETERS)
def test_initialisation(name: str) -> None:
    """Within 5 standard errors of the stated standard deviations: √(1/2n) of it for n normal draws,
    √(1/5n) for n uniform ones. The seed is fixed, so no false alarms."""
    model = narrow(name)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            n = module.weight.numel()
            fan_out = module.out_channels * math.prod(module.kernel_size)
            std = module.weight.square().mean().sqrt().item()
            assert std == pytest.approx(math.sqrt(2 / fan_out), rel=5 * math.sqrt(1 / (2 * n))), key
            assert module.bias is None or not module.bias.any(), key
        elif isinstance(module, nn.Linear):
            n = module.weight.numel()
            bound = 1 / math.sqrt(module.out_features)
            assert module.weight.abs().max() <= bound
            std = module.weight.square().mean().sqrt().item()
            assert std == pytest.approx(bound / math.sqrt(3), rel=5 * math.sqrt(1 / (5 * n)))
            assert not module.bias.any()


@pytest.mark.parametrize("name", PARAMETERS)
def test_batchnorm_averages_a_tenth_of_the_new_statistics_in(name: str) -> None:
    model = narrow(name)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model(torch.randn(8, 3, 8, 8))
    mean = seen[0].mean((0, 2, 3))
    assert torch.allclose(norm.running_mean, 0.1 * mean, atol=1e-6)
    assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", PARAMETERS)
def test_initial_loss_is_near_that_of_guessing(name: str) -> None:
    """At 100 classes. The dense layer's bound 1/√n_out makes the logits' variance proportional to features
    over classes, so a wide network's loss at 10 classes starts well above ln 10."""
    model = narrow(name, num_classes=100)
    loss = F.cross_entropy(model(torch.randn(64, 3, 16, 16)), torch.randint(100, (64,)))
    assert loss.item() == pytest.approx(math.log(100), rel=0.3)


def without_residual(block: BasicBlock | WideBlock) -> None:
    for parameter in (*block.conv2.parameters(), *block.norm2.parameters()):
        nn.init.zeros_(parameter)


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = BasicBlock(2, 6, 2, PaddedShortcut(2, 6, 2), bias=False)
    without_residual(block)
    x = torch.randn(1, 2, 5, 5)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2].relu())
    assert y.shape == (1, 6, 3, 3)
    assert not y[:, 2:].any()


def test_wide_shortcut_averages_and_pads_with_zeros() -> None:
    block = WideBlock(2, 6, 2, activate_shortcut=False)
    without_residual(block)
    x = torch.randn(1, 2, 4, 4)
    y = block(x)
    assert torch.allclose(y[:, :2], x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)), atol=1e-6)
    assert not y[:, 2:].any()


def test_only_the_first_wide_block_activates_its_shortcut() -> None:
    model = narrow("wrn28_10")
    blocks = [m for m in model.modules() if isinstance(m, WideBlock)]
    assert [b.activate_shortcut for b in blocks] == [True] + [False] * 11
    without_residual(blocks[0])
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(blocks[0](x), blocks[0].norm1(x).relu())


def test_cifar_resnet18s_stem_has_neither_relu_nor_pooling() -> None:
    stem = narrow("cifar_resnet18").stem(torch.randn(2, 3, 32, 32))
    assert stem.shape == (2, 16, 32, 32)
    assert (stem < 0).any()


@pytest.mark.parametrize("name", PARAMETERS)
def test_channels_last_survives_the_whole_network(name: str) -> None:
    """A block that fell back to NCHW would cost a copy of every activation after it."""
    model = narrow(name).to(memory_format=torch.channels_last)
    outputs: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, BasicBlock | WideBlock):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_factory_options(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no pretrained weights"):
        timm.create_model(name, pretrained=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        timm.create_model(name, widht=16)
    with pytest.raises(ValueError, match="width must be at least"):
        timm.create_model(name, width=0)
