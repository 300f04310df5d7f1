"""Each image's own sub-policy and coins; pixels equal to torchvision's image by image, and for the authors'
policy to their formulas."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import AutoAugment

from rst.data.augment import draw_augmentation
from rst.data.authors_policy import CIFAR
from rst.data.autoaugment import AUTHORS_OPERATIONS, POLICIES, _cutout, autoaugment

FALSE_ALARM = 1e-6  # of each chi-squared test; seeds are fixed
ALWAYS, NEVER = 0, 2**62 - 1  # coins that are below every probability above 0, and below none


def one_by_one(
    image: torch.Tensor, name: str, chosen: int, applied: list[bool], signs: list[int]
) -> torch.Tensor:
    """torchvision's operations on a single image, with what its class would draw given."""
    theirs = AutoAugment(POLICIES[name])
    _, height, width = image.shape
    for (operation, _, level), on, sign in zip(theirs._policies[chosen], applied, signs, strict=True):
        magnitudes, signed = theirs._AUGMENTATION_SPACE[operation]
        values = magnitudes(10, height, width)
        magnitude = 0.0 if values is None else float(values[level])
        if on:
            image = theirs._apply_image_or_video_transform(
                image,
                operation,
                -magnitude if signed and not sign else magnitude,
                theirs.interpolation,
                theirs._fill,
            )
    return image


def natural_image(side: int = 32) -> torch.Tensor:
    """Smooth, so that no operation is blind to it, with uneven channels."""
    y, x = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 2, side), indexing="ij")
    waves = torch.stack([x.sin() + y.cos(), (x * y).sin(), (x - 2 * y).cos()])
    return (waves * torch.tensor([50.0, 90.0, 70.0]).view(3, 1, 1) + 120).clamp(0, 255).byte()


@pytest.mark.parametrize("name", POLICIES)
def test_pixels_equal_torchvisions_for_every_sub_policy_coin_and_sign(name: str) -> None:
    image = natural_image()
    cases = list(itertools.product(range(25), (True, False), (True, False), (0, 1), (0, 1)))
    bits = torch.tensor(
        [[c, ALWAYS if a else NEVER, ALWAYS if b else NEVER, s, t] for c, a, b, s, t in cases]
    ).T
    ours = autoaugment(image.expand(len(cases), -1, -1, -1), name, bits)
    differing = 0
    policies = AutoAugment(POLICIES[name])._policies
    for mine, (chosen, first, second, *signs) in zip(ours, cases, strict=True):
        possible = [p > 0 for _, p, _ in policies[chosen]]
        applied = [first and possible[0], second and possible[1]]
        expected = one_by_one(image, name, chosen, applied, signs)
        assert torch.equal(mine, expected), (chosen, first, second, signs)
        differing += not torch.equal(expected, image)
    assert differing > len(cases) / 2  # the image shows what is done to it


def test_each_sub_policy_has_its_share_and_each_operation_its_probability() -> None:
    """Read off which of torchvision's outcomes an image equals, over images that draw for themselves."""
    image, n = natural_image(), 20_000
    bits = draw_augmentation(0, 0, n)[-5:]
    policies = AutoAugment(POLICIES["cifar10"])._policies
    chosen = bits[0] % 25
    assert scipy.stats.chisquare(chosen.bincount(minlength=25)).pvalue > FALSE_ALARM

    # Sub-policy 3: ShearY 0.5, then TranslateY 0.7; both have signs, so its nine outcomes are told apart.
    assert [operation for operation, _, _ in policies[3]] == ["ShearY", "TranslateY"]
    outcomes = {}
    for first, second in itertools.product((True, False), repeat=2):
        for signs in itertools.product((0, 1), repeat=2):
            key = (first and (1, signs[0]), second and (1, signs[1]))
            output = one_by_one(image, "cifar10", 3, [first, second], list(signs))
            outcomes[output.numpy().tobytes()] = key
    assert len(outcomes) == 9
    ours = autoaugment(image.expand(n, -1, -1, -1), "cifar10", bits)[chosen == 3]
    seen = [outcomes[sample.numpy().tobytes()] for sample in ours]
    expected = {}
    for a, b in set(outcomes.values()):
        expected[a, b] = (0.25 if a else 0.5) * (0.35 if b else 0.3)
    counts = [seen.count(key) for key in expected]
    frequencies = [len(seen) * share for share in expected.values()]
    assert scipy.stats.chisquare(counts, frequencies).pvalue > FALSE_ALARM


def test_the_draws_decide_whatever_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    bits = draw_augmentation(5, 2, 40)[-5:]
    whole = autoaugment(images, "cifar10", bits)
    assert torch.equal(whole, autoaugment(images, "cifar10", bits))
    order = torch.randperm(40, generator=generator)
    parts = [autoaugment(images[i], "cifar10", bits[:, i]) for i in order.split(7)]
    assert torch.equal(torch.cat(parts), whole[order])
    assert len({sample.numpy().tobytes() for sample in whole}) == 40


def test_its_input_is_left_alone() -> None:
    images = natural_image().repeat(50, 1, 1, 1)
    before = images.clone()
    changed = autoaugment(images, "imagenet", draw_augmentation(0, 0, 50)[-5:])
    assert torch.equal(images, before)
    assert not torch.equal(changed, before)


def test_the_authors_table_has_most_of_torchvisions() -> None:
    """A table from another source; 5 of its 25 sub-policies are not among the authors' 95."""
    assert len(CIFAR) == 95
    theirs = {(op, p, level) for pair in AutoAugment(POLICIES["cifar10"])._policies for op, p, level in pair}
    needs_level = {op for op, _, level in theirs if level is not None}

    def of_torchvision(pair: list[tuple[str, float, int]]) -> tuple[tuple[str, float, int | None], ...]:
        return tuple((op, p, level if op in needs_level else None) for op, p, level in pair)

    known = set(map(of_torchvision, CIFAR))
    assert sum(tuple(pair) in known for pair in AutoAugment(POLICIES["cifar10"])._policies) == 20
    used = {op for pair in CIFAR for op, _, _ in pair}
    assert used == {*AUTHORS_OPERATIONS, "Cutout"}
    assert all(0 <= p <= 1 and 0 <= level <= 9 for pair in CIFAR for _, p, level in pair)


def moved(image: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Each pixel (x, y) from the pixel nearest to `source` @ (x, y, 1), grey where there is none."""
    _, height, width = image.shape
    out = torch.full_like(image, 128)
    for y, x in itertools.product(range(height), range(width)):
        column, row = (source @ torch.tensor([x, y, 1.0], dtype=torch.float64)).round().long().tolist()
        if 0 <= row < height and 0 <= column < width:
            out[:, y, x] = image[:, row, column]
    return out


def affine(name: str, level: int, side: int) -> torch.Tensor:
    rows = {
        "ShearX": [[1, 0.03 * level, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [0.03 * level, 1, 0]],
        "TranslateX": [[1, 0, 25 * level], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, 25 * level]],
    }
    if name in rows:
        return torch.tensor(rows[name], dtype=torch.float64)
    cos, sin, c = math.cos(math.radians(3 * level)), math.sin(math.radians(3 * level)), (side - 1) / 2
    rotation = [[cos, -sin, c - cos * c + sin * c], [sin, cos, c - sin * c - cos * c]]
    return torch.tensor(rotation, dtype=torch.float64)


@pytest.mark.parametrize("level", [1, 2, 7, 9])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_the_authors_moves(name: str, level: int) -> None:
    """The matrices of their code; which sign is which does not matter, as a coin decides it."""
    image = natural_image()
    operation, signed = AUTHORS_OPERATIONS[name]
    assert signed
    ours = {sign: operation(image[None], sign * level)[0] for sign in (-1, 1)}
    expected = {sign: moved(image, affine(name, sign * level, 32)) for sign in (-1, 1)}

    def share(flipped: int) -> float:  # pixels that differ: halfway between two, rounding may go either way
        return max((ours[s] != expected[s * flipped]).any(0).double().mean().item() for s in (-1, 1))

    assert min(share(1), share(-1)) < 0.04
    blank = bool((ours[1] == 128).all())
    assert blank is (name.startswith("Translate") and level >= 2)


@pytest.mark.parametrize("level", range(10))
def test_the_authors_strengths(level: int) -> None:
    """PIL's functions at their magnitudes: 0.1 + 1.8·level/10, int(256·level/10), int(4·level/10)."""
    image = natural_image()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    factor = 0.1 + 1.8 * level / 10

    def check(name: str, expected: object, atol: int) -> None:
        operation, signed = AUTHORS_OPERATIONS[name]
        assert not signed
        difference = operation(image[None], level)[0].int() - torch.from_numpy(np.array(expected)).permute(
            2, 0, 1
        )
        assert difference.abs().max() <= atol, name

    # By at most 2 of 255: PIL rounds the image that it blends with, torchvision does not.
    check("Brightness", ImageEnhance.Brightness(picture).enhance(factor), atol=1)
    check("Color", ImageEnhance.Color(picture).enhance(factor), atol=2)
    check("Sharpness", ImageEnhance.Sharpness(picture).enhance(factor), atol=2)
    grey = Image.new("RGB", (32, 32), (4, 4, 4))  # 32·32/256, their mean
    check("Contrast", Image.blend(grey, picture, factor), atol=1)
    check("Solarize", ImageOps.solarize(picture, int(level / 10 * 256)), atol=0)
    check("AutoContrast", ImageOps.autocontrast(picture), atol=1)
    check("Equalize", ImageOps.equalize(picture), atol=0)
    check("Invert", ImageOps.invert(picture), atol=0)
    if bits := int(level / 10 * 4):
        check("Posterize", ImageOps.posterize(picture, bits), atol=0)


def test_the_authors_cutout() -> None:
    """A square of twice int(100·level/10) pixels around a uniform centre, clipped at the border."""
    n = 20_000
    bits = draw_augmentation(0, 0, n)[-1]
    cut = _cutout(torch.zeros(n, 3, 32, 40, dtype=torch.uint8), 1, bits) == 128  # 20 pixels
    assert torch.equal(cut, cut[:, :1].expand_as(cut))
    rows, columns = cut[:, 0].any(2), cut[:, 0].any(1)
    assert torch.equal(cut[:, 0], rows[:, :, None] & columns[:, None, :])
    for covered in (rows, columns):
        side = covered.shape[1]
        first, last = covered.int().argmax(1), side - 1 - covered.flip(1).int().argmax(1)
        assert torch.equal(covered.sum(1), last - first + 1)
        # From its middle − 10 to its middle + 9, clipped: 10 columns or more of it are seen.
        middle = torch.where(first > 0, first + 10, last - 9)
        assert scipy.stats.chisquare(middle.bincount(minlength=side)).pvalue > FALSE_ALARM


def test_a_ninth_of_the_authors_images_are_plain_grey() -> None:
    """By a translation of 50 pixels or more, 11.4 %, or a cutout of 60 or 80, 0.8 %; exact from the table."""
    n = 5_000
    blanking = {("Cutout", 3): (29 / 32) ** 2, ("Cutout", 4): 1.0}
    blanking |= {(f"Translate{axis}", level): 1.0 for axis in "XY" for level in range(2, 10)}

    def share(of: str) -> float:
        kept = [
            [1 - p * blanking.get((op, level), 0.0) * op.startswith(of) for op, p, level in pair]
            for pair in CIFAR
        ]
        return 1 - sum(first * second for first, second in kept) / len(CIFAR)

    assert share("Translate") == pytest.approx(0.1136, abs=5e-5)
    assert share("") == pytest.approx(0.1218, abs=5e-5)
    images = natural_image().expand(n, -1, -1, -1)
    ours = autoaugment(images, "authors", draw_augmentation(0, 0, n)[-5:])
    plain = int((ours == 128).flatten(1).all(1).sum())
    assert scipy.stats.binomtest(plain, n, share("")).pvalue > FALSE_ALARM
