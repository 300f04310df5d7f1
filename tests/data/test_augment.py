"""Every draw is per sample, uniform and independent of the others; the pixels equal a slow reference's."""

from collections.abc import Callable

import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from rst.data import Augment, normalize
from rst.data.augment import draw_augmentation

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
        batch = augment(images, (0.0, 0.0), (1 / 255, 1 / 255), draw_augmentation(seed, step, size))
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


LAYOUTS = {"in one batch": [20_000], "over the epochs": [8] * 1_000, "first of each epoch": [1] * 2_000}


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
    batch = augment(images, mean, std, draw_augmentation(6, 0, 40))
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
    batch = Augment()(images, (0.3,), (0.2,), draw_augmentation(0, 0, 5))
    assert torch.equal(batch, normalize(images, (0.3,), (0.2,)))
    Augment(True, 4, 4)(images, (0.3,), (0.2,), draw_augmentation(0, 0, 5))
    assert torch.equal(images, before)


def test_equal_draws_give_equal_batches() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    augment = Augment(True, 2, 3)

    def batch(seed: int, epoch: int) -> torch.Tensor:
        return augment(images, (0.5,) * 3, (0.2,) * 3, draw_augmentation(seed, epoch, 16))

    assert torch.equal(batch(0, 5), batch(0, 5))
    assert not torch.equal(batch(0, 5), batch(0, 6))
    assert not torch.equal(batch(0, 5), batch(1, 5))


def test_mixup_equals_its_closed_form() -> None:
    """λ·x + (1 − λ)·x' and λ·CE(y) + (1 − λ)·CE(y'), x' and y' the reversed batch's."""
    n, classes = 64, 7
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(n, 3, 4, 4, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    bits = draw_augmentation(3, 0, n)
    mixed, targets = Augment(mixup=1.0).mix(batch, labels, classes, Augment(mixup=1.0).mixup_weights(bits))
    weight = bits[5].double() / 2**62  # Beta(1, 1) is uniform
    weight = torch.maximum(weight, 1 - weight).float()
    expected = torch.stack(
        [w * x + (1 - w) * y for w, x, y in zip(weight, batch, batch.flip(0), strict=True)]
    )
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(n), atol=1e-6, rtol=0)
    of_own = F.cross_entropy(logits, labels, reduction="none")
    of_partner = F.cross_entropy(logits, labels.flip(0), reduction="none")
    closed_form = (weight * of_own + (1 - weight) * of_partner).mean()
    torch.testing.assert_close(F.cross_entropy(logits, targets), closed_form, atol=1e-5, rtol=0)
    assert torch.equal(targets.argmax(1), labels)
    assert len(weight.unique()) == n


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_mixups_weight_is_the_larger_of_a_beta_draw_and_its_complement(alpha: float) -> None:
    n = 20_000
    labels = torch.arange(n) % 2  # the partner, at n − 1 − i, has the other label
    weights = Augment(mixup=alpha).mixup_weights(draw_augmentation(0, 0, n))
    _, targets = Augment(mixup=alpha).mix(torch.zeros(n, 1, 1, 1), labels, 2, weights)
    weight = targets.gather(1, labels[:, None])[:, 0].double().numpy()
    folded = scipy.stats.beta(alpha, alpha)
    test = scipy.stats.kstest(weight, lambda x: folded.cdf(x) - folded.cdf(1 - x))
    assert test.pvalue > FALSE_ALARM


def test_per_batch_draws_once_for_cutout_and_no_other_part() -> None:
    images, bits = coordinates(12, 12).expand(200, -1, -1, -1), draw_augmentation(1, 0, 300)
    batch = torch.arange(299, 99, -1)
    arguments = (images, (0.0, 0.0), (1 / 255, 1 / 255))
    own, shared = (Augment(per_batch=per_batch).draws_of(bits, batch) for per_batch in (False, True))
    assert torch.equal(own, bits[:, batch])
    cut = Augment(cutout=4)(*arguments, shared)
    assert torch.equal(cut, cut[:1].expand_as(cut))
    assert torch.equal(cut[0], Augment(cutout=4)(*arguments, own)[0])
    moved = Augment(flip=True, crop_padding=2)(*arguments, shared)
    assert torch.equal(moved, Augment(flip=True, crop_padding=2)(*arguments, own))
    assert len(moved.unique(dim=0)) > 40  # of 2 · 25


def test_mixup_first_cuts_the_mixed_images() -> None:
    """λ·x + (1 − λ)·x' with a square of its own cut from it, against a square cut from x and one from x'."""
    n = 64
    images = torch.randint(
        0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    bits, labels = draw_augmentation(2, 0, n), torch.arange(n) % 2
    mean, std = (0.5,) * 3, (0.25,) * 3
    weights = Augment(mixup=1.0).mixup_weights(bits)
    plain = normalize(images, mean, std)

    def augmented(mixup_first: bool, drawn: torch.Tensor) -> torch.Tensor:
        augment = Augment(cutout=4, mixup=1.0, mixup_first=mixup_first)
        batch, _ = augment.mix(augment(images, mean, std, drawn), labels, 2, weights)
        return augment.cut(batch, drawn) if augment.cuts_mixed else batch

    _, _, _, y, x = bits[:5] % 8
    mixed, _ = Augment(mixup=1.0).mix(plain, labels, 2, weights)
    for image, expected, row, column in zip(
        augmented(True, bits), mixed, y.tolist(), x.tolist(), strict=True
    ):
        assert torch.equal(image, slow_cutout(expected, 4, row, column))
    assert not torch.equal(augmented(True, bits), augmented(False, bits))
    shared = Augment(per_batch=True).draws_of(bits, torch.arange(n))
    assert torch.equal(augmented(True, shared), augmented(False, shared))
    assert not Augment(cutout=4, mixup_first=True).cuts_mixed


def test_the_authors_policy_is_for_small_images() -> None:
    image = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    drawn = (image, (0.0,) * 3, (1 / 255,) * 3, draw_augmentation(0, 0, 200))
    authors = Augment(autoaugment="auto", policies="authors")
    assert int((authors(*drawn).round() == 128).flatten(1).all(1).sum()) > 10
    assert not torch.equal(authors(*drawn), Augment(autoaugment="auto")(*drawn))
    authors.check(3, 32, 32, batch_size=4, streamed=False)
    with pytest.raises(ValueError, match="policies=authors has no policy for ImageNet"):
        authors.check(3, 64, 64, batch_size=4, streamed=False)
    with pytest.raises(ValueError, match="policies must be torchvision or authors, got google"):
        Augment(policies="google")


@pytest.mark.parametrize(
    ("augment", "shape", "message"),
    [
        (Augment(crop_padding=8), (3, 8, 10), "crop_padding must be less than the image side 8, got 8"),
        (Augment(cutout=16), (3, 8, 10), "cutout must be at most the image side 8, got 16"),
        (Augment(autoaugment="auto"), (1, 8, 8), r"autoaugment needs RGB images, and these have 1 channel"),
        (Augment(random_resized_crop=True), (3, 8, 8), "random_resized_crop takes its crops from the files"),
    ],
)
def test_images_that_cannot_be_augmented_so(
    augment: Augment, shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        augment.check(*shape, batch_size=4, streamed=False)


def test_mixup_of_one_image() -> None:
    augment = Augment(mixup=1.0)
    augment.check(3, 8, 8, batch_size=2, streamed=False)
    with pytest.raises(ValueError, match="needs at least 2, got batch_size=1"):
        augment.check(3, 8, 8, batch_size=1, streamed=False)


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="crop_padding is in pixels and must be at least 0, got -1"):
        Augment(crop_padding=-1)
    with pytest.raises(ValueError, match="cutout is in pixels and must be at least 0, got -4"):
        Augment(cutout=-4)
    with pytest.raises(ValueError, match="mixup is α of Beta"):
        Augment(mixup=-1.0)
    with pytest.raises(
        ValueError, match="autoaugment must be null or one of auto, cifar10, imagenet, got svhn"
    ):
        Augment(autoaugment="svhn")
