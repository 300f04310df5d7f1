"""The sharpness of the minimum in which a run ended: three measures of the training loss around its weights.

The loss L is the mean cross entropy, without L2, on images without augmentation, of the network in evaluation
mode: BatchNorm normalises by its running statistics, dropout does nothing. So L is a function of θ alone, the
same for every method.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

Batches = Sequence[tuple[Tensor, Tensor]]  # normalized images [B, C, H, W], labels [B]

TOLERANCE = 1e-5  # of λ_max, relative
KRYLOV = 10  # vectors of Lanczos' before its first check: a few do, and each is a Hessian-vector product
DIRECTIONS = 3


@dataclass(frozen=True)
class Sharpness:
    """`loss` is L(θ) in nats; `in_ball` L(θ + ε) − L(θ); `along` L(θ ± d/2) − L(θ), the mean over both signs
    and `DIRECTIONS` directions d.

    λ_max and the ball depend on the scale of weights that a BatchNorm follows, which changes nothing of what
    the network computes; filter-normalised directions do not."""

    loss: float
    lambda_max: float
    in_ball: float
    along: float


def measure(model: nn.Module, batches: Batches, rho: float, seed: int = 0) -> Sharpness:
    """`rho`: radius ρ of SAM's ball. `seed`: of the directions, the same for all that is to be compared."""
    still = copy.deepcopy(model).eval()
    loss = mean_loss(still, batches)
    in_ball = loss_in_ball(still, batches, rho) - loss
    along = float((losses_along(still, batches, seed) - loss).mean())
    return Sharpness(loss, lambda_max(still, batches), in_ball, along)


def mean_loss(model: nn.Module, batches: Batches) -> float:
    """L(θ), in nats."""
    with torch.no_grad():
        total = sum(F.cross_entropy(model(x), y, reduction="sum").double().item() for x, y in batches)
    return total / sum(len(y) for _, y in batches)


def lambda_max(model: nn.Module, batches: Batches) -> float:
    """The largest eigenvalue of the Hessian ∂²L/∂θ², by Lanczos' method (scipy's `eigsh`) on exact
    Hessian-vector products (curvlinops). The first vector is always the same one."""
    from curvlinops import HessianLinearOperator  # of the extra "sharpness"

    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False
    ).to_scipy()
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
    ncv = min(KRYLOV, len(start))
    with sdpa_kernel(SDPBackend.MATH):  # the attention that has a second derivative
        values = eigsh(operator, k=1, which="LA", ncv=ncv, tol=TOLERANCE, v0=start, return_eigenvectors=False)
    return float(values[0])


def loss_in_ball(model: nn.Module, batches: Batches, rho: float) -> float:
    """L(θ + ε), ε = ρ ∇L(θ) / ‖∇L(θ)‖₂: SAM's estimate of the largest loss at distance ρ (Foret et al. 2021,
    eq. 2), with ∇L of all batches together."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    n = sum(len(y) for _, y in batches)
    for x, y in batches:
        (F.cross_entropy(model(x), y, reduction="sum") / n).backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    norm = get_total_norm(gradients).item()
    model.zero_grad(set_to_none=True)
    with _moved(parameters, gradients, rho / norm if norm else 0.0):
        return mean_loss(model, batches)


def losses_along(model: nn.Module, batches: Batches, seed: int) -> np.ndarray:
    """L(θ − d/2) and L(θ + d/2), the mean over `DIRECTIONS` filter-normalised random directions d (Li et al.
    2018, §4): a Gaussian whose every filter (row of a weight of two or more dimensions) has the norm of θ's,
    and which is 0 in biases and norm layers."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    losses = np.empty((DIRECTIONS, 2))
    for line in losses:
        direction = [_filter_normalised(p.detach(), generator) for p in parameters]
        for i, distance in enumerate((-0.5, 0.5)):
            with _moved(parameters, direction, distance):
                line[i] = mean_loss(model, batches)
    return losses.mean(0)


def _filter_normalised(weight: Tensor, generator: torch.Generator) -> Tensor:
    direction = torch.randn(weight.shape, generator=generator).to(weight)
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    rows = tuple(range(1, weight.ndim))
    norms = [torch.linalg.vector_norm(x, dim=rows, keepdim=True) for x in (weight, direction)]
    return direction * norms[0] / norms[1]


@contextmanager
def _moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], distance: float) -> Iterator[None]:
    """θ + distance·direction inside, θ bit for bit after it."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_add_(list(parameters), list(direction), alpha=distance)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), kept)
