"""What several rivals share."""

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from rst.optim import RST, Pass
from rst.passes import require_gradients
from rst.perturbation import local
from rst.schedule import Constant, Schedule, Warmup

Bases = Optimizer | Sequence[Optimizer]


class Remembering(RST):
    """Carries a tensor for each parameter from one step to the next, under `KEY` in the parameter's state;
    zeros before there is one, so that a checkpoint has the same entries whenever it is made."""

    KEY: str
    _new: Mapping[Tensor, Tensor] = {}  # of a step that is not made yet

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad()
        self._new = {}

    def _after_step(self) -> None:
        if self._remembers():  # only now, as some bases take a state that is not empty for their own
            for p in (p for group in self.param_groups for p in group["params"]):
                old = self._remembered(p)
                if p.grad is not None and p in self._new:
                    self.state[p][self.KEY] = self._new[p]
                elif self._new and old is not None:
                    local(old).zero_()  # it had no gradient when the others' was found
                elif p.grad is not None and old is None:
                    self.state[p][self.KEY] = torch.zeros_like(p)
        self._new = {}

    def _remembers(self) -> bool:
        return True

    def _remembered(self, p: Tensor) -> Tensor | None:
        return self.state[p].get(self.KEY) if p in self.state else None


class Reusing(Remembering):
    """Stores what a SAM step finds, and adds it to the gradient in plain steps. ∇L(θ) is averaged over the
    ranks, or each would store something else."""

    KEY = "sharpness"

    def __init__(
        self, base: Bases, schedule: Schedule | float, total_steps: int, rho: float, **options: Any
    ) -> None:
        super().__init__(base, schedule, total_steps, rho, sync_perturbation=True, **options)

    @abstractmethod
    def _find(self, clean: list[Tensor], perturbed: list[Tensor]) -> None:
        """Turn g in `clean`, in place, into what is stored. `perturbed`: g_s."""

    @abstractmethod
    def _weight(self) -> Tensor:
        """The factor of what is added to a plain step's gradient, a scalar."""

    @contextmanager
    def _combine(self, is_local: bool) -> Iterator[None]:
        parameters = list(self._parameters()) if self._remembers() else []
        # Copies, as DistributedDataParallel may have the next gradients in the same memory.
        clean = {p: p.grad.clone() for p in parameters if p.grad is not None}
        with super()._combine(is_local):
            yield
        if self._remembers():
            perturbed = {p: p.grad for p in parameters if p.grad is not None}
            self._new = {p: clean[p] if p in clean else torch.zeros_like(p) for p in perturbed}
            with torch.no_grad():
                self._find([*self._new.values()], [*perturbed.values()])

    @torch.no_grad()
    def _complete(self) -> None:
        if not self._remembers() or self.sam_steps == 0:
            return
        weight = self._weight()
        for p in self._parameters():
            if p.grad is not None and (remembered := self._remembered(p)) is not None:
                local(p.grad).addcmul_(local(remembered), weight.to(p.grad.device))


class OnePass(RST):
    """Every gradient is taken at θ + ε, with an ε that is known before the pass. So it is one propagation a
    step, in which BatchNorm's statistics move, and whose loss is that at θ + ε."""

    SIGN = 1

    @abstractmethod
    def _direction(self, p: Tensor) -> Tensor | None:
        """The direction of ε for p; its length does not matter. None: p stays where it is."""

    @property
    def expected_propagations(self) -> float:
        return self.total_steps

    @property
    def propagations_std(self) -> float:
        return 0.0

    def _sam_passes(self) -> Generator[Pass, None, bool]:
        groups = [(parameters, self.SIGN * rho) for parameters, rho in self._groups()]
        with self._perturbation.applied(groups, self.adaptive, self._sharded, self._direction):
            yield "perturbed"
        require_gradients(self._gradients())
        self._complete()
        return False


def everywhere(method: RST, warmup_steps: int, schedule: object) -> Schedule:
    """The schedule of a method that has none."""
    if schedule is not None:
        raise ValueError(f"{type(method).__name__} does not go by a schedule: leave it out, got {schedule!r}")
    return Warmup(Constant(1.0), warmup_steps) if warmup_steps else Constant(1.0)


def loss_scale(scaler: GradScaler | None, like: Tensor) -> Tensor:
    unscaled = torch.ones((), device=like.device)
    return unscaled if scaler is None else scaler.scale(unscaled)


def check(name: str, value: float, is_good: bool, words: str) -> None:
    if not isinstance(value, float | Real) or not is_good:
        raise ValueError(f"{name} must be {words}, got {value!r}")
