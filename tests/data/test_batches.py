"""Order and augmentation follow from (seed, epoch), and a run may start anywhere."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rst import data
from rst.data import Augment, ImageData

# As a module attribute: pytest would take an imported function named test_... for a test.
AUGMENT = Augment(flip=True, crop_padding=1, cutout=2)
PLAIN = Augment()


def numbered(n_train: int = 23, n_test: int = 11) -> ImageData:
    """Images of random pixels; a label is the image's index."""
    generator = torch.Generator().manual_seed(0)

    def pixels(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=generator)

    return ImageData(
        train_images=pixels(n_train),
        train_labels=torch.arange(n_train),
        test_images=pixels(n_test),
        test_labels=torch.arange(n_test),
        classes=("a",),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.25),
    )


def same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(some, others, strict=True)
    )


def test_an_epoch_has_each_image_once_and_no_partial_batch() -> None:
    source = numbered()
    batches = list(data.train_batches(source, 5, PLAIN, seed=0, epoch=0))
    assert [len(y) for _, y in batches] == [5] * 4 == [5] * data.steps_per_epoch(source, 5)
    labels = torch.cat([y for _, y in batches])
    assert len(labels.unique()) == 20
    for x, y in batches:
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert torch.equal(x, data.normalize(source.train_images[y], source.mean, source.std))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, augment: Augment = PLAIN) -> list[int]:
        return torch.cat([y for _, y in data.train_batches(numbered(), 5, augment, seed, epoch)]).tolist()

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) == order(0, 3, AUGMENT)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    # Over the epochs no image is always among the three left out.
    assert len({label for epoch in range(10) for label in order(0, epoch)}) == 23


def test_equal_seed_and_epoch_give_equal_batches_whatever_was_drawn_before() -> None:
    first = list(data.train_batches(numbered(), 5, AUGMENT, seed=2, epoch=1))
    torch.manual_seed(99)
    torch.rand(10)
    assert same(first, list(data.train_batches(numbered(), 5, AUGMENT, seed=2, epoch=1)))
    assert not same(first, list(data.train_batches(numbered(), 5, AUGMENT, seed=3, epoch=1)))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(data.train_batches(numbered(), 5, AUGMENT, seed=0, epoch=0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", range(5))
def test_start_equals_skipping(start: int) -> None:
    whole = list(data.train_batches(numbered(), 5, AUGMENT, seed=2, epoch=1))
    assert same(whole[start:], list(data.train_batches(numbered(), 5, AUGMENT, seed=2, epoch=1, start=start)))


def test_an_images_augmentation_does_not_depend_on_its_batch() -> None:
    """(seed, epoch, image) decide, so that neither batch size nor the number of processes does."""

    def by_image(batch_size: int) -> dict[int, torch.Tensor]:
        augment = Augment(flip=True, crop_padding=2, cutout=2, autoaugment="cifar10")
        batches = data.train_batches(numbered(24), batch_size, augment, seed=2, epoch=1)
        return {int(label): image for x, y in batches for image, label in zip(x, y, strict=True)}

    by_three, by_eight = by_image(3), by_image(8)
    assert by_three.keys() == by_eight.keys() == set(range(24))
    assert all(torch.equal(image, by_eight[label]) for label, image in by_three.items())


def test_per_batch_has_one_mixup_weight_a_batch() -> None:
    """That of its first image."""
    source = replace(numbered(), classes=tuple(map(str, range(23))))
    labels, separate, targets = (
        [y for _, y in data.train_batches(source, 5, augment, seed=0, epoch=0)]
        for augment in (PLAIN, Augment(mixup=1.0), Augment(mixup=1.0, per_batch=True))
    )
    for own, single, shared in zip(labels, separate, targets, strict=True):
        weights = shared.gather(1, own[:, None])[:, 0]
        others = [i for i in range(5) if i != 2]  # the middle one is its own partner
        assert (weights[others] == single[0, own[0]]).all()


def test_mixup_first_leaves_each_image_its_own_whole_square() -> None:
    source = replace(numbered(), classes=tuple(map(str, range(23))))
    cut, mixed, mixed_first = (
        torch.cat([x for x, _ in data.train_batches(source, 5, augment, seed=0, epoch=0)])
        for augment in (
            Augment(cutout=2),
            Augment(cutout=2, mixup=1.0),
            Augment(cutout=2, mixup=1.0, mixup_first=True),
        )
    )
    assert torch.equal((mixed_first == 0).all(1), (cut == 0).all(1))
    assert not torch.equal((mixed == 0).all(1), (cut == 0).all(1))


def test_mixup_gives_probabilities() -> None:
    source = replace(numbered(), classes=tuple(map(str, range(23))))
    plain = list(data.train_batches(source, 5, PLAIN, seed=0, epoch=0))
    mixed = list(data.train_batches(source, 5, Augment(mixup=1.0), seed=0, epoch=0))
    for (x, y), (x_plain, labels) in zip(mixed, plain, strict=True):
        assert y.shape == (5, 23)
        weight = y.gather(1, labels[:, None])[:, 0]
        assert ((weight >= 0.5) & (weight <= 1)).all()
        torch.testing.assert_close(x, torch.lerp(x_plain.flip(0), x_plain, weight[:, None, None, None]))


def test_the_same_image_is_augmented_anew_in_each_epoch() -> None:
    one = ImageData(**{**vars(numbered(1)), "train_labels": torch.zeros(1, dtype=torch.int64)})
    views = [x for epoch in range(8) for x, _ in data.train_batches(one, 1, AUGMENT, seed=0, epoch=epoch)]
    assert len({x.numpy().tobytes() for x in views}) > 4


def test_test_batches_are_all_images_in_order() -> None:
    source = numbered()
    batches = list(data.evaluation_batches(source, 4))
    assert [len(y) for _, y in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([y for _, y in batches]), source.test_labels)
    expected = data.normalize(source.test_images, source.mean, source.std)
    assert torch.equal(torch.cat([x for x, _ in batches]), expected)
    assert len(list(data.evaluation_batches(source, 100))) == 1


@pytest.mark.parametrize("batch_size", [24, 0, -3])
def test_batch_size_out_of_range(batch_size: int) -> None:
    message = f"batch_size must be between 1 and the 23 training images, got {batch_size}"
    with pytest.raises(ValueError, match=message):
        data.steps_per_epoch(numbered(), batch_size)
    with pytest.raises(ValueError, match=message):
        next(data.train_batches(numbered(), batch_size, PLAIN, seed=0, epoch=0))


def test_batch_size_of_the_whole_training_set() -> None:
    assert data.steps_per_epoch(numbered(), 23) == 1
