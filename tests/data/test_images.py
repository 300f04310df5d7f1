"""What every data set shares: splits, label noise, statistics."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from rst.data import images
from rst.data.images import ImageData

FALSE_ALARM = 1e-6  # of each statistical test; seeds are fixed, so a test that passes keeps passing


def numbered(counts: list[int], shuffle: bool = True) -> ImageData:
    """`counts[c]` training images of class c; an image's three pixels spell its index."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    if shuffle:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    index = torch.arange(len(labels))
    pixels = torch.stack([index // 65536, index // 256 % 256, index % 256], 1)
    return ImageData(
        train_images=pixels[:, :, None, None].byte(),
        train_labels=labels,
        test_images=torch.zeros(7, 3, 1, 1, dtype=torch.uint8),
        test_labels=torch.zeros(7, dtype=torch.int64),
        classes=tuple(map(str, range(len(counts)))),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


def index_of(pixels: torch.Tensor) -> torch.Tensor:
    high, middle, low = pixels.long()[:, :, 0, 0].unbind(1)
    return high * 65536 + middle * 256 + low


def test_images_of_another_type_are_refused():
    with pytest.raises(ValueError, match=r"uint8.*float32"):
        replace(numbered([1]), train_images=torch.zeros(1, 3, 1, 1))


def test_validation_of_50000_randomly_ordered_images_is_the_last_5000() -> None:
    data = numbered([5000] * 10)
    split = images.restrict(data, None, validation=True, seed=3, random_order=True)
    assert torch.equal(index_of(split.train_images), torch.arange(45_000))
    assert torch.equal(index_of(split.test_images), torch.arange(45_000, 50_000))
    assert torch.equal(split.train_labels, data.train_labels[:45_000])
    assert torch.equal(split.test_labels, data.train_labels[45_000:])


def test_validation_of_ordered_images_is_a_stratified_tenth() -> None:
    data = numbered([300, 500, 200], shuffle=False)
    split = images.restrict(data, None, validation=True, seed=3)
    assert split.test_labels.bincount().tolist() == [30, 50, 20]
    assert split.train_labels.bincount().tolist() == [270, 450, 180]
    train, held = index_of(split.train_images), index_of(split.test_images)
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(1000))
    assert torch.equal(data.train_labels[held], split.test_labels)
    assert torch.equal(data.train_labels[train], split.train_labels)
    other = images.restrict(data, None, validation=True, seed=4)
    assert not torch.equal(index_of(other.test_images), held)


def test_train_size_keeps_class_shares_and_order_and_follows_the_seed() -> None:
    data = numbered([300, 500, 200])
    part = images.restrict(data, 100, validation=False, seed=0)
    chosen = index_of(part.train_images)
    assert part.train_labels.bincount().tolist() == [30, 50, 20]
    assert torch.equal(chosen, chosen.unique())
    assert torch.equal(part.train_labels, data.train_labels[chosen])
    assert part.test_images is data.test_images
    again = images.restrict(data, 100, validation=False, seed=0)
    assert torch.equal(index_of(again.train_images), chosen)
    other = images.restrict(data, 100, validation=False, seed=1)
    assert not torch.equal(index_of(other.train_images), chosen)


def test_train_size_is_taken_from_what_validation_leaves() -> None:
    data = numbered([500] * 4)
    whole = images.restrict(data, None, validation=True, seed=0)
    part = images.restrict(data, 200, validation=True, seed=0)
    assert torch.equal(part.test_images, whole.test_images)
    assert set(index_of(part.train_images).tolist()) <= set(index_of(whole.train_images).tolist())
    assert len(part.train_labels) == 200


def test_train_size_of_all_changes_nothing() -> None:
    data = numbered([20, 20])
    assert images.restrict(data, 40, validation=False, seed=0) is data
    assert images.restrict(data, None, validation=False, seed=0) is data


@pytest.mark.parametrize("size", [-1, 0, 1, 39, 41])
def test_train_size_out_of_range(size: int) -> None:
    message = rf"train_size must be 40 \(all training images\) or from 2 to 38 \(of 2 classes\), got {size}"
    with pytest.raises(ValueError, match=message):
        images.restrict(numbered([20, 20]), size, validation=False, seed=0)


def test_a_class_with_one_image_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match=r"cannot divide 40 images by class after 36: .*only 1 member"):
        images.restrict(numbered([39, 1]), None, validation=True, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.4, 0.9999, 1.0])
@pytest.mark.parametrize("n", [10, 1297])
def test_label_noise_replaces_exactly_round_fraction_n(fraction: float, n: int) -> None:
    # With 10^15 classes, a replaced label that happens to be the true one has probability 10^-12.
    noisy = images.noisy_labels(torch.zeros(n, dtype=torch.int64), 10**15, fraction, seed=0)
    assert int((noisy != 0).sum()) == round(fraction * n)


def test_label_noise_is_uniform_over_the_classes_and_the_images() -> None:
    n, k = 20_000, 10
    noisy = images.noisy_labels(torch.full((n,), 3), k, 0.5, seed=0)
    replaced_by_another = noisy[noisy != 3]
    counts = replaced_by_another.bincount(minlength=k)[torch.arange(k) != 3]
    assert scipy.stats.chisquare(counts).pvalue > FALSE_ALARM
    # The true class is among the ten: on average a tenth of the replaced labels stays.
    assert scipy.stats.binomtest(len(replaced_by_another), n // 2, 1 - 1 / k).pvalue > FALSE_ALARM
    where = (noisy != 3).reshape(20, -1).sum(1)
    assert scipy.stats.chisquare(where).pvalue > FALSE_ALARM


def test_label_noise_follows_the_seed_and_leaves_its_input() -> None:
    labels = torch.arange(100) % 10
    noisy = images.noisy_labels(labels, 10, 0.5, seed=1)
    assert torch.equal(labels, torch.arange(100) % 10)
    assert torch.equal(noisy, images.noisy_labels(labels, 10, 0.5, seed=1))
    assert not torch.equal(noisy, images.noisy_labels(labels, 10, 0.5, seed=2))


def test_smaller_label_noise_is_part_of_the_larger() -> None:
    labels = torch.zeros(500, dtype=torch.int64)
    some, more = (images.noisy_labels(labels, 10**15, fraction, seed=0) for fraction in (0.2, 0.6))
    assert torch.equal(some[some != 0], more[some != 0])


@pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan")])
def test_label_noise_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"label_noise must be between 0 and 1, got {fraction}"):
        images.noisy_labels(torch.zeros(4, dtype=torch.int64), 10, fraction, seed=0)


def test_channel_statistics_against_float64() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5000, 3, 4, 5), dtype=np.uint8)
    pixels[:, 1] //= 3
    pixels[:, 2] = 51
    mean, std = images.channel_statistics(torch.from_numpy(pixels))
    expected = (pixels / 255.0).transpose(1, 0, 2, 3).reshape(3, -1)
    assert mean == pytest.approx(expected.mean(1), abs=1e-12)
    assert std[:2] == pytest.approx(expected.std(1)[:2], abs=1e-12)
    assert std[2] == 1.0  # constant: dividing by 0 would make every loss nan


def test_to_moves_every_tensor_and_keeps_uint8() -> None:
    moved = numbered([5, 5]).to("meta")
    for tensor in (moved.train_images, moved.train_labels, moved.test_images, moved.test_labels):
        assert tensor.device.type == "meta"
    assert moved.train_images.dtype == moved.test_images.dtype == torch.uint8
    assert moved.train_labels.dtype == moved.test_labels.dtype == torch.int64
    assert moved.mean == (0.5,) * 3


def test_parts_are_disjoint_stratified_and_together_everything() -> None:
    labels = numbered([41, 30, 52]).train_labels
    parts = [images.part_of(labels, fold, 10, seed=3) for fold in range(10)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(123))
    assert {len(part) for part in parts} == {12, 13}
    counts = torch.stack([labels[part].bincount(minlength=3) for part in parts])
    assert (counts.max(0).values - counts.min(0).values).max() == 1
    assert all(torch.equal(part, part.unique()) for part in parts)
    assert torch.equal(images.part_of(labels, 12, 10, seed=3), parts[2])
    assert not torch.equal(images.part_of(labels, 2, 10, seed=4), parts[2])
    # Of half as many parts, each is two of these.
    assert torch.equal(images.part_of(labels, 2, 5, seed=3), torch.cat([parts[2], parts[7]]).sort().values)


def test_validation_and_train_size_are_taken_from_the_part() -> None:
    data = numbered([500] * 4)
    fold = images.restrict(data, None, validation=False, seed=0, fold=1, folds=5)
    assert fold.test_images is data.test_images and len(fold.train_labels) == 400
    split = images.restrict(data, 100, validation=True, seed=0, fold=1, folds=5)
    held, chosen = index_of(split.test_images), index_of(split.train_images)
    assert (len(held), len(chosen)) == (40, 100)
    assert set(held.tolist()) | set(chosen.tolist()) <= set(index_of(fold.train_images).tolist())
    assert not set(held.tolist()) & set(chosen.tolist())
    assert torch.equal(split.train_labels, data.train_labels[chosen])


@pytest.mark.parametrize(("fold", "folds"), [(0, 0), (0, 31), (-1, 5), (None, 5), (2, None)])
def test_impossible_parts_are_refused(fold: int | None, folds: int | None) -> None:
    with pytest.raises(ValueError, match=f"got (folds={folds}, fold={fold}|fold={fold}, folds={folds})"):
        images.restrict(numbered([40, 30]), None, validation=False, seed=0, fold=fold, folds=folds)


def test_label_noise_spares_what_is_held_out_and_differs_from_fold_to_fold() -> None:
    data = numbered([200] * 5, shuffle=False)  # so that each fold has the same labels

    def noisy(fold: int) -> ImageData:
        part = images.restrict(data, None, validation=True, seed=0, fold=fold, folds=4)
        made = images.with_noise(part, 0.4, 0, fold)
        assert made.test_labels is part.test_labels and made.train_images is part.train_images
        wrong = int((made.train_labels != part.train_labels).sum())
        assert 0 < wrong <= round(0.4 * 225)
        return made

    assert torch.equal(noisy(1).train_labels, noisy(1).train_labels)
    assert not torch.equal(noisy(1).train_labels, noisy(2).train_labels)
    assert images.with_noise(data, None, 0) is data
