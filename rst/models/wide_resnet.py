"""Wide residual networks (Zagoruyko & Komodakis 2016), in the authors' variant: no projections."""

import torch
import torch.nn.functional as F
from torch import nn

from rst.models.registry import initialize, register


def pool_and_pad(x: torch.Tensor, channels: int, stride: int) -> torch.Tensor:
    """A shortcut without parameters: average-pool by `stride`, pad with zeros up to `channels` channels."""
    if stride > 1:
        # ceil_mode: the strided convolution rounds odd sizes up.
        x = F.avg_pool2d(x, stride, ceil_mode=True)
    new_channels = channels - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, new_channels)) if new_channels else x


class WideBlock(nn.Module):
    """conv(relu(norm(conv(relu(norm(x)))))) + shortcut(x), the shortcut average-pooled and zero-padded.

    `activate_shortcut`: the shortcut branches off after the first norm and ReLU rather than before.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activate_shortcut: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.stride = stride
        self.activate_shortcut = activate_shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(x))
        residual = self.conv2(F.relu(self.norm2(self.conv1(y))))
        return residual + pool_and_pad(y if self.activate_shortcut else x, residual.shape[1], self.stride)


class WideResNet(nn.Module):
    """16-channel stem, three groups of (depth − 4)/6 pre-activation blocks with `width`, 2·`width` and
    4·`width` channels and strides 1, 2, 2, global average pooling, dense: (N, C, H, W) to (N, classes)."""

    def __init__(self, depth: int, num_classes: int, in_chans: int, width: int) -> None:
        super().__init__()
        if not isinstance(width, int) or width < 16:
            raise ValueError(
                f"width must be a whole number of at least the stem's 16 channels, got {width!r}"
            )
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        groups = []
        channels = 16
        for i in range(3):
            group = []
            for j in range((depth - 4) // 6):
                stride = 2 if i > 0 and j == 0 else 1
                group.append(WideBlock(channels, width * 2**i, stride, activate_shortcut=i == j == 0))
                channels = width * 2**i
            groups.append(nn.Sequential(*group))
        self.groups = nn.Sequential(*groups)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.groups(self.stem(x)))).mean((2, 3)))


@register
def wrn16_4(num_classes: int = 10, in_chans: int = 3, width: int = 64) -> WideResNet:
    """WRN-16-4. `width` is the first group's channels: 16 × 4."""
    return WideResNet(16, num_classes, in_chans, width)


@register
def wrn28_10(num_classes: int = 10, in_chans: int = 3, width: int = 160) -> WideResNet:
    """WRN-28-10. `width` is the first group's channels: 16 × 10."""
    return WideResNet(28, num_classes, in_chans, width)


@register
def wrn40_10(num_classes: int = 10, in_chans: int = 3, width: int = 160) -> WideResNet:
    """WRN-40-10. `width` is the first group's channels: 16 × 10."""
    return WideResNet(40, num_classes, in_chans, width)
