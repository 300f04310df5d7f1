"""Many independent runs of RST on one small problem, at little more than the optimizers' own cost."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rst import RST

Losses = Callable[[Tensor, list[int]], Tensor]


class Chains:
    """Runs that start at `start`. Each has an optimizer of its own, `RST` around plain SGD, so that coin and
    ‖∇L(θ)‖ are one run's; they advance together, and share the forward and the backward.

    Args:
        runs: of each, RST's `schedule`, `rho`, `gamma` and `seed`.
    """

    def __init__(self, start: Tensor, total_steps: int, lr: float, runs: Iterable[Mapping[str, Any]]) -> None:
        options = list(runs)
        self._parameters = [nn.Parameter(start.clone()) for _ in options]
        self._optimizers = [
            RST(torch.optim.SGD([theta], lr), total_steps=total_steps, **of_run)
            for theta, of_run in zip(self._parameters, options, strict=True)
        ]

    @property
    def theta(self) -> Tensor:
        """The weights, (runs, parameters)."""
        return self._theta(range(len(self._parameters)))

    def step(self, losses: Losses) -> None:
        """One step of every run.

        Args:
            losses: from weights (m, parameters) of the m runs with these numbers to their batch losses (m,).
                It is called for all runs, and again for those that are at θ + ε.
        """
        passes = [optimizer.passes() for optimizer in self._optimizers]
        runs = list(range(len(passes)))
        while runs := [run for run in runs if next(passes[run], None)]:
            theta = self._theta(runs).requires_grad_()
            (gradients,) = torch.autograd.grad(losses(theta, runs).sum(), theta)
            torch.autograd.backward([self._parameters[run] for run in runs], gradients.unbind())
        for optimizer in self._optimizers:
            optimizer.step()

    def _theta(self, runs: Iterable[int]) -> Tensor:
        return torch.stack([self._parameters[run].detach() for run in runs])
