"""Batches whose order and augmentation follow from (seed, epoch, step), so a run resumes at any of them."""

from collections.abc import Iterator

import torch

from rst import draws
from rst.data.augment import Augment, normalize
from rst.data.images import ImageData

Batch = tuple[torch.Tensor, torch.Tensor]


def steps_per_epoch(data: ImageData, batch_size: int) -> int:
    """Full training batches in the training set. Raises ValueError when there is none."""
    n = len(data.train_labels)
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be between 1 and the {n} training images, got {batch_size}")
    return n // batch_size


def train_batches(
    data: ImageData, batch_size: int, augment: Augment, seed: int, epoch: int, start: int = 0
) -> Iterator[Batch]:
    """One epoch of (float32 images [B, C, H, W], labels [B]) from batch `start` on, on the data's device.

    The order is drawn by (seed, epoch), the augmentation by (seed, step), step counted from the first
    epoch's first batch. The images left over after the last full batch wait for another epoch's order.
    """
    steps = steps_per_epoch(data, batch_size)
    device = data.train_images.device
    order = torch.randperm(len(data.train_labels), generator=draws.generator(seed, "order", epoch)).to(device)
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    for i in range(start, steps):
        indices = order[i * batch_size : (i + 1) * batch_size]
        # Not images[indices]: index_select copies whole images, 8 times as fast on a CPU.
        images = data.train_images.index_select(0, indices)
        generator = draws.generator(seed, "augment", epoch * steps + i)
        yield augment(images, mean, std, generator), data.train_labels[indices]


def test_batches(data: ImageData, batch_size: int) -> Iterator[Batch]:
    """All test images in order, normalized only; the last batch may be smaller."""
    device = data.test_images.device
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    for images, labels in zip(
        data.test_images.split(batch_size), data.test_labels.split(batch_size), strict=True
    ):
        yield normalize(images, mean, std), labels
