"""Residual networks for small images: the CIFAR family of He et al., and the authors' wider one."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from rst.models.registry import initialize, register


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2016, §4.1: subsample the image, pad the new channels with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not a slice, whose gradient is never in channels_last and makes all that it meets convert.
        subsampled = F.avg_pool2d(x, kernel_size=1, stride=self.stride)
        return F.pad(subsampled, (0, 0, 0, 0, 0, self.new_channels))


def projection(in_channels: int, out_channels: int, stride: int, bias: bool) -> nn.Module:
    """Option B of He et al. 2016, §4.1: 1×1 convolution and BatchNorm."""
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), He et al. 2016, Figure 2: 3×3, 3×3.

    `shortcut(in_channels, out_channels, stride)` makes the shortcut where the shape changes; `bias` is that
    of the two convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: Callable[[int, int, int], nn.Module],
        bias: bool,
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(width)
        unchanged = in_channels == width and stride == 1
        self.shortcut = nn.Identity() if unchanged else shortcut(in_channels, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """The same of three convolutions without bias, He et al. 2016, Figure 5: 1×1, 3×3, and 1×1 to 4·`width`
    channels. The 3×3 one has the stride, as in timm's."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(self.out_channels)
        unchanged = in_channels == self.out_channels and stride == 1
        self.shortcut = (
            nn.Identity() if unchanged else projection(in_channels, self.out_channels, stride, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pooling and a dense layer: (N, C, H, W) to (N, classes).

    Stage i has `blocks[i]` of `block(in_channels, width, stride)`, of `width`·2^i channels; every stage but
    the first halves the image. `stem` is the stem's channels, `stem_relu` whether a ReLU follows its norm.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], BasicBlock | Bottleneck],
        blocks: Sequence[int],
        num_classes: int,
        in_chans: int,
        width: int,
        stem: int,
        stem_relu: bool,
    ) -> None:
        super().__init__()
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be a whole number of at least 1 channel, got {width!r}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU() if stem_relu else nn.Identity(),
        )
        stages = []
        channels = stem
        for i, count in enumerate(blocks):
            stage = []
            for j in range(count):
                stage.append(block(channels, width * 2**i, 2 if i > 0 and j == 0 else 1))
                channels = stage[-1].out_channels
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def cifar_family(n: int, num_classes: int, in_chans: int, width: int) -> ResNet:
    """The network of He et al. 2016, §4.2, with 6n+2 layers: three stages of n blocks, no parameters in
    the shortcuts."""
    block = partial(BasicBlock, shortcut=PaddedShortcut, bias=False)
    return ResNet(block, (n, n, n), num_classes, in_chans, width, stem=width, stem_relu=True)


@register
def resnet8(num_classes: int = 10, in_chans: int = 3, width: int = 16) -> ResNet:
    """The CIFAR family's smallest, for CPUs: three blocks. `width` is the first stage's channels."""
    return cifar_family(1, num_classes, in_chans, width)


@register
def resnet20(num_classes: int = 10, in_chans: int = 3, width: int = 16) -> ResNet:
    """ResNet-20 of He et al. 2016, §4.2. `width` is the first stage's channels."""
    return cifar_family(3, num_classes, in_chans, width)


def small_image_resnet(
    block: Callable[[int, int, int], BasicBlock | Bottleneck],
    blocks: Sequence[int],
    num_classes: int,
    in_chans: int,
    width: int,
) -> ResNet:
    """The authors' ResNet for 32×32 images: a 16-channel stem without bias, pooling or ReLU, four stages."""
    return ResNet(block, blocks, num_classes, in_chans, width, stem=16, stem_relu=False)


def biased_block(in_channels: int, width: int, stride: int) -> BasicBlock:
    return BasicBlock(in_channels, width, stride, partial(projection, bias=True), bias=True)


@register
def cifar_resnet18(num_classes: int = 10, in_chans: int = 3, width: int = 64) -> ResNet:
    """The authors' ResNet-18: basic blocks with bias. `width` is the first stage's channels."""
    return small_image_resnet(biased_block, (2, 2, 2, 2), num_classes, in_chans, width)


@register
def cifar_resnet34(num_classes: int = 10, in_chans: int = 3, width: int = 64) -> ResNet:
    """ResNet-34 in the manner of `cifar_resnet18`."""
    return small_image_resnet(biased_block, (3, 4, 6, 3), num_classes, in_chans, width)


@register
def cifar_resnet50(num_classes: int = 10, in_chans: int = 3, width: int = 64) -> ResNet:
    """The authors' ResNet-50: bottlenecks. `width` is the first stage's channels before growing fourfold."""
    return small_image_resnet(Bottleneck, (3, 4, 6, 3), num_classes, in_chans, width)


@register
def cifar_resnet101(num_classes: int = 10, in_chans: int = 3, width: int = 64) -> ResNet:
    """ResNet-101 in the manner of `cifar_resnet50`."""
    return small_image_resnet(Bottleneck, (3, 4, 23, 3), num_classes, in_chans, width)
