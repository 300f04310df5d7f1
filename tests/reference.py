"""RST (arXiv 2203.09962) written out, slow and plain, to check `rst.RST` against.

θ, ε, ∇L(θ) and ∇L(θ+ε) are separate lists of cloned tensors, one entry a parameter. A gradient that
autograd did not produce is None. Meant for float64. Below it, the small problem that the tests train on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rst import RST
from rst.schedule import uniform

Closure = Callable[[], Tensor]
Gradients = list[Tensor | None]


@dataclass
class Pass:
    """What one iteration held before the base optimizer moved."""

    loss: Tensor
    sam: bool
    theta: list[Tensor]
    epsilon: list[Tensor] | None
    clean: Gradients
    perturbed: Gradients | None
    g: Gradients


def evaluate(params: list[nn.Parameter], closure: Closure) -> tuple[Tensor, Gradients]:
    """L and ∇L at whatever the parameters hold now."""
    for p in params:
        p.grad = None
    loss = closure()
    return loss.detach().clone(), [None if p.grad is None else p.grad.detach().clone() for p in params]


def assign(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def norm(tensors: Gradients) -> Tensor:
    """‖·‖₂ over all parameters together."""
    squares = [x.abs().square().sum() for x in tensors if x is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def perturbation(theta: list[Tensor], g: Gradients, rho: list[float], adaptive: bool) -> list[Tensor]:
    """ε = ρ g/‖g‖; ASAM: ε = ρ T²g/‖Tg‖ with T = |θ|. Zero where g is zero or missing."""
    operator = [x.abs() if adaptive else torch.ones_like(x) for x in theta]
    scaled = [None if x is None else T * x for T, x in zip(operator, g, strict=True)]
    length = norm(scaled)
    epsilon = []
    for T, x, r in zip(operator, scaled, rho, strict=True):
        if x is None or length == 0:
            epsilon.append(torch.zeros_like(T))
        else:
            epsilon.append(r * T * x / length)
    return epsilon


def mixture(clean: Gradients, perturbed: Gradients, gamma: float, mix: str) -> Gradients:
    """(1−γ)∇L(θ) + γ∇L(θ+ε); with mix="normalized" the clean gradient is ∇L(θ)/‖∇L(θ)‖."""
    length = norm(clean)
    g: Gradients = []
    for a, b in zip(clean, perturbed, strict=True):
        if a is None and b is None:
            g.append(None)
            continue
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        if mix == "normalized" and length > 0:
            a = a / length
        g.append((1 - gamma) * a + gamma * b)
    return g


def gradient(
    model: nn.Module,
    params: list[nn.Parameter],
    closure: Closure,
    *,
    sam: bool,
    rho: list[float],
    gamma: float = 1.0,
    adaptive: bool = False,
    mix: str = "gradient",
) -> Pass:
    """Steps 2 and 3 of the algorithm: g ends in `.grad`, θ is back in place."""
    theta = [p.detach().clone() for p in params]
    noise = torch.get_rng_state()
    loss, clean = evaluate(params, closure)
    if not sam:
        return Pass(loss, sam, theta, None, clean, None, clean)

    noise_after = torch.get_rng_state()
    statistics = [b.clone() for b in model.buffers()]
    epsilon = perturbation(theta, clean, rho, adaptive)

    assign(params, [t + e for t, e in zip(theta, epsilon, strict=True)])
    torch.set_rng_state(noise)
    _, perturbed = evaluate(params, closure)

    assign(params, theta)
    assign(list(model.buffers()), statistics)
    torch.set_rng_state(noise_after)
    g = mixture(clean, perturbed, gamma, mix)
    for p, x in zip(params, g, strict=True):
        p.grad = x
    return Pass(loss, sam, theta, epsilon, clean, perturbed, g)


def train(
    model: nn.Module,
    base: torch.optim.Optimizer,
    closure: Callable[[int], Tensor],
    p: Callable[[int, int], float],
    total_steps: int,
    *,
    rho: float | list[float] = 0.1,
    seed: int = 0,
    **rule: object,
) -> list[bool]:
    """The whole algorithm for `total_steps` iterations; returns X_t. `rho`: a number, or one a group."""
    params = [x for group in base.param_groups for x in group["params"]]
    by_group = rho if isinstance(rho, list) else [rho] * len(base.param_groups)
    rho_of = [r for r, group in zip(by_group, base.param_groups, strict=True) for _ in group["params"]]
    X = []
    for t in range(total_steps):
        X.append(uniform(seed, t) < p(t, total_steps))
        gradient(model, params, lambda t=t: closure(t), sam=X[-1], rho=rho_of, **rule)
        base.step()
    return X


def network(dtype: torch.dtype = torch.float64, plain: bool = False) -> nn.Sequential:
    """Five small layers with BatchNorm and dropout, or three without (plain).

    No bias before BatchNorm: its exact gradient is 0, and AdamW would blow the rounding up to full steps.
    Tanh, because a ReLU's kink may turn a rounding difference into a finite one.
    """
    torch.manual_seed(0)
    middle = [nn.Tanh()] if plain else [nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.25)]
    return nn.Sequential(nn.Linear(6, 8, bias=plain), *middle, nn.Linear(8, 3)).to(dtype)


@cache
def batches(dtype: torch.dtype = torch.float64, steps: int = 200, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (steps, size, 6) and labels (steps, size)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, size, 6, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(3, (steps, size), generator=generator)


def loss_of(model: nn.Module, t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Forward and backward on the batch of step t."""
    inputs, labels = batches(dtype)
    loss = F.cross_entropy(model(inputs[t]), labels[t])
    loss.backward()
    return loss.detach()


def by_passes(optimizer: RST, closure: Callable[[], Tensor]) -> Tensor:
    """One step by a loop over `passes()`; returns the loss of the last pass."""
    for _ in optimizer.passes():
        loss = closure()
    optimizer.step()
    return loss


def by_gradient(optimizer: RST, closure: Callable[[], Tensor]) -> Tensor:
    loss = optimizer.gradient(closure)
    optimizer.step()
    return loss


def by_step(optimizer: RST, closure: Callable[[], Tensor]) -> Tensor:
    return optimizer.step(closure)


WAYS = {"passes": by_passes, "gradient": by_gradient, "step": by_step}


def take_steps(
    model: nn.Module,
    optimizer: RST,
    steps: int = 200,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
    way: Callable[[RST, Closure], Tensor] = by_passes,
) -> list[bool]:
    """Train on the batches from `start` on; returns X_t, the decisions."""
    X = []
    for t in range(start, start + steps):
        before = optimizer.sam_steps
        way(optimizer, lambda t=t: loss_of(model, t, dtype))
        X.append(optimizer.sam_steps > before)
    return X


def sgd(params) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adamw(params) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


BASES = {"sgd": sgd, "adamw": adamw}


def state(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters and buffers."""
    return [x.detach().clone() for x in (*model.parameters(), *model.buffers())]


def assert_close(a: list[Tensor], b: list[Tensor], rtol: float = 1e-10, atol: float = 1e-10) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
