"""scikit-learn's digits: 1797 images of 8×8, shipped with the library, so nothing is downloaded."""

import numpy as np
import torch

from rst.data import images
from rst.data.images import ImageData

TRAIN = 1297


def digits(
    label_noise: float = 0.0, train_size: int | None = None, validation: bool = False, seed: int = 0
) -> ImageData:
    """Handwritten digits, [N, 1, 8, 8], 1297 for training and 500 for testing, stratified.

    The train/test split is the same for every `seed`, which draws the held-out tenth (`validation`), the
    part of `train_size` images and the label noise, in this order. `label_noise` is the fraction of the
    training labels that are replaced by a uniformly random class, possibly the true one.

    Raises ValueError for a label noise or train size out of range.
    """
    from sklearn.datasets import load_digits  # here, as it takes a second

    source = load_digits()
    # Pixels count 0..16; 255/16 is no integer, so the steps are 15 or 16 wide.
    pixels = torch.from_numpy(np.rint(source.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(source.target.astype(np.int64))
    train, test = images.stratified(labels, TRAIN, seed=0, split=images.DIGITS_SPLIT)
    mean, std = images.channel_statistics(pixels[train])
    data = ImageData(
        train_images=pixels[train],
        train_labels=labels[train],
        test_images=pixels[test],
        test_labels=labels[test],
        classes=tuple(map(str, source.target_names)),
        mean=mean,
        std=std,
    )
    data = images.restrict(data, train_size, validation, seed)
    # Last, so that the images held out keep their true labels.
    return images.with_noise(data, label_noise, seed)
