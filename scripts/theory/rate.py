"""The rate T^−½ and the floor of a constant ρ, on a small network (docs/theory.md)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rst.schedule import Constant, Linear, Schedule, probabilities

from .chains import Chains

INPUTS, HIDDEN, POINTS, BATCH = 4, 8, 256, 8
STEP_SIZE = 0.5  # α·√T
SCHEDULES: dict[str, Schedule] = {
    "SGD": Constant(0.0),
    "constant": Constant(0.5),
    "rising": Linear(0.0, 1.0),
    "falling": Linear(1.0, 0.0),
}
RHO, SHORTEST = 0.8, 2**8  # ρ, and the number of steps for which it is that also where it decays
LENGTHS = {2**8: 20, 2**10: 20, 2**12: 20, 2**14: 20, 2**16: 5}  # steps, and seeds
SEEDS_AT_ONCE = 5  # in one block: more would leave a processor idle at the end, fewer make steps dearer
LOOK_EVERY = 1 / 32  # α times the number of steps from one look at ∇f to the next


class Problem(NamedTuple):
    """256 points with noisy targets, and the weights that every run starts from."""

    x: Tensor
    y: Tensor
    start: Tensor

    def losses(self, theta: Tensor, points: Tensor) -> Tensor:
        """½ the mean squared error of each run's network on its points: weights (m, parameters) and indices
        (m, points) or (points,) to (m,)."""
        w, b, v, c = theta.split([INPUTS * HIDDEN, HIDDEN, HIDDEN, 1], dim=1)
        hidden = torch.tanh(self.x[points] @ w.view(-1, INPUTS, HIDDEN) + b[:, None])
        outputs = (hidden @ v[:, :, None])[..., 0] + c
        return 0.5 * (outputs - self.y[points]).square().mean(1)

    def gradients(self, theta: Tensor) -> Tensor:
        """∇f of each run: (runs, parameters)."""
        theta = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses(theta, torch.arange(len(self.x))).sum(), theta)
        return gradient


@cache
def problem() -> Problem:
    """Targets of a random network of the same kind, with noise that the trained one cannot fit."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(POINTS, INPUTS)
    w, b, v = 1.5 * normal(INPUTS, HIDDEN) / math.sqrt(INPUTS), 0.5 * normal(HIDDEN), normal(HIDDEN)
    y = torch.tanh(x @ w + b) @ v
    y = (y - y.mean()) / y.std() + 0.5 * normal(POINTS)
    first = (normal(INPUTS * HIDDEN) / math.sqrt(INPUTS), torch.zeros(HIDDEN, dtype=torch.float64))
    last = (normal(HIDDEN) / math.sqrt(HIDDEN), torch.zeros(1, dtype=torch.float64))
    return Problem(x, y, torch.cat([*first, *last]))


@dataclass(frozen=True)
class Runs:
    """Runs that differ in their seeds, 0, 1, …, of batches and coin. Those of equal seed and length, whatever
    their optimizer, see the same batches."""

    schedule: str
    steps: int
    seeds: int
    lr: float
    rho: float
    gamma: float = 1.0


def rate_runs() -> list[Runs]:
    """For each schedule and number of steps T: with ρ ∝ T^−½, and with a constant ρ where there is a ρ."""
    some = []
    for steps, seeds in LENGTHS.items():
        lr = STEP_SIZE / math.sqrt(steps)
        for schedule in SCHEDULES:
            radii = {0.0} if schedule == "SGD" else {RHO, RHO * math.sqrt(SHORTEST / steps)}
            some += [Runs(schedule, steps, seeds, lr, rho) for rho in sorted(radii)]
    return some


FLOOR = Runs("SGD", steps=2**12, seeds=20, lr=1 / 128, rho=0.0)


def floor_runs() -> list[Runs]:
    """SGD first, whose floor is 0, then several (p, γ, ρ) of equal strength pγρ = 0.05, 0.1, 0.2, 0.4."""
    settings = [
        ("1.0", 1.0, 0.05),
        ("1.0", 0.5, 0.1),
        ("0.5", 2.0, 0.05),
        ("0.5", 1.0, 0.1),
        ("1.0", 1.0, 0.1),
        ("0.5", 1.0, 0.2),
        ("0.25", 4.0, 0.1),
        ("1.0", 1.0, 0.2),
        ("0.5", 2.0, 0.2),
        ("1.0", 1.0, 0.4),
        ("0.5", 2.0, 0.4),
        ("rising", 1.0, 0.2),
        ("falling", 1.0, 0.2),
    ]
    return [FLOOR, *(replace(FLOOR, schedule=s, gamma=gamma, rho=rho) for s, gamma, rho in settings)]


class Block(NamedTuple):
    """Runs of one length and step size, of these seeds, that advance together."""

    runs: tuple[Runs, ...]
    seeds: range

    @property
    def steps(self) -> int:
        """Of all of them together."""
        return sum(runs.steps for runs in self.runs) * len(self.seeds)


def blocks(runs: Sequence[Runs]) -> list[Block]:
    """All of `runs`, as what can be measured at once."""
    alike: dict[tuple[int, int, float], list[Runs]] = {}
    for each in runs:
        alike.setdefault((each.steps, each.seeds, each.lr), []).append(each)
    return [
        Block(tuple(some), range(first, min(first + SEEDS_AT_ONCE, seeds)))
        for (_, seeds, _), some in alike.items()
        for first in range(0, seeds, SEEDS_AT_ONCE)
    ]


class Seen(NamedTuple):
    """The full gradient along the way, of each run: mean ‖∇f‖² over all steps and over the second half, and
    the mean ∇f over the second half (runs, parameters)."""

    squares: Tensor
    late_squares: Tensor
    late_gradient: Tensor


def measure(block: Block) -> list[Seen]:
    """Train, looking at ∇f(θ_t) in every step, or where steps are small, in every second, fourth, …: for each
    of the block's runs what was seen, with a line for each seed."""
    of, (steps, lr) = problem(), (block.runs[0].steps, block.runs[0].lr)
    points = torch.stack([_batches(seed, steps) for seed in block.seeds]).repeat(len(block.runs), 1, 1)
    options = [
        {"schedule": _schedule(runs), "rho": runs.rho, "gamma": runs.gamma, "seed": seed}
        for runs in block.runs
        for seed in block.seeds
    ]
    chains = Chains(of.start, steps, lr, options)
    every = max(1, round(LOOK_EVERY / lr))
    squares: list[Tensor] = []
    late = torch.zeros(len(options), len(of.start), dtype=torch.float64)
    for t in range(steps):
        if t % every == every // 2:  # the middle of the steps that it stands for
            gradient = of.gradients(chains.theta)
            squares.append(gradient.square().sum(1))
            if 2 * t >= steps:
                late += gradient
        chains.step(partial(_batch_losses, of=of, points=points[:, t]))
    of_all = torch.stack(squares)
    late_squares = of_all[len(of_all) // 2 :]
    seen = (of_all.mean(0), late_squares.mean(0), late / len(late_squares))
    return [Seen(*parts) for parts in zip(*(part.split(len(block.seeds)) for part in seen), strict=True)]


def joined(measured: Mapping[Block, Sequence[Seen]]) -> dict[Runs, Seen]:
    """What was seen of all seeds, given what `measure` returned of each block."""
    parts: dict[Runs, list[Seen]] = {}
    for block in sorted(measured, key=lambda block: block.seeds.start):
        for runs, seen in zip(block.runs, measured[block], strict=True):
            parts.setdefault(runs, []).append(seen)
    return {runs: Seen(*map(torch.cat, zip(*some, strict=True))) for runs, some in parts.items()}


def _batch_losses(theta: Tensor, runs: list[int], of: Problem, points: Tensor) -> Tensor:
    return of.losses(theta, points[runs])


@cache
def _batches(seed: int, steps: int) -> Tensor:
    """Points of each step's batch, drawn independently: (steps, batch)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(POINTS, (steps, BATCH), generator=generator)


def rate_row(runs: Runs, seen: Seen) -> dict[str, Any]:
    """A line of rate.csv: mean ‖∇f‖² over the run and its second half, with standard errors over seeds."""
    row = asdict(runs)
    for name, squares in {"mean": seen.squares, "late": seen.late_squares}.items():
        row |= {name: squares.mean().item(), f"{name}_se": squares.std().item() / math.sqrt(len(squares))}
    return row


def floor_row(runs: Runs, seen: Seen, sgd: Seen) -> dict[str, Any]:
    """A line of floor.csv: ‖E∇f‖² in the second half, from the differences to SGD's runs on the same batches,
    without the part that is noise; its standard error by the jackknife over seeds. Beside it the excess of
    mean ‖∇f‖² over SGD's, noise included."""
    apart = seen.late_gradient - sgd.late_gradient
    n = len(apart)
    others = torch.tensor([_squared_norm(torch.cat([apart[:i], apart[i + 1 :]])) for i in range(n)])
    excess = seen.late_squares - sgd.late_squares
    return asdict(runs) | {
        "strength": _late_p(runs) * runs.gamma * runs.rho,
        "floor": _squared_norm(apart),
        "floor_se": math.sqrt((n - 1) * others.var(correction=0).item()),
        "excess": excess.mean().item(),
        "excess_se": excess.std().item() / math.sqrt(n),
    }


def _squared_norm(samples: Tensor) -> float:
    """‖mean‖² of the distribution of these samples (n, d), without bias."""
    mean, variance = samples.mean(0), samples.var(0)
    return (mean.square().sum() - variance.sum() / len(samples)).item()


def _late_p(runs: Runs) -> float:
    """The mean p in the second half."""
    return float(probabilities(_schedule(runs), runs.steps)[runs.steps // 2 :].mean())


def _schedule(runs: Runs) -> Schedule:
    return SCHEDULES.get(runs.schedule) or Constant(float(runs.schedule))
