"""Residual networks: their shortcuts and stem."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

from rst.models.resnet import BasicBlock, Bottleneck, PaddedShortcut, projection


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = BasicBlock(2, 6, 2, PaddedShortcut, bias=False)
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(1, 2, 5, 5)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2].relu())
    assert y.shape == (1, 6, 3, 3)
    assert not y[:, 2:].any()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_of_another_shape_projects_and_rectifies_the_sum(stride: int) -> None:
    basic = BasicBlock(2, 8, stride, partial(projection, bias=True), bias=True)
    bottleneck = Bottleneck(2, 2, stride)
    x = torch.randn(3, 2, 6, 6)
    for block, last in ((basic, basic.norm2), (bottleneck, bottleneck.norm3)):
        nn.init.zeros_(last.weight)
        conv, norm = block.shortcut
        assert torch.equal(block(x), norm(conv(x)).relu())
        assert block(x).shape == (3, 8, 6 // stride, 6 // stride)
        assert (conv.bias is None) is (block is bottleneck)


@pytest.mark.parametrize("block", [BasicBlock(4, 4, 1, projection, bias=True), Bottleneck(4, 1, 1)])
def test_a_block_that_keeps_the_shape_keeps_its_input(block: BasicBlock | Bottleneck) -> None:
    nn.init.zeros_((block.norm3 if isinstance(block, Bottleneck) else block.norm2).weight)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_resnet50"])
def test_the_stem_has_neither_relu_nor_pooling(name: str) -> None:
    stem = timm.create_model(name, width=4).stem(torch.randn(2, 3, 32, 32))
    assert stem.shape == (2, 16, 32, 32)
    assert (stem < 0).any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", [(16, 32), (32, 16), (64, 8)]),
        ("cifar_resnet34", [(64, 32), (128, 16), (256, 8), (512, 4)]),
        ("cifar_resnet101", [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
    ],
)
def test_channels_and_sides_of_the_stages(name: str, expected: list[tuple[int, int]]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        x = model.stem(torch.zeros(1, 3, 32, 32))
        shapes = [(x := stage(x)).shape[1:3] for stage in model.stages]
    assert shapes == expected
