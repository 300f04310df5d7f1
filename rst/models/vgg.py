"""VGG networks with BatchNorm (Simonyan & Zisserman 2015, configurations D and E) for small images."""

import torch
from torch import nn

from rst.models.registry import initialize, register


class VGG(nn.Module):
    """Five stages of 3×3 convolutions, each with norm and ReLU, and a 2×2 max-pool, global average pooling,
    then dense layers hidden-hidden-classes: (N, C, H, W) with H, W ≥ 32 to (N, classes).

    Stage i has `convolutions`[i] convolutions of `width`·min(2^i, 8) channels; hidden is 64·`width`, with
    dropout of probability `drop_rate` after each of the two.
    """

    def __init__(
        self, convolutions: tuple[int, ...], num_classes: int, in_chans: int, width: int, drop_rate: float
    ) -> None:
        super().__init__()
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be a whole number of at least 1 channel, got {width!r}")
        layers: list[nn.Module] = []
        channels = in_chans
        for i, count in enumerate(convolutions):
            for _ in range(count):
                inputs, channels = channels, width * min(2**i, 8)
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = 64 * width
        self.hidden = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(drop_rate),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(drop_rate),
        )
        self.head = nn.Linear(hidden, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.features(x).mean((2, 3))))


@register
def cifar_vgg16_bn(num_classes: int = 10, in_chans: int = 3, width: int = 64, drop_rate: float = 0.5) -> VGG:
    """The authors' VGG16-BN, for images of at least 32×32. `width` is the first stage's channels."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_chans, width, drop_rate)


@register
def cifar_vgg19_bn(num_classes: int = 10, in_chans: int = 3, width: int = 64, drop_rate: float = 0.5) -> VGG:
    """VGG19-BN in the manner of `cifar_vgg16_bn`."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_chans, width, drop_rate)
