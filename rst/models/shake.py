"""Residual branches mixed at random, with other factors in the backward pass than in the forward pass.

Their modules have an attribute `true_gradient`: while it is True the backward pass is the derivative of the
forward pass. `rst.RST` sets it during the clean pass of a SAM step.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Decoupled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.save_for_backward(backward)
        return x * forward

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None


def decoupled(x: Tensor, forward: Tensor, backward: Tensor, true_gradient: bool) -> Tensor:
    """x·forward, with the gradient of x·backward, or of x·forward if `true_gradient`.

    The factors are cast to the type of x, which autocast thus keeps.
    """
    forward, backward = forward.to(x.dtype), backward.to(x.dtype)
    return x * forward if true_gradient else _Decoupled.apply(x, forward, backward)


def uniform_per_image(x: Tensor) -> Tensor:
    """U(0, 1) for each image of x, (N, 1, 1, 1), in single precision: x's type must not change the draws."""
    return torch.rand(len(x), 1, 1, 1, dtype=torch.float32, device=x.device)


class ShakeDrop(nn.Module):
    """x·(b + a − b·a), backward b + β − b·β (Yamada et al. 2019), in evaluation x·keep.

    b ~ Bernoulli(`keep`) for each image, as the authors and google-research/sam have it, or with
    `gate` "batch" once for the whole batch; a ~ U(−1, 1) and β ~ U(0, 1) for each image. So the factor is 1
    or a, and `keep` on average.
    """

    def __init__(self, keep: float, gate: str = "image") -> None:
        super().__init__()
        if gate not in ("image", "batch"):
            raise ValueError(f"gate must be image or batch, got {gate}")
        self.keep, self.gate = keep, gate
        self.true_gradient = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * self.keep
        # All is drawn in either case: both passes of a SAM step must leave the generator in one state.
        shape = (len(x), 1, 1, 1) if self.gate == "image" else ()
        b = torch.rand(shape, dtype=torch.float32, device=x.device) < self.keep
        a, beta = 2 * uniform_per_image(x) - 1, uniform_per_image(x)
        return decoupled(x, torch.where(b, 1.0, a), torch.where(b, 1.0, beta), self.true_gradient)


class ShakeShake(nn.Module):
    """a·x + (1 − a)·y, backward β and 1 − β (Gastaldi 2017), in evaluation ½ each.

    a, β ~ U(0, 1) for each image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.true_gradient = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            return (x + y) / 2
        a, beta = uniform_per_image(x), uniform_per_image(x)
        return decoupled(x, a, beta, self.true_gradient) + decoupled(y, 1 - a, 1 - beta, self.true_gradient)
