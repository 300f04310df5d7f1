"""What every registered network must satisfy: sizes, shapes, initialisation, one RST step."""

import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from rst import RST, Constant
from rst.models.pyramidnet import PyramidBlock
from rst.models.registry import initialize, register
from rst.models.resnet import BasicBlock, Bottleneck
from rst.models.shake_shake import ShakeShakeBlock
from rst.models.wide_resnet import WideBlock

# At 3 channels and 10 classes, from the authors' definitions; the last ones are networks they lack, which
# `test_networks_that_the_paper_lacks_have_the_parameters_of_their_definition` derives.
PARAMETERS = {
    "wrn16_4": 2_706_906,
    "wrn28_10": 36_220_634,
    "wrn40_10": 55_583_194,
    "cifar_resnet18": 11_150_874,
    "cifar_resnet50": 23_504_090,
    "pyramidnet164_48": 1_715_410,
    "pyramidnet164_48_shakedrop": 1_715_442,
    "pyramidnet164_270": 27_215_989,
    "pyramidnet164_270_shakedrop": 27_216_021,
    "pyramidnet200": 26_752_670,
    "pyramidnet200_shakedrop": 26_752_702,
    "pyramidnet272": 26_210_810,
    "pyramidnet272_shakedrop": 26_210_842,
    "wrn2x96_shakeshake": 26_192_922,
    "cifar_vgg16_bn": 33_646_666,
    "vit_tiny_patch4": 5_362_762,
    "vit_small_patch4": 21_342_346,
    "vit_base_patch4": 85_152_010,
    "resnet8": 75_290,
    "resnet20": 269_722,
    "cifar_resnet34": 21_262_746,
    "cifar_resnet101": 42_496_218,
    "cifar_vgg19_bn": 38_958_922,
}
# One of each kind: the others are these with more or wider blocks.
KINDS = [
    "resnet8",
    "cifar_resnet18",
    "cifar_resnet50",
    "wrn16_4",
    "pyramidnet164_48",
    "pyramidnet164_48_shakedrop",
    "wrn2x96_shakeshake",
    "cifar_vgg16_bn",
]


def image_size(name: str) -> int:
    """The smallest that leaves BatchNorm something to average, or that the network takes."""
    return 32 if "vgg" in name else 16


def options(name: str) -> dict[str, Any]:
    """That make the network small."""
    if name.startswith("vit"):
        return {"depth": 2, "img_size": image_size(name)}
    if name.startswith("pyramidnet"):
        return {"alpha": 16}
    if name.startswith("cifar_vgg"):
        return {"width": 4}
    return {"width": 16 if name.startswith("wrn") else 8}


def narrow(name: str, seed: int = 0, **kwargs: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **options(name), **kwargs)


def images(name: str, n: int) -> torch.Tensor:
    return torch.randn(n, 3, image_size(name), image_size(name))


def conv_norm(inputs: int, outputs: int, kernel: int, bias: bool = False) -> int:
    """Parameters of a convolution and the BatchNorm that follows it."""
    return kernel**2 * inputs * outputs + (3 if bias else 2) * outputs


def resnet_parameters(blocks: Sequence[int], width: int, stem: int, bottleneck: bool, plain: bool) -> int:
    """`plain`: neither biases nor projections, as in the CIFAR family."""
    count, inputs = conv_norm(3, stem, 3), stem
    for i, n in enumerate(blocks):
        inner = width * 2**i
        outputs = 4 * inner if bottleneck else inner
        bias = not (bottleneck or plain)
        count += 0 if plain else conv_norm(inputs, outputs, 1, bias)
        for _ in range(n):
            if bottleneck:
                count += (
                    conv_norm(inputs, inner, 1) + conv_norm(inner, inner, 3) + conv_norm(inner, outputs, 1)
                )
            else:
                count += conv_norm(inputs, inner, 3, bias) + conv_norm(inner, inner, 3, bias)
            inputs = outputs
    return count + 10 * inputs + 10


def vgg_parameters(convolutions: Sequence[int]) -> int:
    widths = [w for w, n in zip((64, 128, 256, 512, 512), convolutions, strict=True) for _ in range(n)]
    count = sum(conv_norm(i, o, 3, bias=True) for i, o in zip([3, *widths], widths, strict=False))
    return count + (512 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 10


def test_networks_that_the_paper_lacks_have_the_parameters_of_their_definition() -> None:
    """And the same definitions give the numbers of those that it has."""
    deeper = {"width": 64, "stem": 16, "plain": False}
    counted = {
        "cifar_resnet18": resnet_parameters((2, 2, 2, 2), bottleneck=False, **deeper),
        "cifar_resnet34": resnet_parameters((3, 4, 6, 3), bottleneck=False, **deeper),
        "cifar_resnet50": resnet_parameters((3, 4, 6, 3), bottleneck=True, **deeper),
        "cifar_resnet101": resnet_parameters((3, 4, 23, 3), bottleneck=True, **deeper),
        "resnet8": resnet_parameters((1, 1, 1), 16, 16, bottleneck=False, plain=True),
        "resnet20": resnet_parameters((3, 3, 3), 16, 16, bottleneck=False, plain=True),
        "cifar_vgg16_bn": vgg_parameters((2, 2, 3, 3, 3)),
        "cifar_vgg19_bn": vgg_parameters((2, 2, 4, 4, 4)),
    }
    assert counted == {name: PARAMETERS[name] for name in counted}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [*KINDS, "vit_tiny_patch4"])
def test_any_channels_and_classes(name: str) -> None:
    with torch.device("meta"):
        model, of_one_channel = (
            timm.create_model(name, num_classes=n, in_chans=c) for n, c in ((10, 3), (100, 1))
        )
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert of_one_channel(torch.zeros(2, 1, 32, 32)).shape == (2, 100)
    features = model.head.in_features
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    of_a_channel = stem.weight[:, 0].numel()
    difference = sum(p.numel() for p in of_one_channel.parameters()) - PARAMETERS[name]
    assert difference == 90 * (features + 1) - 2 * of_a_channel


@pytest.mark.parametrize(
    "size", [(8, 8), (9, 9), (7, 24), (64, 33)], ids=lambda size: "×".join(map(str, size))
)
@pytest.mark.parametrize("name", [name for name in KINDS if "vgg" not in name])
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    assert narrow(name, num_classes=7)(torch.zeros(2, 3, *size)).shape == (2, 7)


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


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_sam_step_reaches_every_parameter(name: str) -> None:
    model = narrow(name)
    x, y = images(name, 2), torch.arange(2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.1), Constant(1.0), 1, module=model)

    def closure() -> torch.Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.gradient(closure).isfinite()
    assert optimizer.propagations == 2
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    optimizer.step()
    for (key, parameter), old in zip(model.named_parameters(), before, strict=True):
        if not key.endswith("bias"):  # the gradient of a bias before a BatchNorm is 0
            assert not torch.equal(parameter, old), key


@pytest.mark.parametrize("name", KINDS)
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


@pytest.mark.parametrize("name", KINDS)
def test_batchnorm_averages_a_tenth_of_the_new_statistics_in(name: str) -> None:
    model = narrow(name)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model(images(name, 8))
    mean = seen[0].mean((0, 2, 3))
    assert torch.allclose(norm.running_mean, 0.1 * mean, atol=1e-6)
    assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("classes", [100, 1000])
@pytest.mark.parametrize("name", PARAMETERS)
def test_initial_loss_is_near_that_of_guessing(name: str, classes: int) -> None:
    """Of the narrow networks: the logits' variance is ‖features‖²/3 over the number of classes, so that the
    widest (`cifar_resnet50`, 2048 features) start at 1.6 times ln 100."""
    model = narrow(name, num_classes=classes)
    with torch.no_grad():
        logits = model(images(name, 16))
    assert logits.shape == (16, classes)
    loss = F.cross_entropy(logits, torch.randint(classes, (16,)))
    assert loss.item() == pytest.approx(math.log(classes), rel=0.3)


@pytest.mark.parametrize("name", KINDS)
def test_initial_loss_at_ten_classes_is_what_the_dense_layers_bound_makes_it(name: str) -> None:
    """ln C ≤ E(loss) ≤ ln C + E‖features‖²/6C, over dense layers of weights U(±1/√C).

    The features' norm grows with the width, hence wide networks start well above ln 10. The bounds are
    Jensen's inequality, as E exp(wf) ≤ exp(f²/6C) for w ~ U(±1/√C). Each W comes with −W, which makes the
    lower bound hold for any sample; the upper one fails once in a million seeds.
    """
    classes = 10
    model = narrow(name)
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images(name, 16))
        features, labels = seen[0], torch.randint(classes, (16,))
        losses = []
        for _ in range(200):
            initialize(model.head)
            z = F.linear(features, model.head.weight, model.head.bias)
            losses.append((F.cross_entropy(z, labels) + F.cross_entropy(-z, labels)) / 2)
    mean, error = torch.stack(losses).mean(), torch.stack(losses).std() / math.sqrt(200)
    assert mean >= math.log(classes)
    bound = math.log(classes) + features.square().sum(1).mean() / (6 * classes)
    assert mean <= bound + stats.norm.isf(1e-6) * error


@pytest.mark.parametrize("name", KINDS)
def test_channels_last_survives_the_whole_network(name: str) -> None:
    """A block that fell back to NCHW would cost a copy of every activation after it."""
    model = narrow(name).to(memory_format=torch.channels_last)
    outputs: list[torch.Tensor] = []
    blocks = (BasicBlock, Bottleneck, WideBlock, PyramidBlock, ShakeShakeBlock)
    for module in model.modules():
        if isinstance(module, nn.Conv2d if "vgg" in name else blocks):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(images(name, 2).to(memory_format=torch.channels_last))
    assert outputs
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_factory_options(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no pretrained weights"):
        timm.create_model(name, pretrained=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        timm.create_model(name, widht=16)
    if not name.startswith("vit"):
        option, value = ("alpha", -1) if name.startswith("pyramidnet") else ("width", 0)
        with pytest.raises(ValueError, match=f"{option} must be .*at least .*, got {value}"):
            timm.create_model(name, **{option: value})
