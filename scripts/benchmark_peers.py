"""What the benchmark compares with: SAM, cutout and a loader of images as they are mostly written."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from rst.data import Augment

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # CIFAR-10's; no time depends on them


class UsualSAM:
    """SAM as it is mostly written, after github.com/davda54/sam: loops over the parameters, and a clone of
    each from pass to pass.

    `factor`: 1.0 there, as ASAM has another one in its place; None saves the multiplications by 1.
    """

    def __init__(self, base: torch.optim.Optimizer, rho: float, factor: float | None = 1.0) -> None:
        self.base, self.rho, self.factor = base, rho, factor
        self.kept: dict[Tensor, Tensor] = {}

    def _direction(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        return p.grad if self.factor is None else self.factor * p.grad

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """From θ to θ + ε."""
        with_gradient = [p for group in self.base.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([self._direction(p).norm() for p in with_gradient]).norm()
        scale = self.rho / (norm + 1e-12)
        for p in with_gradient:
            self.kept[p] = p.data.clone()
            p.add_(self._direction(p) * scale)
        if zero_grad:
            self.base.zero_grad()

    def restore(self) -> None:
        for p, kept in self.kept.items():
            p.data = kept

    def second_step(self, zero_grad: bool = False) -> None:
        """Back to θ, and the base optimizer's step along the gradient at θ + ε."""
        self.restore()
        self.base.step()
        if zero_grad:
            self.base.zero_grad()


class UsualCutout:
    """DeVries & Taylor 2017 as it is mostly written: a numpy mask for one normalized image."""

    def __init__(self, side: int) -> None:
        self.half = side // 2

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        mask = np.ones((height, width), np.float32)
        y, x = np.random.randint(height), np.random.randint(width)  # noqa: NPY002  as mostly written
        top, bottom = np.clip([y - self.half, y + self.half], 0, height)
        left, right = np.clip([x - self.half, x + self.half], 0, width)
        mask[top:bottom, left:right] = 0.0
        return image * torch.from_numpy(mask).expand_as(image)


class UsualImages(Dataset[tuple[Tensor, int]]):
    """Images in memory that become PIL's one at a time, as in torchvision's CIFAR10, and then what its
    transforms make of them: the operations of `augment` but mixup, which takes a batch."""

    def __init__(self, images: Any, labels: Tensor, augment: Augment) -> None:
        self.pixels, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        side, padding = images.shape[-1], augment.crop_padding
        steps = [transforms.RandomCrop(side, padding, padding_mode="reflect")] if padding else []
        steps += [transforms.RandomHorizontalFlip()] if augment.flip else []
        policy = transforms.AutoAugmentPolicy.CIFAR10
        steps += [transforms.AutoAugment(policy)] if augment.autoaugment else []
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        steps += [UsualCutout(augment.cutout)] if augment.cutout else []
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def usual_batches(
    images: UsualImages, batch_size: int, mixup: float = 0.0, workers: int = 0
) -> Iterator[list[Any]]:
    """Batches without end. With mixup, images with both their labels and the weight, for the loss to mix."""
    loader = DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        for x, y in loader:
            if not mixup:
                yield [x, y]
                continue
            weight = np.random.beta(mixup, mixup)  # noqa: NPY002
            partner = torch.randperm(len(x))
            yield [weight * x + (1 - weight) * x[partner], y, y[partner], weight]
