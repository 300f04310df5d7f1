"""Shake-Shake networks of two branches (Gastaldi 2017), with the authors' shortcuts or Gastaldi's."""

import torch
import torch.nn.functional as F
from torch import nn

from rst.models.registry import initialize, register
from rst.models.shake import ShakeShake


class ShiftedShortcut(nn.Module):
    """norm(concatenation of two 1×1 convolutions of x), both subsampled, the second after a shift of x by one
    pixel.

    `kind`: "authors", to the left and up, as the authors and google-research/sam have it; "gastaldi",
    as in his code: of relu(x), to the right and down.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, kind: str = "authors") -> None:
        super().__init__()
        if kind not in ("authors", "gastaldi"):
            raise ValueError(f"shortcut must be authors or gastaldi, got {kind}")
        self.kind = kind
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=stride, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=stride, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "gastaldi":
            x = F.relu(x)
            shifted = F.pad(x, (1, -1, 1, -1))
        else:
            shifted = F.pad(x, (-1, 1, -1, 1))
        return self.norm(torch.cat((self.conv1(x), self.conv2(shifted)), 1))


def branch(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """norm(conv(relu(norm(conv(relu(x))))))."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ShakeShakeBlock(nn.Module):
    """shake(branch1(x), branch2(x)) + shortcut(x), the shortcut shifted where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str = "authors") -> None:
        super().__init__()
        self.branch1 = branch(in_channels, out_channels, stride)
        self.branch2 = branch(in_channels, out_channels, stride)
        self.shake = ShakeShake()
        unchanged = in_channels == out_channels and stride == 1
        self.shortcut = (
            nn.Identity() if unchanged else ShiftedShortcut(in_channels, out_channels, stride, shortcut)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shake(self.branch1(x), self.branch2(x)) + self.shortcut(x)


class ShakeShakeNet(nn.Module):
    """16-channel stem, three groups of (depth − 2)/6 blocks with `width`, 2·`width` and 4·`width` channels
    and strides 1, 2, 2, ReLU, global average pooling, dense: (N, C, H, W) to (N, classes)."""

    def __init__(self, depth: int, num_classes: int, in_chans: int, width: int, shortcut: str) -> None:
        super().__init__()
        if not isinstance(width, int) or width < 2 or width % 2:
            raise ValueError(f"width must be at least 2 channels and even, got {width}")
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        groups = []
        channels = 16
        for i in range(3):
            group = []
            for j in range((depth - 2) // 6):
                stride = 2 if i > 0 and j == 0 else 1
                group.append(ShakeShakeBlock(channels, width * 2**i, stride, shortcut))
                channels = width * 2**i
            groups.append(nn.Sequential(*group))
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.groups(self.stem(x))).mean((2, 3)))


@register
def wrn2x96_shakeshake(
    num_classes: int = 10, in_chans: int = 3, width: int = 96, shortcut: str = "authors"
) -> ShakeShakeNet:
    """The authors' WRN-2x96; with `shortcut` "gastaldi", Gastaldi's 26 2x96d. `width` is the first group's
    channels."""
    return ShakeShakeNet(26, num_classes, in_chans, width, shortcut)
