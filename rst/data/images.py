"""A data set, and the steps that data sets share: parts, holding out, label noise."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from rst import draws
from rst.data.image_files import ImageFiles

# Index of each use of the stream "split", so that none of them shifts another. Never renumber.
DIGITS_SPLIT, VALIDATION_SPLIT, TRAIN_SIZE_SPLIT, SHARPNESS_SPLIT, FOLDS_SPLIT = 0, 1, 2, 3, 4


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images with their labels, all on one device.

    Images are uint8 [N, C, H, W], in memory or streamed from files; labels int64 [N]; `classes[label]` is a
    label's name. `mean` and `std` are per channel, of pixel values scaled to [0, 1].
    """

    train_images: torch.Tensor | ImageFiles
    train_labels: torch.Tensor
    test_images: torch.Tensor | ImageFiles
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for images in (self.train_images, self.test_images):
            if isinstance(images, torch.Tensor) and images.dtype != torch.uint8:
                raise ValueError(f"images must be uint8, 0 to 255, got {images.dtype}")

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data on `device`, still uint8: a quarter of float's memory and transfer. Streamed images
        are sent there batch by batch."""
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def channel_statistics(images: torch.Tensor) -> Statistics:
    """Mean and (population) standard deviation per channel of uint8 [N, C, H, W], scaled to [0, 1].

    Exact, from a histogram of the 256 values. A constant channel gets std 1, so that it can be divided by.
    """
    # In chunks: bincount widens its input to int64, eight times the size of the data.
    parts = [[value_counts(part) for part in channel.split(4096)] for channel in images.unbind(1)]
    return statistics_of_counts(np.array([sum(channel) for channel in parts]))


def value_counts(pixels: torch.Tensor | np.ndarray) -> np.ndarray:
    """How often each of the 256 values occurs in uint8 pixels."""
    return np.bincount(np.asarray(pixels).ravel(), minlength=256)


def statistics_of_counts(counts: np.ndarray) -> Statistics:
    """`channel_statistics` of images with these value counts, [C, 256]."""
    values = np.arange(256) / 255
    means = [float(np.average(values, weights=channel)) for channel in counts]
    spreads = [np.average((values - mean) ** 2, weights=c) for mean, c in zip(means, counts, strict=True)]
    return tuple(means), tuple(float(spread) ** 0.5 or 1.0 for spread in spreads)


def stratified(labels: torch.Tensor, size: int, seed: int, split: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`size` indices in which each class keeps its share, drawn by (seed, split), and the remaining ones.

    Both sorted. Raises ValueError where scikit-learn cannot: a class with one image, or fewer images than
    classes on one side.
    """
    from sklearn.model_selection import train_test_split  # here, as it takes a second

    random_state = draws.draw(seed, "split", split) % 2**32  # scikit-learn takes 32 bits
    try:
        chosen, rest = train_test_split(
            np.arange(len(labels)), train_size=size, stratify=labels.numpy(), random_state=random_state
        )
    except ValueError as error:
        raise ValueError(f"cannot divide {len(labels)} images by class after {size}: {error}") from None
    return torch.from_numpy(np.sort(chosen)), torch.from_numpy(np.sort(rest))


def part_of(labels: torch.Tensor, fold: int, folds: int, seed: int) -> torch.Tensor:
    """The indices, sorted, of part `fold` modulo `folds` of the disjoint, stratified parts that `seed` draws.
    Sizes, and counts of a class, differ by one at most.

    Raises ValueError where a part would have no image of some class.
    """
    fewest = int(labels.unique(return_counts=True)[1].min())
    if not 1 <= folds <= fewest or fold < 0:
        raise ValueError(
            f"folds must be between 1 and {fewest}, the images of the smallest class, and fold a whole "
            f"number ≥ 0, got folds={folds}, fold={fold}"
        )
    shuffled = torch.randperm(len(labels), generator=draws.generator(seed, "split", FOLDS_SPLIT))
    # Class after class, dealt out to the parts like cards.
    by_class = shuffled[labels.cpu()[shuffled].argsort(stable=True)]
    return by_class[fold % folds :: folds].sort().values


def restrict(
    data: ImageData,
    train_size: int | None,
    validation: bool,
    seed: int,
    random_order: bool = False,
    fold: int | None = None,
    folds: int | None = None,
) -> ImageData:
    """`data` with the training images of one of `folds` parts (`part_of`), in validation mode, and of what is
    then left for training a stratified part of `train_size` images, drawn by `seed`; None keeps it all.

    Validation mode puts a tenth of the training set, rounded down, in the place of the test set: the last
    tenth of data that are stored in random order, else a stratified one drawn by `seed`.

    Raises ValueError for data of one class, for one of `fold` and `folds` without the other, and for a size
    that leaves fewer images than classes on one side.
    """
    if len(data.classes) < 2:
        raise ValueError(f"all images are of one class, {data.classes[0]}: training needs two or more")
    if (fold is None) != (folds is None):
        raise ValueError(f"fold and folds go together, got fold={fold}, folds={folds}")
    if fold is not None and folds is not None:
        data = _train_on(data, part_of(data.train_labels, fold, folds, seed))
    if validation:
        n = len(data.train_labels) - len(data.train_labels) // 10
        if random_order:
            kept, held = torch.arange(len(data.train_labels)).tensor_split([n])
        else:
            kept, held = stratified(data.train_labels, n, seed, VALIDATION_SPLIT)
        held_images, held_labels = data.train_images[held], data.train_labels[held]
        data = replace(_train_on(data, kept), test_images=held_images, test_labels=held_labels)

    n, k = len(data.train_labels), len(data.classes)
    if train_size is None or train_size == n:
        return data
    if not k <= train_size <= n - k:
        parts = f" or from {k} to {n - k} (of {k} classes)" if n >= 2 * k else ""
        raise ValueError(f"train_size must be {n} (all training images){parts}, got {train_size}")
    return _train_on(data, stratified(data.train_labels, train_size, seed, TRAIN_SIZE_SPLIT)[0])


def _train_on(data: ImageData, indices: torch.Tensor) -> ImageData:
    return replace(data, train_images=data.train_images[indices], train_labels=data.train_labels[indices])


def with_noise(data: ImageData, fraction: float | None, seed: int, fold: int | None = None) -> ImageData:
    """`data` with `noisy_labels` for training, drawn anew for each `fold`, even for 2 and 12 of 10
    folds, which are the same part; None changes nothing."""
    if fraction is None:
        return data
    return replace(
        data, train_labels=noisy_labels(data.train_labels, len(data.classes), fraction, seed, fold or 0)
    )


def noisy_labels(
    labels: torch.Tensor, classes: int, fraction: float, seed: int, index: int = 0
) -> torch.Tensor:
    """`labels` with exactly round(fraction·n) of them, chosen at random, each replaced by a uniformly random
    class, drawn by `seed` and `index`. That may be the true one: a share 1/classes of the replaced labels
    stays right on average.

    Raises ValueError unless 0 ≤ fraction ≤ 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"label_noise must be between 0 and 1, got {fraction}")
    n = len(labels)
    generator = draws.generator(seed, "label_noise", index)
    replaced = torch.randperm(n, generator=generator)[: round(fraction * n)]
    # n draws whatever the fraction: for one seed, the noisy labels of a smaller fraction keep their values.
    random_labels = torch.randint(classes, (n,), generator=generator)
    noisy = labels.clone()
    noisy[replaced] = random_labels[replaced]
    return noisy
