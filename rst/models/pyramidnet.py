"""Pyramidal residual networks (Han, Kim & Kim 2017) of bottlenecks, plain or with ShakeDrop."""

import torch
import torch.nn.functional as F
from torch import nn

from rst.models.registry import initialize, register
from rst.models.shake import ShakeDrop
from rst.models.wide_resnet import pool_and_pad


class PyramidBlock(nn.Module):
    """shake(norm(conv(relu(norm(conv(relu(norm(conv(norm(x))))))))) + shortcut(x): 1×1, 3×3, and 1×1 to
    4·`width` channels, no ReLU before the first convolution (Han et al. 2017, Figure 6d).

    The shortcut is average-pooled and zero-padded. `keep` and `gate` are ShakeDrop's, with `keep` None for a
    plain block.
    """

    def __init__(
        self, in_channels: int, width: int, stride: int, keep: float | None, gate: str = "image"
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm4 = nn.BatchNorm2d(4 * width)
        self.shake = nn.Identity() if keep is None else ShakeDrop(keep, gate)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(y)))
        y = self.norm4(self.conv3(F.relu(self.norm3(y))))
        return self.shake(y) + pool_and_pad(x, y.shape[1], self.stride)


class PyramidNet(nn.Module):
    """16-channel stem, three groups of (depth − 2)/9 bottlenecks with strides 1, 2, 2, global average
    pooling, dense: (N, C, H, W) to (N, classes).

    Block l of L has 16 + `alpha`·l/L channels, rounded, and with ShakeDrop is kept with probability
    1 − l/2L, `gate` as there. `stem_norm`: a norm follows the stem.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_chans: int,
        alpha: float,
        shakedrop: bool,
        stem_norm: bool = True,
        gate: str = "image",
    ) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha must be at least 0 channels, got {alpha}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16) if stem_norm else nn.Identity(),
        )
        total = (depth - 2) // 3
        blocks = []
        channels = 16
        for i in range(total):
            width = round(16 + alpha * (i + 1) / total)
            stride = 2 if i in (total // 3, 2 * total // 3) else 1
            keep = 1 - (i + 1) / (2 * total) if shakedrop else None
            blocks.append(PyramidBlock(channels, width, stride, keep, gate))
            channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def _register_plain(name: str, depth: int, widening: float) -> None:
    def build(
        num_classes: int = 10, in_chans: int = 3, alpha: float = widening, stem_norm: bool = False
    ) -> PyramidNet:
        return PyramidNet(depth, num_classes, in_chans, alpha, shakedrop=False, stem_norm=stem_norm)

    build.__name__ = name
    build.__doc__ = f"""PyramidNet-{depth} of widening `alpha`. `stem_norm`: Han et al. have a norm after the
    stem, the authors have none."""
    register(build)


def _register_shakedrop(name: str, depth: int, widening: float) -> None:
    def build(
        num_classes: int = 10, in_chans: int = 3, alpha: float = widening, gate: str = "image"
    ) -> PyramidNet:
        return PyramidNet(depth, num_classes, in_chans, alpha, shakedrop=True, gate=gate)

    build.__name__ = name
    build.__doc__ = f"PyramidNet-{depth} of widening `alpha` with ShakeDrop, see there for `gate`."
    register(build)


for _name, _depth, _alpha in (
    ("pyramidnet164_48", 164, 48),
    ("pyramidnet164_270", 164, 270),
    ("pyramidnet200", 200, 240),
    ("pyramidnet272", 272, 200),
):
    _register_plain(_name, _depth, _alpha)
    _register_shakedrop(f"{_name}_shakedrop", _depth, _alpha)
