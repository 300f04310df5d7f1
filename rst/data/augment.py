"""Augmentation of a whole batch of uint8 images at once, drawn for each image on its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.special import betaincinv

from rst import draws
from rst.data.autoaugment import AUTHORS, POLICIES, autoaugment

LARGE = 64  # pixels of the shorter side from which an image is taken for one of ImageNet's kind


def normalize(
    images: torch.Tensor, mean: torch.Tensor | Sequence[float], std: torch.Tensor | Sequence[float]
) -> torch.Tensor:
    """(images/255 − mean) / std per channel: uint8 [B, C, H, W] to float32."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device) for v in (mean, std))
    return images.float().sub_(255 * mean[:, None, None]).mul_(1 / (255 * std[:, None, None]))


# What an image draws in an epoch, a row each, used or not, so that no part shifts another's.
# Append, never reorder: the draws are part of every recorded result.
DRAWS = (
    "flip",
    "top",
    "left",
    "cutout_y",
    "cutout_x",
    "mixup",
    "resized_crop",
    *[f"autoaugment{i}" for i in range(5)],
)
SHARED = slice(DRAWS.index("cutout_y"), DRAWS.index("cutout_x") + 1)  # by a batch, with per_batch


def draw_augmentation(seed: int, epoch: int, n_images: int) -> torch.Tensor:
    """What `Augment` draws for each of a training set's images: int64 [draws, images] on the CPU.

    A function of (seed, epoch, image) alone, whatever batch the image is in and whoever prepares it. 62 bits
    each, so that `%` is uniform to 1 in 10^16.
    """
    shape = (len(DRAWS), n_images)
    return torch.randint(2**62, shape, generator=draws.generator(seed, "augment", epoch))


@dataclass(frozen=True)
class Augment:
    """Random changes to a training batch, each drawn independently for every image, and `normalize`.

    In this order: `random_resized_crop`: a rectangle of 8 to 100 % of the area and an aspect ratio of 3/4 to
    4/3, resized (Szegedy et al. 2015), where images are streamed from files. `autoaugment`: the policy,
    "cifar10" or "imagenet", or "auto" for the latter from 64 pixels on (Cubuk et al. 2019). `crop_padding`:
    padded by reflection by that many pixels, then cropped back to its size, row and column offsets uniform on
    0..2·crop_padding. `flip`: mirrored left-right with probability 1/2. `cutout`: a square of that side set
    to 0, the mean after normalization; its centre is uniform over the pixels and what lies outside the image
    is lost (DeVries & Taylor 2017). `mixup`: α > 0 mixes each image with that at its place in the reversed
    batch, see `mix` (Zhang et al. 2018); 0 does not. The authors flip before they crop, with the same
    distribution of images.

    Three options choose between the usual form, the default, and that of the paper's authors. `policies`:
    whose policy for CIFAR, "torchvision" or "authors", see `rst.data.autoaugment`; theirs has none for images
    of 64 pixels. `mixup_first`: mixup precedes cutout, so that the square is empty in the mixed image.
    `per_batch`: one cutout square and one mixup weight for a whole batch, those of its first image; the order
    of the two then makes no difference.
    """

    flip: bool = False
    crop_padding: int = 0
    cutout: int = 0
    autoaugment: str | None = None
    mixup: float = 0.0
    random_resized_crop: bool = False
    per_batch: bool = False
    policies: str = "torchvision"
    mixup_first: bool = False

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is in pixels and must be at least 0, got {getattr(self, name)}")
        if self.mixup < 0:
            raise ValueError(f"mixup is α of Beta(α, α), or 0 for none, got {self.mixup}")
        choices = ("auto", *POLICIES)
        if self.autoaugment is not None and self.autoaugment not in choices:
            raise ValueError(
                f"autoaugment must be null or one of {', '.join(choices)}, got {self.autoaugment}"
            )
        if self.policies not in ("torchvision", AUTHORS):
            raise ValueError(f"policies must be torchvision or {AUTHORS}, got {self.policies}")

    def check(self, channels: int, height: int, width: int, batch_size: int, streamed: bool) -> None:
        """Raises ValueError where images of this shape, in memory or streamed, cannot be augmented so."""
        side = min(height, width)
        if self.crop_padding >= side:  # there is nothing to reflect
            raise ValueError(f"crop_padding must be less than the image side {side}, got {self.crop_padding}")
        if self.cutout > side:  # most images would be blank
            raise ValueError(f"cutout must be at most the image side {side}, got {self.cutout}")
        if self.autoaugment and channels != 3:
            raise ValueError(f"autoaugment needs RGB images, and these have {channels} channel(s)")
        if self.autoaugment and self.policies == AUTHORS and self._kind(side) == "imagenet":
            raise ValueError("policies=authors has no policy for ImageNet: use policies=torchvision")
        if self.mixup and batch_size < 2:
            raise ValueError(
                f"mixup mixes the images of a batch and needs at least 2, got batch_size={batch_size}"
            )
        if self.random_resized_crop and not streamed:
            raise ValueError(
                "random_resized_crop takes its crops from the files, and these images are held in memory: "
                "choose another augment, or dataset=image_folder with dataset.in_memory=false"
            )

    def draws_of(self, bits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """The columns of `draw_augmentation` for a batch of image indices; with `per_batch`, those of its
        first image where a batch shares them."""
        of_batch = bits[:, batch]
        if self.per_batch:
            of_batch[SHARED] = of_batch[SHARED, :1]
        return of_batch

    def __call__(
        self,
        images: torch.Tensor,
        mean: torch.Tensor | Sequence[float],
        std: torch.Tensor | Sequence[float],
        bits: torch.Tensor,
        host_bits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """uint8 [B, C, H, W] to float32 [B, C, H, W], contiguous, on the same device.

        `bits` [draws, B] are the images' columns of `draw_augmentation`, see `draws_of`, on the images'
        device; `host_bits` the same on the CPU, where AutoAugment groups its operations (None: as `bits`).
        """
        if self.autoaugment:
            policy = AUTHORS if self.policies == AUTHORS else self._kind(min(images.shape[-2:]))
            first = DRAWS.index("autoaugment0")
            images = autoaugment(
                images, policy, (bits if host_bits is None else host_bits)[first : first + 5]
            )
        flip, top, left = bits[:3]
        if self.flip or self.crop_padding:
            images = self._flip_and_crop(images, flip % 2 == 0, top, left)
        batch = normalize(images, mean, std)
        return batch if self.cuts_mixed else self.cut(batch, bits)

    @property
    def cuts_mixed(self) -> bool:
        """Whether calling this leaves the cutout to `cut`, for after `mix`."""
        return bool(self.mixup and self.mixup_first)

    def cut(self, batch: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """Cutout of a normalized batch, in place; without effect where there is none."""
        if self.cutout:
            y, x = bits[SHARED]
            height, width = batch.shape[-2:]
            rows, columns = self._covered(y % height, height), self._covered(x % width, width)
            batch *= 1 - rows[:, None, :, None] * columns[:, None, None, :]
        return batch

    def mixup_weights(self, bits: torch.Tensor) -> torch.Tensor:
        """λ of each image of `draw_augmentation`, float32 [images] on the CPU: λ ~ Beta(α, α), then
        max(λ, 1 − λ), so that an image keeps at least half of itself."""
        uniform = bits[DRAWS.index("mixup")].double() / 2**62
        weights = torch.from_numpy(betaincinv(self.mixup, self.mixup, uniform.numpy()))
        return torch.maximum(weights, 1 - weights).float()

    def mix(
        self, batch: torch.Tensor, labels: torch.Tensor, n_classes: int, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixup of a normalized batch: λ·x + (1 − λ)·x', with x' the reversed batch; `weight` [B] is λ.

        Labels become probabilities, float32 [B, classes]: λ for the image's own, 1 − λ for its partner's.
        """
        partners = batch.flip(0)
        targets = torch.zeros(len(labels), n_classes, device=batch.device)
        targets.scatter_(1, labels[:, None], weight[:, None])
        targets.scatter_add_(1, labels.flip(0)[:, None], 1 - weight[:, None])
        return torch.lerp(partners, batch, weight[:, None, None, None]), targets

    def _kind(self, side: int) -> str:
        """Whose policy images with this shorter side get: "cifar10" or "imagenet"."""
        if self.autoaugment in POLICIES:
            return self.autoaugment
        return "cifar10" if side < LARGE else "imagenet"

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

    def _covered(self, centre: torch.Tensor, side: int) -> torch.Tensor:
        """1 at the coordinates that a cutout around `centre` [B] covers, else 0: float [B, side]."""
        at = torch.arange(side, device=centre.device) - (centre - self.cutout // 2)[:, None]
        return ((at >= 0) & (at < self.cutout)).float()
