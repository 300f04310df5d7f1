"""AutoAugment for a whole batch at once, with a sub-policy drawn for each image."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional as F

POLICIES = {"cifar10": AutoAugmentPolicy.CIFAR10, "imagenet": AutoAugmentPolicy.IMAGENET}
LEVELS = 10  # of an operation's strength, from none to its highest


def _affine(
    images: Tensor, shear: tuple[float, float] = (0.0, 0.0), shift: tuple[int, int] = (0, 0)
) -> Tensor:
    degrees = [math.degrees(math.atan(s)) for s in shear]
    centre = [0.0, 0.0] if any(shear) else None
    return F.affine(images, angle=0.0, translate=list(shift), scale=1.0, shear=degrees, center=centre)


# The operations with their strength at the highest level and whether a coin decides its sign, as torchvision
# has them. A translation's strength is a share of the image's side.
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


@functools.cache
def _policy(name: str) -> tuple[list[tuple[str, float]], Tensor, Tensor]:
    """(operation, signed strength) of each code; codes [sub-policies, 2 operations, 2 signs]; and the
    probabilities [sub-policies, 2 operations]."""
    codes: dict[tuple[str, float], int] = {}

    def code(operation: str, level: int | None, sign: int) -> int:
        _, highest, signed = OPERATIONS[operation]
        # In float32, as torchvision's: 0.9 · 7/9 is not quite 0.7, which decides how pixels are rounded.
        strength = float(torch.linspace(0, highest, LEVELS)[level or 0]) * (sign if signed else 1)
        return codes.setdefault((operation, strength), len(codes))

    policies = AutoAugment(POLICIES[name]).policies
    table = [[[code(op, level, sign) for sign in (-1, 1)] for op, _, level in pair] for pair in policies]
    probabilities = [[p for _, p, _ in pair] for pair in policies]
    return list(codes), torch.tensor(table), torch.tensor(probabilities, dtype=torch.float64)


def autoaugment(images: Tensor, policy: str, bits: Tensor) -> Tensor:
    """AutoAugment (Cubuk et al. 2019) of RGB images, uint8 [B, 3, H, W], on any device.

    Each image has its own sub-policy, uniform over the policy's 25, and its own coins: the sub-policy's two
    operations are applied one after the other, each with its probability. Policies, operations and strengths
    are torchvision's, whose class draws once for a batch. Images with the same operation go through it
    together.

    Args:
        policy: "cifar10" or "imagenet".
        bits: [5, B] uniform integers below 2^62, on the CPU: sub-policy, two coins, two signs.
    """
    operations, codes, probabilities = _policy(policy)
    chosen = bits[0] % len(codes)
    for i in (0, 1):
        applied = bits[1 + i].double() / 2**62 < probabilities[chosen, i]
        code = torch.where(applied, codes[chosen, i, bits[3 + i] % 2], -1)
        order = code.argsort(stable=True)
        present, counts = code[order].unique_consecutive(return_counts=True)
        order = order.to(images.device, non_blocking=True)
        parts = []
        for which, part in zip(present.tolist(), images[order].split(counts.tolist()), strict=True):
            name, strength = operations[which]
            parts.append(part if which < 0 else OPERATIONS[name][0](part, strength))
        images = torch.empty_like(images).index_copy_(0, order, torch.cat(parts))
    return images
