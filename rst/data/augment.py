"""Flip, crop and cutout for a whole batch of uint8 images at once, drawn for each image on its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def normalize(
    images: torch.Tensor, mean: torch.Tensor | Sequence[float], std: torch.Tensor | Sequence[float]
) -> torch.Tensor:
    """(images/255 − mean) / std per channel: uint8 [B, C, H, W] to float32."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device) for v in (mean, std))
    return images.float().sub_(255 * mean[:, None, None]).mul_(1 / (255 * std[:, None, None]))


@dataclass(frozen=True)
class Augment:
    """Random changes to a training batch, each drawn independently for every image, then `normalize`.

    `flip`: mirrored left-right with probability 1/2. `crop_padding`: padded by reflection by that many
    pixels, then cropped back to its size, row and column offsets uniform on 0..2·crop_padding. `cutout`: a
    square of that side set to 0, the mean after normalization; its centre is uniform over the pixels and
    what lies outside the image is lost.

    Calling it raises ValueError when the padding is not smaller than the image's shorter side (there is
    nothing to reflect), or the cutout larger than it (most images would be blank).
    """

    flip: bool = False
    crop_padding: int = 0
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is in pixels and must be at least 0, got {getattr(self, name)}")

    def __call__(
        self,
        images: torch.Tensor,
        mean: torch.Tensor | Sequence[float],
        std: torch.Tensor | Sequence[float],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """uint8 [B, C, H, W] to float32 [B, C, H, W], contiguous, on the same device; `generator` is the
        CPU's whatever the device, so that one seed gives one augmentation everywhere."""
        side = min(images.shape[-2:])
        if self.crop_padding >= side:
            raise ValueError(f"crop_padding must be less than the image side {side}, got {self.crop_padding}")
        if self.cutout > side:
            raise ValueError(f"cutout must be at most the image side {side}, got {self.cutout}")
        # A row for each draw, made whether the part is on or off, so that none shifts another's. Add new
        # parts at the end. 62 bits, so that `%` is uniform to 1 in 10^16.
        bits = torch.randint(2**62, (5, len(images)), generator=generator)
        flip, top, left, cutout_y, cutout_x = bits.to(images.device, non_blocking=True)
        if self.flip or self.crop_padding:
            images = self._flip_and_crop(images, flip % 2 == 0, top, left)
        batch = normalize(images, mean, std)
        if self.cutout:
            height, width = images.shape[-2:]
            rows, columns = self._cut(cutout_y % height, height), self._cut(cutout_x % width, width)
            batch *= 1 - rows[:, None, :, None] * columns[:, None, None, :]
        return batch

    def _flip_and_crop(
        self, images: torch.Tensor, mirrored: torch.Tensor, top: torch.Tensor, left: torch.Tensor
    ) -> torch.Tensor:
        # One gather by each pixel's source pixel: twice as fast on a CPU as padding, indexing an unfolded
        # view and choosing between the crop and its mirror image, each a copy of the batch.
        batch, channels, height, width = images.shape
        offsets = 2 * self.crop_padding + 1
        rows = self._source(top % offsets, height)
        columns = self._source(left % offsets, width)
        if self.flip:
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width)
        return images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)

    def _source(self, offset: torch.Tensor, side: int) -> torch.Tensor:
        """Image coordinates, [B, side], of a crop that starts at `offset` [B] of the padded image."""
        at = torch.arange(side, device=offset.device) + (offset[:, None] - self.crop_padding)
        return (side - 1) - ((side - 1) - at.abs()).abs()

    def _cut(self, centre: torch.Tensor, side: int) -> torch.Tensor:
        """1 at the coordinates that a cutout around `centre` [B] covers, else 0: float [B, side]."""
        at = torch.arange(side, device=centre.device) - (centre - self.cutout // 2)[:, None]
        return ((at >= 0) & (at < self.cutout)).float()
