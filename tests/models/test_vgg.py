"""VGG networks: layers, dropout, image sizes."""

import pytest
import timm
import torch
from torch import nn


@pytest.mark.parametrize(("name", "convolutions"), [("cifar_vgg16_bn", 13), ("cifar_vgg19_bn", 16)])
def test_layers(name: str, convolutions: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = [m for m in model.modules() if not list(m.children())]
    convs = [i for i, m in enumerate(layers) if isinstance(m, nn.Conv2d)]
    assert len(convs) == convolutions
    for i in convs:
        assert layers[i].bias is not None
        assert isinstance(layers[i + 1], nn.BatchNorm2d) and isinstance(layers[i + 2], nn.ReLU)
    assert [m.p for m in layers if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    with torch.device("meta"):
        without = timm.create_model(name, drop_rate=0.0)
    assert not any(m.p for m in without.modules() if isinstance(m, nn.Dropout))
    dense = [m for m in layers if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in dense] == [(512, 4096), (4096, 4096), (4096, 10)]
    assert [type(m) for m in layers[-7:-1]] == [nn.Linear, nn.ReLU, nn.Dropout] * 2


@pytest.mark.parametrize("size", [(32, 32), (40, 57), (64, 96)])
def test_larger_images_are_averaged(size: tuple[int, int]) -> None:
    model = timm.create_model("cifar_vgg16_bn", width=2).eval()
    x = torch.randn(2, 3, *size)
    features = model.features(x)
    assert features.shape == (2, 16, size[0] // 32, size[1] // 32)
    expected = model.head(model.hidden(nn.AdaptiveAvgPool2d(1)(features).flatten(1)))
    assert torch.allclose(model(x), expected, atol=1e-6)
