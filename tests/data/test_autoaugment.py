"""Each image's own sub-policy and coins, and pixels equal to torchvision's image by image."""

import itertools

import pytest
import scipy.stats
import torch
from torchvision.transforms.v2 import AutoAugment

from rst.data.augment import draw_augmentation
from rst.data.autoaugment import POLICIES, autoaugment

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
