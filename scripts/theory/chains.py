"""Many independent runs of RST on one small problem, at little more than the optimizers' own cost."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rst import RST
from rst.schedule import Schedule

Losses = Callable[[Tensor, list[int]], Tensor]


class Chains:
    """Runs that start at `start`, one for each of `seeds`. Each has an optimizer of its own, `RST` around
    plain SGD, so that coin and ‖∇L(θ)‖ are one run's; they advance together, and share the forward and the
    backward."""

    def __init__(
        self,
        start: Tensor,
        seeds: Sequence[int],
        schedule: Schedule | float,
        total_steps: int,
        *,
        lr: float,
        rho: float,
        gamma: float = 1.0,
    ) -> None:
        self._parameters = [nn.Parameter(start.clone()) for _ in seeds]
        self._optimizers = [
            RST(torch.optim.SGD([theta], lr), schedule, total_steps, rho, gamma, seed=seed)
            for theta, seed in zip(self._parameters, seeds, strict=True)
        ]

    @property
    def theta(self) -> Tensor:
        """The weights, (runs, parameters)."""
        return torch.stack([theta.detach() for theta in self._parameters])

    def step(self, losses: Losses) -> None:
        """One step of every run.

        Args:
            losses: from weights (m, parameters) of the m runs with these numbers to their batch losses (m,).
                It is called for all runs, and again for those that are at θ + ε.
        """
        passes = [optimizer.passes() for optimizer in self._optimizers]
        runs = list(range(len(passes)))
        while runs := [run for run in runs if next(passes[run], None)]:
            # The product gives each run a gradient of its own; stack alone would give parts of one tensor,
            # whose changes in place autograd counts together.
            theta = torch.stack([1.0 * self._parameters[run] for run in runs])
            losses(theta, runs).sum().backward()
        for optimizer in self._optimizers:
            optimizer.step()
