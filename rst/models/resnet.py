"""Residual networks for small images: the CIFAR family of He et al., and the wider one of the paper."""

from collections.abc import Callable, Sequence

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
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B of He et al. 2016, §4.1, with a bias: 1×1 convolution and BatchNorm."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), He et al. 2016, Figure 2."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module, bias: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of basic blocks, global average pooling and a dense layer: (N, C, H, W) to (N, classes).

    Stage i has `blocks[i]` blocks of `width`·2^i channels; every stage but the first halves the image.
    `stem` is the stem's channels, `stem_relu` whether a ReLU follows its norm; `bias` is that of the blocks'
    convolutions.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int,
        in_chans: int,
        width: int,
        stem: int,
        shortcut: Callable[[int, int, int], nn.Module],
        bias: bool,
        stem_relu: bool,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1 channel, got {width}")
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
                shape = (channels, width * 2**i, 2 if i > 0 and j == 0 else 1)
                unchanged = shape == (channels, channels, 1)
                stage.append(BasicBlock(*shape, nn.Identity() if unchanged else shortcut(*shape), bias))
                channels = shape[1]
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def cifar_family(n: int, num_classes: int, in_chans: int, width: int) -> ResNet:
    """The network of He et al. 2016, §4.2, with 6n+2 layers: three stages of n blocks, no parameters in
    the shortcuts."""
    return ResNet(
        (n, n, n),
        num_classes,
        in_chans,
        width,
        stem=width,
        shortcut=PaddedShortcut,
        bias=False,
        stem_relu=True,
    )


@register
def resnet8(num_classes: int = 10, in_chans: int = 3, width: int = 16) -> ResNet:
    """The CIFAR family's smallest, for CPUs: three blocks. `width` is the first stage's channels."""
    return cifar_family(1, num_classes, in_chans, width)


@register
def resnet20(num_classes: int = 10, in_chans: int = 3, width: int = 16) -> ResNet:
    """ResNet-20 of He et al. 2016, §4.2. `width` is the first stage's channels."""
    return cifar_family(3, num_classes, in_chans, width)


@register
def cifar_resnet18(num_classes: int = 10, in_chans: int = 3, width: int = 64) -> ResNet:
    """The paper's ResNet-18 for 32×32 images, 11 150 874 parameters at 10 classes: a 16-channel stem without
    bias, pooling or ReLU, and blocks with bias. `width` is the first stage's channels."""
    return ResNet(
        (2, 2, 2, 2),
        num_classes,
        in_chans,
        width,
        stem=16,
        shortcut=projection,
        bias=True,
        stem_relu=False,
    )
