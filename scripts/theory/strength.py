"""The strength law: the stationary gradient of ½θ² under skewed noise is −pγρ/3 (docs/theory.md)."""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .chains import Chains


@dataclass(frozen=True)
class Noise:
    """ξ takes `values`, the first with `probability`; its mean is 0."""

    values: tuple[float, float]
    probability: float

    def mean(self, f: Any) -> float:
        """E f(ξ)."""
        return self.probability * f(self.values[0]) + (1 - self.probability) * f(self.values[1])


NOISES = {"skewed": Noise((2.0, -1.0), 1 / 3), "symmetric": Noise((math.sqrt(2), -math.sqrt(2)), 0.5)}


@dataclass(frozen=True)
class Setting:
    p: float
    gamma: float
    rho: float
    noise: str = "skewed"

    @property
    def strength(self) -> float:
        return self.p * self.gamma * self.rho


SETTINGS = [
    Setting(1.0, 1.0, 0.1),
    Setting(1.0, 1.0, 0.2),
    Setting(1.0, 1.0, 0.4),
    Setting(0.5, 1.0, 0.2),
    Setting(0.5, 1.0, 0.4),
    Setting(0.5, 2.0, 0.2),
    Setting(0.5, 3.0, 0.2),
    Setting(0.25, 1.0, 0.4),
    Setting(0.25, 4.0, 0.1),
    Setting(0.25, 4.0, 0.2),
    Setting(1.0, 1.0, 0.2, "symmetric"),
    Setting(0.5, 2.0, 0.2, "symmetric"),
    Setting(0.25, 4.0, 0.4, "symmetric"),
]
ALPHA = 0.005
CHAINS = 8
STEPS = 3000
BURN_IN = 5.0  # in units of 1/α: what is left of the start is e⁻⁵


def closed_form(setting: Setting, alpha: float) -> tuple[float, float]:
    """E∇f and E‖∇f‖² at stationarity, exact while |θ| < |ξ|."""
    noise, strength = NOISES[setting.noise], setting.strength
    bias = strength * noise.mean(lambda xi: math.copysign(1.0, xi))  # −m
    variance = noise.mean(lambda xi: xi * xi) + 2 * strength * noise.mean(abs)
    variance += strength * setting.gamma * setting.rho - bias**2
    return bias, bias**2 + alpha * variance / (2 - alpha)


def bound(
    p: float, gamma: float, rho: float, *, alpha: float, variance: float, delta: float = 0.0, steps: int = 1
) -> float:
    """That of docs/theory.md on the mean of E‖∇f‖², for L = 1 and a constant p; without Δ = `delta` that of a
    long run."""
    noise = 4 * delta / (alpha * steps) + 4 * alpha * variance
    return noise + 2 * (p * gamma * rho) ** 2 + 4 * alpha * p * (gamma * rho) ** 2


def measure(
    setting: Setting, first: int = 0, alpha: float = ALPHA, chains: int = CHAINS, steps: int = STEPS
) -> dict[str, Any]:
    """Mean and mean square of the gradient over `chains` runs of `steps` steps, with their standard errors
    over the runs, beside the closed form. Their seeds begin with `first`.

    Beside each run goes SGD with the same ξ, whose mean is known to be 0 and its mean square αEξ²/(2 − α).
    With d their difference, E θ = E d and E θ² = E θ_SGD² + 2 E θ_SGD(d − E d) + E d²: most of the noise is
    in what is known.
    """
    noise = NOISES[setting.noise]
    values = torch.tensor(noise.values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(first)
    draws = torch.rand((steps, chains), generator=generator, dtype=torch.float64)
    xi = torch.where(draws < noise.probability, values[0], values[1])
    start = torch.zeros(1, dtype=torch.float64)
    options = {"schedule": setting.p, "rho": setting.rho, "gamma": setting.gamma}
    runs = Chains(start, steps, alpha, [{**options, "seed": first + i} for i in range(chains)])
    of_sgd, gradients = torch.zeros(chains, dtype=torch.float64), []
    for t in range(steps):
        runs.step(partial(_losses, xi=xi[t]))
        of_sgd = of_sgd - alpha * (of_sgd - xi[t])
        if t >= BURN_IN / alpha:
            gradients.append(torch.stack([runs.theta[:, 0], of_sgd]))
    theta, plain = torch.stack(gradients).unbind(1)
    assert (theta.abs() < values.abs().min()).all(), "beyond where the closed form holds"
    apart = theta - plain
    of_plain = alpha * noise.mean(lambda x: x * x) / (2 - alpha)
    means = apart.mean(0)
    squares = of_plain + (2 * plain * (apart - apart.mean()) + apart.square()).mean(0)
    bias, square = closed_form(setting, alpha)
    return asdict(setting) | {
        "strength": setting.strength,
        "bias_predicted": bias,
        "bias": means.mean().item(),
        "bias_se": means.std().item() / math.sqrt(chains),
        "square_predicted": square,
        "square": squares.mean().item(),
        "square_se": squares.std().item() / math.sqrt(chains),
        "bound": bound(
            setting.p, setting.gamma, setting.rho, alpha=alpha, variance=noise.mean(lambda x: x * x)
        ),
    }


def _losses(theta: Tensor, runs: list[int], xi: Tensor) -> Tensor:
    """Of gradient θ − ξ, with each run's ξ."""
    return 0.5 * (theta[:, 0] - xi[runs]).square()
