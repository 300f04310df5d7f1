"""Batches whose order and augmentation follow from (seed, epoch), so a run resumes at any of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rst import draws
from rst.data.augment import DRAWS, Augment, draw_augmentation, normalize
from rst.data.image_files import ImageFiles
from rst.data.images import ImageData


def steps_per_epoch(data: ImageData, batch_size: int) -> int:
    """Full training batches in the training set. Raises ValueError when there is none."""
    n = len(data.train_labels)
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be between 1 and the {n} training images, got {batch_size}")
    return n // batch_size


def train_batches(
    data: ImageData,
    batch_size: int,
    augment: Augment,
    seed: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images, labels) from batch `start` on, on the data's device; of `ranks` processes, the
    share of one in each batch of `batch_size` images.

    Images are float32 [B, C, H, W]; labels int64 [B], or with mixup probabilities, float32 [B, classes].
    The order is drawn by (seed, epoch), an image's augmentation by (seed, epoch, image). The images left
    over after the last full batch wait for another epoch's order.
    """
    steps = steps_per_epoch(data, batch_size)
    device = data.train_images.device
    n = len(data.train_labels)
    order = torch.randperm(n, generator=draws.generator(seed, "order", epoch))
    bits = draw_augmentation(seed, epoch, n)
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    share = _share(batch_size, rank, ranks)
    batches = [order[i * batch_size : (i + 1) * batch_size] for i in range(start, steps)]
    shares = [batch[share] for batch in batches]
    crops = bits[DRAWS.index("resized_crop")] if augment.random_resized_crop else None
    for batch, chosen, images in zip(batches, shares, _take(data.train_images, shares, crops), strict=True):
        own_bits = augment.draws_of(bits, batch)[:, share]
        augmented = augment(images, mean, std, own_bits)
        labels = data.train_labels[chosen.to(device, non_blocking=True)]
        if augment.mixup:
            augmented, labels = augment.mix(augmented, labels, len(data.classes), own_bits)
        yield augmented, labels


def _share(batch_size: int, rank: int, ranks: int) -> Tensor:
    """The places in a batch of one of `ranks` processes: as many from the front as mirrored from the back, so
    that mixup's partner of an image is in the same share, at its mirrored place."""
    if ranks == 1:
        return torch.arange(batch_size)
    if batch_size % (2 * ranks):
        raise ValueError(
            f"batch_size={batch_size} must be divisible by {2 * ranks}, twice the number of processes"
        )
    front = torch.arange(batch_size // 2).chunk(ranks)[rank]
    return torch.cat([front, batch_size - 1 - front.flip(0)])


def evaluation_batches(
    data: ImageData, batch_size: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """All test images in order, normalized only; the last batch may be smaller. Of `ranks` processes, the
    part of one: each image is in exactly one part."""
    device = data.test_images.device
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    part = torch.arange(len(data.test_labels)).tensor_split(ranks)[rank]
    batches = part.split(batch_size) if len(part) else ()
    for chosen, images in zip(batches, _take(data.test_images, batches, None), strict=True):
        yield normalize(images, mean, std), data.test_labels[chosen.to(device)]


def _take(images: Tensor | ImageFiles, batches: Sequence[Tensor], crops: Tensor | None) -> Iterator[Tensor]:
    """The images of each batch of indices, uint8 [B, C, H, W]."""
    if isinstance(images, ImageFiles):
        yield from images.batches(batches, crops)
        return
    for chosen in batches:
        # Not images[chosen]: index_select copies whole images, 8 times as fast on a CPU.
        yield images.index_select(0, chosen.to(images.device, non_blocking=True))
