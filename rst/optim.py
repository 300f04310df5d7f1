"""The update rule: SGD, SAM, ASAM, GNP, RST and G-RST as one way of obtaining a step's gradient."""

import math
import re
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rst.joint import Joint
from rst.passes import (
    buffers_kept,
    can_skip_averaging,
    check_module,
    devices_of,
    fully_sharded,
    gradients_kept,
    mark_as_spent,
    mixed,
    random_state,
    refuse_to_drop,
    refuse_to_step,
    require_gradients,
    require_same_coins,
    set_random_state,
    true_gradient,
)
from rst.perturbation import Perturbation, check_rho, reshard
from rst.schedule import Constant, Sampling, Schedule, decider, matched_gamma
from rst.schedule import expected_propagations as expectation_of
from rst.schedule import propagations_std as std_of

Pass = Literal["clean", "perturbed"]


class RST(Joint):
    """Randomized Sharpness-Aware Training around any base optimizer (arXiv 2203.09962).

    Step t is a SAM step with probability p(t), else a plain one:

        plain:  g = ∇L(θ)                                            one propagation
        SAM:    ε = ρ ∇L(θ) / ‖∇L(θ)‖₂                               two propagations
                g = (1 − γ) ∇L(θ) + γ ∇L(θ + ε)
        both:   the base optimizer's step at θ along g

    p ≡ 0 is the base optimizer, p ≡ 1 with γ = 1 is SAM, p ≡ 1 with any γ is GNP, γ = 1 is RST, any γ is
    G-RST. The norm is over all parameters together. A *propagation* is one forward-backward pair.

        optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                        schedule=Linear(0.0, 1.0), total_steps=epochs * len(loader), module=model)
        for x, y in loader:
            for _ in optimizer.passes():  # once, or twice in a SAM step
                loss = F.cross_entropy(model(x), y)
                loss.backward()
            clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    It shares `param_groups` and `state` with its base, so learning-rate schedulers and `GradScaler` work as
    with any optimizer; loss scaling cancels in ε. In a SAM step both passes see the same random numbers
    (dropout), buffers such as BatchNorm's statistics move in the clean pass only, and θ comes back bit for
    bit. A submodule with an attribute `true_gradient` (ShakeDrop, Shake-Shake in `rst.models.shake`) has it
    set to True during the clean pass of a SAM step, for which it then computes its true gradient.

    Args:
        base: the optimizer that makes the step, or several of them, each for its own parameters (Muon for
            matrices and AdamW for the rest, say), with one joint ε.
        schedule: `schedule(step, total_steps)` → p(t), see `rst.schedule`; a number is a constant p.
        total_steps: number of steps of the run, T in the schedule.
        rho: radius ρ of the perturbation. A parameter group with a `rho` of its own keeps it: ε of that
            group is then its ρ times its part of the unit vector ∇L(θ)/‖∇L(θ)‖. (Not with a base such as
            Adadelta, whose own `rho` is something else.)
        gamma: weight γ > 0 of the perturbed gradient, or "matched" for 1 / mean p, which gives any
            schedule SAM's expected regularization p̄·γ·ρ.
        adaptive: ASAM (Kwon et al. 2021): ε = ρ T²∇L(θ) / ‖T∇L(θ)‖ with T = |θ|.
        mix: "gradient" as above; "normalized" mixes the unit vector, (1 − γ)∇L(θ)/‖∇L(θ)‖ + γ∇L(θ + ε), as
            the authors' code does by default; not for GradScaler, whose scale would change its weights.
        sync_perturbation: under DistributedDataParallel, average ∇L(θ) over the ranks before ε is taken.
            Otherwise each rank perturbs along the gradient of its own part of the batch (m-sharpness) and a
            SAM step all-reduces once, as the authors do. With `fully_shard` it is always averaged.
        sampling: "independent" throws a coin at each step; "systematic" spreads the SAM steps evenly at the
            same p(t), so that their number is within 1 of Σ p(t), see `rst.schedule.Systematic`.
        module: the model, wrapped in DistributedDataParallel where it is, for its buffers, `true_gradient`
            attributes, `no_sync`, and what fully_shard has gathered. Without it, buffers move in both passes,
            and parameters that belong to another optimizer get the gradients of both.
        seed: of the coin; the same on every rank.

    Raises:
        TypeError, ValueError: for an argument out of its range, and a base that cannot be one, see `Joint`.

    Attributes:
        steps, sam_steps, propagations: what was done so far; saved in `state_dict`.
        has_gradient: whether `.grad` holds a step's gradient that `step` has not used yet.
    """

    SAVED: tuple[str, ...] = ("steps", "sam_steps", "propagations")  # what a resumed run goes on from
    decides_late = False  # whether `_confirm` may say no

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        schedule: Schedule | float,
        total_steps: int,
        rho: float = 0.1,
        gamma: float | Literal["matched"] = 1.0,
        *,
        adaptive: bool = False,
        mix: Literal["gradient", "normalized"] = "gradient",
        sync_perturbation: bool = False,
        sampling: Sampling = "independent",
        module: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(total_steps, int | Integral) or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
        if mix not in ("gradient", "normalized"):
            raise ValueError(f"mix must be 'gradient' or 'normalized', got {mix!r}")
        if not isinstance(schedule, Real) and not callable(schedule):
            raise TypeError(f"schedule must be a number or a schedule such as Linear(0, 1), got {schedule!r}")
        check_rho(rho)
        bases: Any = base if isinstance(base, list | tuple) else [base]
        super().__init__(bases, {"rho": rho})
        self.rho = rho
        for _, of_group in self._groups():
            check_rho(of_group)
        self.schedule: Schedule = schedule if callable(schedule) else Constant(float(schedule))
        if gamma == "matched":
            gamma = matched_gamma(self.schedule, total_steps)
        if not isinstance(gamma, float | Real) or not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be a finite number above 0, or 'matched', got {gamma!r}")
        self.gamma = float(gamma)
        self.total_steps = total_steps
        self.adaptive = adaptive
        self.mix = mix
        self.sync_perturbation = sync_perturbation
        self.sampling = sampling
        self.module = module
        self.seed = seed
        self.steps = self.sam_steps = 0
        self.propagations: float = 0
        self.has_gradient = False
        self._drawn_by = sampling, self.schedule, total_steps, seed
        self._is_drawn = decider(*self._drawn_by)
        self._perturbation = Perturbation()
        self._loop: weakref.ref[Any] | None = None

    @property
    def module(self) -> nn.Module | None:
        """The model. Set it again if it is wrapped after RST was made."""
        return self._module

    @module.setter
    def module(self, module: nn.Module | None) -> None:
        check_module(module)
        self._module, self._ranks_agree = module, False

    @property
    def expected_propagations(self) -> float | None:
        """Expected number of propagations of the whole run; None where only the run can tell."""
        return expectation_of(self.schedule, self.total_steps)

    @property
    def propagations_std(self) -> float | None:
        """Standard deviation of a run's number of propagations; None where only the run can tell."""
        return std_of(self.schedule, self.total_steps, self.sampling)

    def passes(self) -> Generator[Pass, None, None]:
        """The passes of this step, for a loop whose body computes the loss and calls `backward()`.

            for which in optimizer.passes():
                loss = F.cross_entropy(model(x), y)
                loss.backward()

        Yields "clean" with the weights at θ and then, in a SAM step, "perturbed" with them at θ + ε. After
        the loop `.grad` holds the step's gradient g, to be unscaled or clipped before `step()`. Micro-batches
        go into the body. When it raises, breaks or returns, weights are θ again, buffers and random numbers
        as the clean pass left them, gradients None, and the step does not count.

        Raises:
            ValueError: past `total_steps`, where p(t) is no probability, where ranks have different coins.
            RuntimeError: where `.grad` holds gradients that this step would lose: of a step that was not
                taken, or of a `backward()` outside the loop; and for a body that leaves no gradients.
        """
        if original := vars(self).get("_optimizer"):  # of Lightning's and Fabric's wrappers
            return original.passes()
        if (loop := self._loop and self._loop()) and loop.gi_frame is not None:
            loop.close()
            raise RuntimeError("passes() was called within a loop over passes(), or while one is unfinished")
        passes = self._passes()
        self._loop = weakref.ref(passes)  # a strong one would keep it alive when the loop is left
        return passes

    def gradient(self, closure: Callable[[], Any]) -> Any:
        """`passes` with `closure`, which computes the loss, calls `backward()` and returns the loss, as the
        body of the loop. Returns what it returned in the first pass: the loss at θ, not at θ + ε."""
        with torch.enable_grad(), closing(self.passes()) as passes:
            loss, *_ = [closure() for _ in passes]
        return loss

    def images(self, n: int) -> int:
        """How many of a batch of n images this pass is to propagate: all. A rival may ask for fewer."""
        return n

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base optimizer's step along `.grad`, which the next `passes` clears. With a closure,
        `gradient(closure)` first, whose loss it returns.

        Raises:
            RuntimeError: without a closure and without a loop over `passes()` since the last step.
        """
        loss = None if closure is None else self.gradient(closure)
        refuse_to_step(self._gradients(), self.has_gradient)
        for base in self.bases:
            base.step()
        # They are left where they are, as wrappers such as Lookahead look at them after the step.
        mark_as_spent(self._gradients())
        self.has_gradient = False
        self._after_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad()
        self.has_gradient = False

    def _passes(self) -> Generator[Pass, None, None]:
        if not self._ranks_agree:
            require_same_coins(self.module, self._parameters(), self.extra_state())
            self._ranks_agree, self._sharded = True, fully_sharded(self.module)
        reshard(self._sharded)
        is_sam = self._decide()
        refuse_to_drop(self._gradients(), self.has_gradient)
        self.zero_grad()
        try:
            if is_sam:
                is_sam = yield from self._sam_passes()
            else:
                yield "clean"
                require_gradients(self._gradients())
                self._complete()
        except BaseException:
            self.zero_grad()
            raise
        self.steps += 1
        self.sam_steps += is_sam
        self.propagations += self._cost(is_sam)
        self.has_gradient = True

    def _sam_passes(self) -> Generator[Pass, None, bool]:
        """The passes of a SAM step. Returns whether it was one after all, see `_confirm`."""
        module: Any = self.module
        of_module = [] if module is None else list(module.parameters())
        before = random_state(devices_of([*self._parameters(), *of_module], module))
        optimized = {id(p) for group in self.param_groups for p in group["params"]}
        others = [p for p in of_module if id(p) not in optimized]  # frozen ones, too: the body may unfreeze
        has_others = any(p.requires_grad for p in others)
        is_local = not self.sync_perturbation and can_skip_averaging(module, self._parameters(), has_others)
        shake = true_gradient(None if self.decides_late else module)
        with shake, module.no_sync() if is_local else nullcontext():
            yield "clean"
        require_gradients(self._gradients())
        if not self._confirm():
            self._complete()
            return False
        after = random_state(before)
        try:
            perturbed = self._perturbation.applied([*self._groups()], self.adaptive, self._sharded)
            with perturbed, self._combine(is_local):
                set_random_state(before)
                with buffers_kept(module), gradients_kept(others):
                    yield "perturbed"
        finally:
            set_random_state(after)
        return True

    # What a method that saves SAM's second propagation in another way does differently: see `rst.rivals`.

    def _decide(self) -> bool:
        """Before the clean pass: whether this is to be a SAM step."""
        by = self.sampling, self.schedule, self.total_steps, self.seed
        if by != self._drawn_by:  # somebody has changed an attribute
            self._drawn_by, self._is_drawn = by, decider(*by)
        return bool(self._is_drawn(self.steps))  # whatever a schedule returns

    def _confirm(self) -> bool:
        """After the clean pass of what is to be a SAM step, with ∇L(θ) in `.grad`: whether it is one."""
        return True

    def _combine(self, is_local: bool) -> AbstractContextManager[None]:
        """Around the perturbed pass: finds ∇L(θ) in `.grad`, leaves the step's gradient there.

        Args:
            is_local: whether ∇L(θ) is this rank's own, and is to be averaged together with ∇L(θ + ε).
        """
        finds_unused = getattr(self.module, "find_unused_parameters", False)
        return mixed(list(self._parameters()), self.gamma, self.mix, is_local, finds_unused)

    def _complete(self) -> None:
        """After the pass of a plain step: turn ∇L(θ) in `.grad` into the step's gradient."""

    def _after_step(self) -> None:
        """After the bases' steps, which `GradScaler` may skip."""

    def _cost(self, is_sam: bool) -> float:
        """Propagations of a step."""
        return 1 + is_sam

    def _groups(self) -> Iterator[tuple[list[Tensor], float]]:
        """Each group's parameters and ρ."""
        for base in self.bases:
            for group in base.param_groups:
                rho = self.rho if "rho" in base.defaults else group.get("rho", self.rho)
                yield group["params"], rho

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_loop": None, "_perturbation": Perturbation()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._is_made:
            check_rho(param_group.get("rho", self.rho))
        super().add_param_group(param_group)

    def extra_state(self) -> dict[str, Any]:
        """What a resumed run goes on from, and what it should have in common with the run that was saved."""
        schedule = re.sub(r" at 0x[0-9a-f]+", "", repr(self.schedule))
        if self.sampling == "systematic":
            schedule += ", sampled systematically"
        saved = {name: getattr(self, name) for name in self.SAVED}
        return {**saved, "seed": int(self.seed), "total_steps": int(self.total_steps), "schedule": schedule}

    def load_extra_state(self, saved: dict[str, Any]) -> None:
        """Warns where the state was saved by a run of another seed, schedule or total_steps."""
        for name, value in self.extra_state().items():
            if name in self.SAVED:
                setattr(self, name, saved.get(name, value))  # another method's state has fewer
            elif saved[name] != value:
                warnings.warn(f"the saved run had {name}={saved[name]}, this one has {value}", stacklevel=3)
        if self.has_gradient:  # of a step that will not be taken
            self.zero_grad()
