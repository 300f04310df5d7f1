"""Other ways of saving SAM's second propagation, each a small class over `RST` and under its interface.

A method differs from RST in when it takes a SAM step (`_decide`, `_confirm`), in the direction of ε, or in
what it makes of the gradients (`_combine`, in plain steps `_complete`). docs/rivals.md shows how to add one.

In the formulas g = ∇L(θ), g_s = ∇L(θ + ε), and ε = ρ g/‖g‖ unless another is given; norms and products are
over all parameters together. Constants marked † are quoted from memory. Arguments that are not explained are
those of `RST`. What a method carries from one step to the next is saved, and changes in `step()`: a step that
`GradScaler` skips leaves it as it was.
"""

import math
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from rst.optim import RST, Pass
from rst.perturbation import divide, local, total_dot, total_norm
from rst.rival_bases import Bases, OnePass, Remembering, Reusing, check, everywhere, loss_scale
from rst.schedule import Sampling, Schedule, expected_propagations, propagations_std


class LookSAM(Reusing):
    """LookSAM (Liu et al., CVPR 2022, arXiv 2203.02714): keeps the part of SAM's gradient that SGD's has not.

        SAM:    g_s, and v̂ = v/‖v‖ is stored, with v = g_s − (⟨g_s, g⟩/‖g‖²) g
        plain:  g + α ‖g‖ v̂, or g before the first SAM step

    Published with a SAM step every 5 steps, `Periodic(5)`; any schedule will do. α = 0 is RST. Costs
    1 + mean p propagations a step. Memory: beside SAM's, a copy of the parameters (v̂), and one more during
    the second pass (g).

    Args:
        alpha: α ≥ 0. 0.7 in most implementations, 0.2 in one.
    """

    def __init__(
        self,
        base: Bases,
        *,
        schedule: Schedule | float,
        total_steps: int,
        rho: float = 0.1,
        alpha: float = 0.7,
        adaptive: bool = False,
        sampling: Sampling = "independent",
        module: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        check("alpha", alpha, 0 <= alpha < math.inf, "a finite number of at least 0")
        super().__init__(
            base, schedule, total_steps, rho, adaptive=adaptive, sampling=sampling, module=module, seed=seed
        )
        self.alpha = alpha

    def _remembers(self) -> bool:
        return self.alpha > 0

    def _find(self, clean: list[Tensor], perturbed: list[Tensor]) -> None:
        along = divide(total_dot(perturbed, clean), total_norm(clean).square())
        for g, g_s in zip(clean, perturbed, strict=True):
            local(g).mul_(-along.to(g.device)).add_(local(g_s))
        scale = divide(1.0, total_norm(clean))
        for v in clean:
            local(v).mul_(scale.to(v.device))

    def _weight(self) -> Tensor:
        return self.alpha * total_norm(self._gradients())


class AESAM(LookSAM):
    """AE-SAM (Jiang et al., ICLR 2023, arXiv 2304.14647): a SAM step where the gradient is unusually large.

        μ ← δμ + (1 − δ)‖g‖²,  σ² ← δσ² + (1 − δ)(‖g‖² − μ)²,  both from 0
        SAM iff ‖g‖² ≥ μ + c_t σ  with  c_t = λ₁ t/T + λ₂ (1 − t/T)

    With `reuse` it is AE-LookSAM: plain steps are those of LookSAM. Costs 1 + the share of SAM steps, which
    only the run can tell. Memory: SAM's, with `reuse` LookSAM's.

    The decision waits for the device, once a step, and takes the gradient averaged over the ranks, which is
    the same on all of them. Modules with `true_gradient` are left alone: the clean pass may be the only one.

    Args:
        lambda_1, lambda_2: λ₁ and λ₂, the thresholds at the end and at the start of the run †.
        delta: δ in [0, 1) †.
        reuse: whether plain steps reuse what SAM steps find.
        alpha: of LookSAM, where `reuse`.
        warmup_steps: plain steps at the start, which do not count in μ and σ.
        scaler: the `GradScaler`, where the loss is scaled: ‖g‖² is that of the loss itself.

    Attributes:
        mean, variance: μ and σ².
    """

    SAVED = (*RST.SAVED, "mean", "variance")
    decides_late = True
    _moved: tuple[float, float] | None = None  # μ and σ² of a step that is not made yet

    def __init__(
        self,
        base: Bases,
        *,
        total_steps: int,
        rho: float = 0.1,
        lambda_1: float = -1.0,
        lambda_2: float = 1.0,
        delta: float = 0.9,
        reuse: bool = False,
        alpha: float = 0.7,
        adaptive: bool = False,
        warmup_steps: int = 0,
        module: nn.Module | None = None,
        scaler: GradScaler | None = None,
        schedule: None = None,
    ) -> None:
        for name, value in {"lambda_1": lambda_1, "lambda_2": lambda_2}.items():
            check(name, value, math.isfinite(value), "a finite number")
        check("delta", delta, 0 <= delta < 1, "in [0, 1)")
        where = everywhere(self, warmup_steps, schedule)
        rule: dict[str, Any] = {"alpha": alpha, "adaptive": adaptive, "module": module}
        super().__init__(base, schedule=where, total_steps=total_steps, rho=rho, **rule)
        self.lambda_1, self.lambda_2, self.delta = lambda_1, lambda_2, delta
        self.reuse, self.scaler = reuse, scaler
        self.mean = self.variance = 0.0

    @property
    def expected_propagations(self) -> None:
        return None

    @property
    def propagations_std(self) -> None:
        return None

    def _remembers(self) -> bool:
        return self.reuse and super()._remembers()

    def _decide(self) -> bool:
        self._moved = None  # of a step that was skipped or left
        return super()._decide()

    def _confirm(self) -> bool:
        norm = total_norm(self._gradients())
        squared = float(norm / loss_scale(self.scaler, norm)) ** 2
        if not math.isfinite(squared):
            return False
        mean = self.mean + (1 - self.delta) * (squared - self.mean)
        variance = self.variance + (1 - self.delta) * ((squared - mean) ** 2 - self.variance)
        self._moved = mean, variance
        progress = self.steps / self.total_steps
        c = self.lambda_1 * progress + self.lambda_2 * (1 - progress)
        return squared >= mean + c * math.sqrt(variance)

    def _after_step(self) -> None:
        self.mean, self.variance = self._moved or (self.mean, self.variance)
        self._moved = None
        super()._after_step()


class VSAM(Reusing):
    """Reuse of SAM's difference (vSAM, arXiv 2403.08821; ARSAM, arXiv 2510.03763), at a schedule of SAM steps
    instead of their adaptive one:

        SAM:    g_s, and d = g_s − g is stored
        plain:  g + d, or g before the first SAM step

    Costs 1 + mean p propagations a step. Memory: that of LookSAM.

    Args:
        scaler: the `GradScaler`, where the loss is scaled: d is stored without that scale, which changes.
    """

    KEY = "difference"

    def __init__(
        self,
        base: Bases,
        *,
        schedule: Schedule | float,
        total_steps: int,
        rho: float = 0.1,
        adaptive: bool = False,
        sampling: Sampling = "independent",
        module: nn.Module | None = None,
        seed: int = 0,
        scaler: GradScaler | None = None,
    ) -> None:
        super().__init__(
            base, schedule, total_steps, rho, adaptive=adaptive, sampling=sampling, module=module, seed=seed
        )
        self.scaler = scaler

    def _find(self, clean: list[Tensor], perturbed: list[Tensor]) -> None:
        scale = self._weight()
        for g, g_s in zip(clean, perturbed, strict=True):
            local(g).neg_().add_(local(g_s)).div_(scale.to(g.device))

    def _weight(self) -> Tensor:
        return loss_scale(self.scaler, self._gradients()[0])


class PartialAscent(RST):
    """ε from a part of the batch, the step's gradient from all of it; ours in this form, compare K-SAM and
    ESAM's data selection.

        ε = ρ g_f/‖g_f‖, g_f the gradient on the first f·B images;  the step is along g_s on all B

    f = 1 is SAM. Costs 1 + f·mean p propagations a step, no memory beside SAM's. The loop asks for the part:

        for _ in optimizer.passes():
            n = optimizer.images(len(x))  # a part of them in the ascent, else all
            loss = F.cross_entropy(model(x[:n]), y[:n])
            loss.backward()

    Where it does not ask, all images are propagated in both passes, and counted. BatchNorm's statistics move
    in the ascent, at θ, as SAM's do: their part of the batch is smaller.

    Args:
        schedule: p(t) of the steps that have an ascent: all of them, unless given.
        fraction: f in (0, 1].
    """

    def __init__(
        self,
        base: Bases,
        *,
        schedule: Schedule | float = 1.0,
        total_steps: int,
        rho: float = 0.1,
        fraction: float = 0.25,
        adaptive: bool = False,
        sync_perturbation: bool = False,
        sampling: Sampling = "independent",
        module: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        check("fraction", fraction, 0 < fraction <= 1, "above 0 and at most 1")
        rule: dict[str, Any] = {"adaptive": adaptive, "sync_perturbation": sync_perturbation}
        super().__init__(
            base, schedule, total_steps, rho, sampling=sampling, module=module, seed=seed, **rule
        )
        self.fraction = fraction
        self._ascends, self._asked = False, list[tuple[int, int]]()  # images of parts and their batches

    @torch.compiler.disable  # in a compiled body it would lose what was asked
    def images(self, n: int) -> int:
        if not self._ascends:
            return n
        part = max(1, round(self.fraction * n))
        self._asked.append((part, n))  # in place, as Lightning's wrapper may be self
        return part

    @property
    def expected_propagations(self) -> float:
        p = expected_propagations(self.schedule, self.total_steps) - self.total_steps
        return self.total_steps + self.fraction * p

    @property
    def propagations_std(self) -> float:
        return self.fraction * propagations_std(self.schedule, self.total_steps, self.sampling)

    def _sam_passes(self) -> Generator[Pass, None, bool]:
        self._ascends, self._asked = True, []
        try:
            return (yield from super()._sam_passes())
        finally:
            self._ascends = False

    def _confirm(self) -> bool:
        self._ascends = False
        return True

    def _cost(self, is_sam: bool) -> float:
        part, batch = map(sum, zip((0, 0), *self._asked, strict=True))
        return 1 + (part / batch if batch else 1) * is_sam


class MomentumSAM(OnePass):
    """Momentum-SAM (Becker et al., arXiv 2401.12033): every gradient is taken at θ − ρ v/‖v‖, with v the
    momentum buffer before the step; at θ while there is none. Costs 1 propagation a step, no memory beside
    SAM's. Of several bases, v is that of those which have a momentum buffer.

    Args:
        rho: tuned, and larger than SAM's: 0.3 by default in the authors' code, 3 in its examples on CIFAR-100
            and ImageNet.
        warmup_steps: steps at the start whose gradient is taken at θ.
    """

    SIGN = -1

    def __init__(
        self,
        base: Bases,
        *,
        total_steps: int,
        rho: float = 0.3,
        warmup_steps: int = 0,
        module: nn.Module | None = None,
        schedule: None = None,
    ) -> None:
        super().__init__(base, everywhere(self, warmup_steps, schedule), total_steps, rho, module=module)
        if not any(group.get("momentum") for group in self.param_groups):
            names = ", ".join(type(base).__name__ for base in self.bases)
            raise ValueError(f"MomentumSAM needs momentum, and {names} has none: use SGD(momentum=0.9), say")

    def _after_step(self) -> None:
        if all(self._direction(p) is None for p in self._parameters()):
            raise RuntimeError("MomentumSAM finds no momentum_buffer in the base's state: use torch's SGD")

    def _direction(self, p: Tensor) -> Tensor | None:
        return self.state[p].get("momentum_buffer") if p in self.state else None


class StaleAscent(OnePass, Remembering):
    """ε = ρ g_{t−1}/‖g_{t−1}‖, along the last gradient that a step was made with (S²-SAM †); none in the
    first step. Costs 1 propagation a step. Memory: beside SAM's, g_{t−1}, and g_t until `step()`.

    Args:
        warmup_steps: steps at the start whose gradient is taken at θ.
    """

    KEY = "last_gradient"

    def __init__(
        self,
        base: Bases,
        *,
        total_steps: int,
        rho: float = 0.1,
        adaptive: bool = False,
        warmup_steps: int = 0,
        module: nn.Module | None = None,
        schedule: None = None,
    ) -> None:
        where = everywhere(self, warmup_steps, schedule)
        super().__init__(base, where, total_steps, rho, adaptive=adaptive, module=module)

    def _direction(self, p: Tensor) -> Tensor | None:
        return self._remembered(p)

    def _complete(self) -> None:
        # Before it is unscaled and clipped, which do not turn it.
        self._new = {p: p.grad.clone() for p in self._parameters() if p.grad is not None}
