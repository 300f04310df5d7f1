"""AutoAugment for a whole batch at once, with a sub-policy drawn for each image."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional as F

from rst.data import authors_policy

POLICIES = {"cifar10": AutoAugmentPolicy.CIFAR10, "imagenet": AutoAugmentPolicy.IMAGENET}
AUTHORS = "authors"
LEVELS = 10  # of an operation's strength, from none to its highest


def _affine(
    images: Tensor,
    shear: tuple[float, float] = (0.0, 0.0),
    shift: tuple[int, int] = (0, 0),
    still: float = 0.0,
    fill: list[float] | None = None,
) -> Tensor:
    """`still`: the point of the diagonal that a shear leaves in its place."""
    degrees = [math.degrees(math.atan(s)) for s in shear]
    centre = [still, still] if any(shear) else None
    return F.affine(images, 0.0, list(shift), 1.0, shear=degrees, center=centre, fill=fill)


# torchvision's operations with their strength at the highest level and whether a coin decides its sign. A
# translation's strength is a share of the image's side.
OPERATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], float, bool]] = {
    "ShearX": (lambda x, m: _affine(x, shear=(m, 0.0)), 0.3, True),
    "ShearY": (lambda x, m: _affine(x, shear=(0.0, m)), 0.3, True),
    "TranslateX": (lambda x, m: _affine(x, shift=(int(m * x.shape[-1]), 0)), 150 / 331, True),
    "TranslateY": (lambda x, m: _affine(x, shift=(0, int(m * x.shape[-2]))), 150 / 331, True),
    "Rotate": (F.rotate, 30.0, True),
    "Brightness": (lambda x, m: F.adjust_brightness(x, 1 + m), 0.9, True),
    "Color": (lambda x, m: F.adjust_saturation(x, 1 + m), 0.9, True),
    "Contrast": (lambda x, m: F.adjust_contrast(x, 1 + m), 0.9, True),
    "Sharpness": (lambda x, m: F.adjust_sharpness(x, 1 + m), 0.9, True),
    "Posterize": (lambda x, m: F.posterize(x, 8 - round(m)), 4.0, False),
    "Solarize": (lambda x, m: F.solarize(x, 255 - m), 255.0, False),
    "AutoContrast": (lambda x, _: F.autocontrast(x), 0.0, False),
    "Equalize": (lambda x, _: F.equalize(x), 0.0, False),
    "Invert": (lambda x, _: F.invert(x), 0.0, False),
}


GREY = 128  # the authors' colour of what a shift, shear, rotation or cutout leaves empty


def _shear(images: Tensor, x: float, y: float) -> Tensor:
    return _affine(images, shear=(x, y), still=0.5, fill=[GREY] * 3)  # the first pixel's centre


def _shift(images: Tensor, x: int, y: int) -> Tensor:
    return _affine(images, shift=(x, y), fill=[GREY] * 3)


def _contrast(images: Tensor, factor: float) -> Tensor:
    """Blends with the grey level H·W/256: where PIL has the image's mean, their code has the sum of its
    histogram's counts, divided by 256."""
    grey = min(images.shape[-2] * images.shape[-1] // 256, 255)
    return (grey + factor * (images.float() - grey)).clamp(0, 255).byte()


def _enhancement(level: int) -> float:
    return 0.1 + 1.8 * level / LEVELS


# The authors' operations as functions of the level, and whether a coin decides its sign. From level 2 on, a
# translation of 25 pixels a level leaves nothing of a 32×32 image. `_cutout` is apart.
AUTHORS_OPERATIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], bool]] = {
    "ShearX": (lambda x, n: _shear(x, 0.3 * n / LEVELS, 0.0), True),
    "ShearY": (lambda x, n: _shear(x, 0.0, 0.3 * n / LEVELS), True),
    "TranslateX": (lambda x, n: _shift(x, 250 * n // LEVELS, 0), True),
    "TranslateY": (lambda x, n: _shift(x, 0, 250 * n // LEVELS), True),
    "Rotate": (lambda x, n: F.rotate(x, 30.0 * n / LEVELS, fill=[GREY] * 3), True),
    "Brightness": (lambda x, n: F.adjust_brightness(x, _enhancement(n)), False),
    "Color": (lambda x, n: F.adjust_saturation(x, _enhancement(n)), False),
    "Contrast": (lambda x, n: _contrast(x, _enhancement(n)), False),
    "Sharpness": (lambda x, n: F.adjust_sharpness(x, _enhancement(n)), False),
    "Posterize": (lambda x, n: F.posterize(x, 4 * n // LEVELS), False),
    "Solarize": (lambda x, n: F.solarize(x, 256 * n // LEVELS), False),
    "AutoContrast": (lambda x, _: F.autocontrast(x), False),
    "Equalize": (lambda x, _: F.equalize(x), False),
    "Invert": (lambda x, _: F.invert(x), False),
}


def _cutout(images: Tensor, level: int, bits: Tensor) -> Tensor:
    """The authors' operation of that name: a grey square of 20·level pixels around a uniform centre, drawn by
    the 62 `bits` [B] that decide other operations' signs."""
    half = 100 * level // LEVELS
    height, width = images.shape[-2:]
    rows = (torch.arange(height) - (bits % height)[:, None] + half) // (2 * half) == 0
    columns = (torch.arange(width) - ((bits >> 31) % width)[:, None] + half) // (2 * half) == 0
    square = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
    return images.masked_fill(square, GREY)


# What an image goes through, by its bits that decide signs.
_Operation = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def _policy(name: str) -> tuple[list[_Operation], Tensor, Tensor]:
    """The operation of each code; codes [sub-policies, 2 operations, 2 signs]; and the probabilities
    [sub-policies, 2 operations]."""
    codes: dict[tuple[str, float], int] = {}
    policies: Sequence[Sequence[tuple[str, float, int | None]]]
    policies = authors_policy.CIFAR if name == AUTHORS else AutoAugment(POLICIES[name]).policies

    def code(operation: str, level: int | None, sign: int) -> int:
        if name == AUTHORS:
            signed = operation in AUTHORS_OPERATIONS and AUTHORS_OPERATIONS[operation][1]
            strength: float = level or 0
        else:
            _, highest, signed = OPERATIONS[operation]
            # In float32, as torchvision's: 0.9 · 7/9 is not quite 0.7, which decides how pixels are rounded.
            strength = float(torch.linspace(0, highest, LEVELS)[level or 0])
        return codes.setdefault((operation, strength * (sign if signed else 1)), len(codes))

    table = [[[code(op, level, sign) for sign in (-1, 1)] for op, _, level in pair] for pair in policies]
    probabilities = [[p for _, p, _ in pair] for pair in policies]
    operations = [_operation(name, *key) for key in codes]
    return operations, torch.tensor(table), torch.tensor(probabilities, dtype=torch.float64)


def _operation(policy: str, name: str, strength: float) -> _Operation:
    if name == "Cutout":
        return lambda images, bits: _cutout(images, int(strength), bits)
    if policy == AUTHORS:
        return lambda images, _: AUTHORS_OPERATIONS[name][0](images, int(strength))
    return lambda images, _: OPERATIONS[name][0](images, strength)


def autoaugment(images: Tensor, policy: str, bits: Tensor) -> Tensor:
    """AutoAugment (Cubuk et al. 2019) of RGB images, uint8 [B, 3, H, W], on any device.

    Each image has its own sub-policy, uniform over the policy's, and its own coins: the sub-policy's two
    operations are applied one after the other, each with its probability. Images with the same operation go
    through it together.

    "cifar10" and "imagenet" are torchvision's: 25 sub-policies each, operations and strengths as in its
    class, which draws once for a batch. "authors" is what the paper's authors train with on CIFAR
    (google-research/sam, autoaugment/): 95 sub-policies; translations by 25 pixels a level, which turn 11 %
    of all 32×32 images plain grey; and an operation Cutout, which does so to another 0.8 %. Their pixels may
    differ from these by a rounding.

    Args:
        policy: "cifar10", "imagenet" or "authors".
        bits: [5, B] uniform integers below 2^62, on the CPU: sub-policy, two coins, two signs.
    """
    operations, codes, probabilities = _policy(policy)
    chosen = bits[0] % len(codes)
    for i in (0, 1):
        applied = bits[1 + i].double() / 2**62 < probabilities[chosen, i]
        code = torch.where(applied, codes[chosen, i, bits[3 + i] % 2], -1)
        order = code.argsort(stable=True)
        present, counts = code[order].unique_consecutive(return_counts=True)
        signs = bits[3 + i][order].split(counts.tolist())
        order = order.to(images.device, non_blocking=True)
        groups = zip(present.tolist(), images[order].split(counts.tolist()), signs, strict=True)
        parts = [part if which < 0 else operations[which](part, sign) for which, part, sign in groups]
        images = torch.empty_like(images).index_copy_(0, order, torch.cat(parts))
    return images
