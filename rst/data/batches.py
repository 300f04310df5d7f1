"""Batches whose order and augmentation follow from (seed, epoch), so a run resumes at any of them."""

from collections.abc import Generator, Iterator, Sequence

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
) -> Generator[tuple[Tensor, Tensor], None, None]:
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
    host_bits = draw_augmentation(seed, epoch, n)
    # To the device once an epoch, so that no step copies from the host. AutoAugment's does: the host groups
    # its operations.
    there, bits = order.to(device), host_bits.to(device)
    weights = augment.mixup_weights(host_bits).to(device) if augment.mixup else None
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    is_streamed = isinstance(data.train_images, ImageFiles)
    share = _share(batch_size, rank, ranks)
    share_there = share.to(device)
    places = [slice(i * batch_size, (i + 1) * batch_size) for i in range(start, steps)]
    taken = _take(
        data.train_images,
        [order[place][share] if is_streamed else there[place][share_there] for place in places],
        host_bits[DRAWS.index("resized_crop")] if augment.random_resized_crop else None,
    )
    for place, images in zip(places, taken, strict=True):
        batch = there[place]
        own_bits = augment.draws_of(bits, batch)[:, share_there]
        own_host_bits = host_bits[:, order[place][share]] if augment.autoaugment else None
        augmented = augment(images, mean, std, own_bits, own_host_bits)
        labels = data.train_labels[batch[share_there]]
        if weights is not None:
            weight = weights[batch[:1]].expand(batch_size) if augment.per_batch else weights[batch]
            augmented, labels = augment.mix(augmented, labels, len(data.classes), weight[share_there])
            if augment.cuts_mixed:
                augmented = augment.cut(augmented, own_bits)
        yield augmented, labels


def _share(batch_size: int, rank: int, ranks: int) -> Tensor:
    """The places in a batch of one of `ranks` processes: as many from the front as mirrored from the back, so
    that mixup's partner of an image is in the same share, at its mirrored place."""
    if ranks == 1:
        return torch.arange(batch_size)
    assert batch_size % (2 * ranks) == 0, "which Training refuses"
    front = torch.arange(batch_size // 2).chunk(ranks)[rank]
    return torch.cat([front, batch_size - 1 - front.flip(0)])


def evaluation_batches(
    data: ImageData, batch_size: int, rank: int = 0, ranks: int = 1
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """All test images in order, normalized only; the last batch may be smaller. Of `ranks` processes, the
    part of one: each image is in exactly one part."""
    device = data.test_images.device
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    where = "cpu" if isinstance(data.test_images, ImageFiles) else device
    part = torch.arange(len(data.test_labels), device=where).tensor_split(ranks)[rank]
    batches = part.split(batch_size) if len(part) else ()
    for chosen, images in zip(batches, _take(data.test_images, batches, None), strict=True):
        yield normalize(images, mean, std), data.test_labels[chosen.to(device)]


def _take(images: Tensor | ImageFiles, batches: Sequence[Tensor], crops: Tensor | None) -> Iterator[Tensor]:
    """The images of each batch of indices, uint8 [B, C, H, W]. Indices are on the CPU for streamed images,
    else on the images' device."""
    if isinstance(images, ImageFiles):
        yield from images.batches(batches, crops)
        return
    for chosen in batches:
        # Not images[chosen]: index_select copies whole images, 8 times as fast on a CPU.
        yield images.index_select(0, chosen)
