"""Every draw is per sample, uniform and independent of the others; the pixels equal a slow reference's."""

from collections.abc import Callable

import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from rst import draws
from rst.data import Augment, normalize

FALSE_ALARM = 1e-6  # of each chi-squared test; seeds are fixed, so a test that passes keeps passing


def slow_geometry(image: torch.Tensor, padding: int, flip: int, top: int, left: int) -> torch.Tensor:
    """One image [C, H, W], padded by PyTorch's own reflection, cropped, mirrored."""
    height, width = image.shape[1:]
    padded = F.pad(image[None].double(), (padding,) * 4, mode="reflect")[0]
    crop = padded[:, top : top + height, left : left + width]
    return crop.flip(2) if flip else crop


def slow_cutout(image: torch.Tensor, size: int, y: int, x: int) -> torch.Tensor:
    cut = image.clone()
    for row in range(y - size // 2, y - size // 2 + size):
        for column in range(x - size // 2, x - size // 2 + size):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                cut[:, row, column] = 0
    return cut


def coordinates(height: int, width: int) -> torch.Tensor:
    """An image of each pixel's row and column, counted from 1, in two channels: 0 is what was cut out."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns]).byte() + 1


def outcomes(augment: Augment, height: int, width: int) -> dict[bytes, tuple[int, int, int, int, int]]:
    """Each possible output for the image of coordinates, by the slow reference -> (flip, top, left, y, x)."""
    found = {}
    offsets = range(2 * augment.crop_padding + 1)
    for flip in range(2 if augment.flip else 1):
        for top in offsets:
            for left in offsets:
                moved = slow_geometry(coordinates(height, width), augment.crop_padding, flip, top, left)
                for y in range(height if augment.cutout else 1):
                    for x in range(width if augment.cutout else 1):
                        cut = slow_cutout(moved, augment.cutout, y, x)
                        found[cut.byte().numpy().tobytes()] = (flip, top, left, y, x)
    return found


def observe(
    augment: Augment, height: int, width: int, batches: list[int], seed: int = 0
) -> list[tuple[int, ...]]:
    """What was drawn for each sample of batches of these sizes, read off the augmented images. A sample that
    is not exactly one of the reference's outcomes is a KeyError."""
    possible = outcomes(augment, height, width)
    result: list[tuple[int, ...]] = []
    for step, size in enumerate(batches):
        images = coordinates(height, width).expand(size, -1, -1, -1)
        # With this mean and std, a normalized value is the pixel's.
        batch = augment(images, (0.0, 0.0), (1 / 255, 1 / 255), draws.generator(seed, "augment", step))
        exact = batch.round().byte()
        assert torch.allclose(batch, exact.float(), atol=1e-4)
        result += [possible[sample.tobytes()] for sample in exact.numpy()]
    return result


def uniform(samples: list[tuple[int, ...]], cells: int) -> None:
    """The samples are uniform over `cells` possible values."""
    seen: dict[tuple[int, ...], int] = {}
    for sample in samples:
        seen[sample] = seen.get(sample, 0) + 1
    assert len(seen) <= cells
    counts = [*seen.values(), *[0] * (cells - len(seen))]
    assert min(cells, len(samples) / cells) >= 2, "too few samples or cells for a chi-squared test"
    assert scipy.stats.chisquare(counts).pvalue > FALSE_ALARM


LAYOUTS = {"in one batch": [20_000], "over the steps": [8] * 1_000, "first of each step": [1] * 2_000}


@pytest.mark.parametrize("batches", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_flip_is_uniform_per_sample(batches: list[int]) -> None:
    uniform(observe(Augment(flip=True), 4, 4, batches), cells=2)


@pytest.mark.parametrize("batches", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_crop_offset_is_uniform_per_sample_on_both_axes(batches: list[int]) -> None:
    augment = Augment(crop_padding=3)
    assert len(outcomes(augment, 8, 6)) == 49
    uniform(observe(augment, 8, 6, batches), cells=49)


@pytest.mark.parametrize("size", [3, 6])
@pytest.mark.parametrize("batches", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_cutout_centre_is_uniform_per_sample_and_clipped(batches: list[int], size: int) -> None:
    augment = Augment(cutout=size)
    assert len(outcomes(augment, 8, 6)) == 48
    uniform(observe(augment, 8, 6, batches), cells=48)


def test_parts_are_independent_of_each_other() -> None:
    augment = Augment(flip=True, crop_padding=1, cutout=2)
    # Sides that 2 and 3 divide, so that parts which shared a draw would show.
    cells = 2 * 9 * 36
    assert len(outcomes(augment, 6, 6)) == cells
    uniform(observe(augment, 6, 6, [50_000]), cells)


def test_neighbours_in_a_batch_are_independent() -> None:
    samples = observe(Augment(flip=True, crop_padding=1), 5, 5, [40_000])
    pairs = [a + b for a, b in zip(samples[::2], samples[1::2], strict=True)]
    uniform(pairs, cells=18 * 18)


@pytest.mark.parametrize("padding", [1, 4, 7])
def test_the_recipe_at_full_size_equals_the_reference(padding: int) -> None:
    augment = Augment(flip=True, crop_padding=padding)
    samples = observe(augment, 32, 32, [512])  # KeyError where pixels differ
    assert len(set(samples)) > 0.2 * min(512, 2 * (2 * padding + 1) ** 2)


def test_padding_by_the_side_less_one() -> None:
    augment = Augment(crop_padding=3)
    possible = set(outcomes(augment, 4, 4).values())
    assert len(possible) == 36  # not 49: the reflection repeats after 6 pixels, so offsets 0 and 6 look alike
    assert set(observe(augment, 4, 4, [1_000])) == possible


@pytest.mark.parametrize(
    "off",
    [
        lambda a: Augment(False, a.crop_padding, a.cutout),
        lambda a: Augment(a.flip, 0, a.cutout),
        lambda a: Augment(a.flip, a.crop_padding, 0),
    ],
    ids=["flip", "crop_padding", "cutout"],
)
def test_switching_a_part_off_leaves_the_others_draws(off: Callable[[Augment], Augment]) -> None:
    every = Augment(flip=True, crop_padding=2, cutout=3)
    fewer = off(every)
    with_all, with_fewer = (observe(augment, 8, 8, [64, 64]) for augment in (every, fewer))
    kept = [
        i
        for i, on in enumerate(
            [fewer.flip, fewer.crop_padding, fewer.crop_padding, fewer.cutout, fewer.cutout]
        )
        if on
    ]
    assert len(kept) >= 3
    for one, other in zip(with_all, with_fewer, strict=True):
        assert [one[i] for i in kept] == [other[i] for i in kept]


def test_draws_need_no_particular_size_of_cutout_or_padding() -> None:
    """The cutout's centre stays where it was when its size changes."""
    small, large = (observe(Augment(flip=True, cutout=size), 8, 8, [200]) for size in (2, 5))
    assert small == large


def test_values_against_a_float64_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (40, 3, 12, 9), dtype=torch.uint8, generator=generator)
    mean, std = (0.49, 0.3, 0.7), (0.24, 0.1, 0.3)
    augment = Augment(flip=True, crop_padding=2, cutout=4)
    drawn = observe(augment, 12, 9, [40], seed=6)
    batch = augment(images, mean, std, draws.generator(6, "augment", 0))
    assert batch.dtype == torch.float32
    assert batch.shape == images.shape
    assert batch.is_contiguous()
    for sample, image, (flip, top, left, y, x) in zip(batch, images, drawn, strict=True):
        pixels = slow_geometry(image, 2, flip, top, left)
        channels = [(p / 255 - m) / s for p, m, s in zip(pixels, mean, std, strict=True)]
        expected = slow_cutout(torch.stack(channels), 4, y, x)
        torch.testing.assert_close(sample.double(), expected, atol=5e-6, rtol=0)
        assert torch.equal(sample == 0, expected == 0)  # the mean exactly where it is cut out


def test_normalize_against_a_float64_reference() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1)[..., None]
    mean, std = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)
    expected = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(
        std
    ).double().view(3, 1, 1)
    torch.testing.assert_close(normalize(images, mean, std).double(), expected, atol=5e-7, rtol=0)
    as_tensors = normalize(images, torch.tensor(mean), torch.tensor(std))
    assert torch.equal(as_tensors, normalize(images, mean, std))


def test_without_parts_only_normalizes_and_leaves_its_input() -> None:
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    before = images.clone()
    batch = Augment()(images, (0.3,), (0.2,), torch.Generator())
    assert torch.equal(batch, normalize(images, (0.3,), (0.2,)))
    Augment(True, 4, 4)(images, (0.3,), (0.2,), torch.Generator())
    assert torch.equal(images, before)


def test_equal_generators_give_equal_batches() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    augment = Augment(True, 2, 3)

    def batch(seed: int, step: int) -> torch.Tensor:
        return augment(images, (0.5,) * 3, (0.2,) * 3, draws.generator(seed, "augment", step))

    assert torch.equal(batch(0, 5), batch(0, 5))
    assert not torch.equal(batch(0, 5), batch(0, 6))
    assert not torch.equal(batch(0, 5), batch(1, 5))


def test_bad_values() -> None:
    images = torch.zeros(2, 3, 8, 10, dtype=torch.uint8)
    arguments = (images, (0.5,) * 3, (0.2,) * 3, torch.Generator())
    with pytest.raises(ValueError, match="crop_padding must be less than the image side 8, got 8"):
        Augment(crop_padding=8)(*arguments)
    with pytest.raises(ValueError, match="cutout must be at most the image side 8, got 16"):
        Augment(cutout=16)(*arguments)
    with pytest.raises(ValueError, match="crop_padding is in pixels and must be at least 0, got -1"):
        Augment(crop_padding=-1)
    with pytest.raises(ValueError, match="cutout is in pixels and must be at least 0, got -4"):
        Augment(cutout=-4)
