"""The update rule: SGD, SAM, ASAM, GNP, RST and G-RST as one way of obtaining a step's gradient."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rst.passes import frozen_batchnorm, random_state, refuse_zeroing, set_random_state, true_gradient
from rst.schedule import Schedule, expected_propagations, uniform


class RST(torch.optim.Optimizer):
    """Randomized Sharpness-Aware Training around any base optimizer (arXiv 2203.09962, algorithm 1).

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
            def closure():  # forward and backward only
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss
            loss = optimizer.gradient(closure)
            clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    It shares `param_groups` and `state` with its base, so learning-rate schedulers and `GradScaler` work as
    with any optimizer; loss scaling cancels in ε. Gradient accumulation is a loop inside the closure. In a
    SAM step both passes see the same random numbers (dropout), BatchNorm statistics move in the clean pass
    only, and θ comes back bit for bit, also when the closure raises. A submodule with an attribute
    `true_gradient` (ShakeDrop, Shake-Shake in `rst.models.shake`) has it set to True during the clean pass of
    a SAM step, for which it then computes its true gradient; in the perturbed pass and in plain steps it
    computes whatever gradient it is made for.

    During the perturbed pass `parameter.data` is a second tensor, so nothing may hold on to the storage of
    the parameters (views into one flat buffer, say) across a call.

    Args:
        base: the optimizer that makes the step.
        schedule: `schedule(step, total_steps)` → p(t), see `rst.schedule`.
        total_steps: number of steps of the run, T in the schedule.
        rho: radius ρ of the perturbation. A parameter group with a `rho` of its own keeps it: ε of that
            group is then its ρ times its part of the unit vector ∇L(θ)/‖∇L(θ)‖.
        gamma: weight γ > 0 of the perturbed gradient, or "matched" for 1 / mean p, which gives any
            schedule SAM's expected regularization p̄·γ·ρ.
        adaptive: ASAM (Kwon et al. 2021): ε = ρ T²∇L(θ) / ‖T∇L(θ)‖ with T = |θ|.
        mix: "gradient" as above; "normalized" mixes the unit vector, (1 − γ)∇L(θ)/‖∇L(θ)‖ + γ∇L(θ + ε), as
            the authors' code does by default. The latter does not commute with loss scaling.
        sync_perturbation: under DistributedDataParallel, average ∇L(θ) over the ranks before ε is taken.
            Otherwise each rank perturbs along its own gradient and a SAM step all-reduces once, as the
            authors do (m-sharpness).
        module: the model, for its BatchNorm layers, its `true_gradient` attributes and its `no_sync`. Without
            it, BatchNorm statistics move in both passes.
        seed: of the coin; the same on every rank.

    Raises:
        ValueError: for an argument out of its range, also "matched" on a schedule of mean 0.

    Attributes:
        steps, sam_steps, propagations: what was done so far; saved in `state_dict`.
        has_gradient: whether `gradient` was called and `step` not yet.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        schedule: Schedule,
        total_steps: int,
        rho: float = 0.1,
        gamma: float | Literal["matched"] = 1.0,
        *,
        adaptive: bool = False,
        mix: Literal["gradient", "normalized"] = "gradient",
        sync_perturbation: bool = False,
        module: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(total_steps, int | Integral) or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
        if mix not in ("gradient", "normalized"):
            raise ValueError(f"mix must be 'gradient' or 'normalized', got {mix!r}")
        uniform(seed, 0)  # refuses a bad seed now, not at the first step
        self.gamma = _resolve_gamma(gamma, schedule, total_steps)
        super().__init__(base.param_groups, {**base.defaults, "rho": rho})
        for group in base.param_groups:
            _check_rho(group["rho"])
        self.base = base
        self.schedule = schedule
        self.total_steps = total_steps
        self.adaptive = adaptive
        self.mix = mix
        self.sync_perturbation = sync_perturbation
        self.module = module
        self.seed = seed
        self.steps = self.sam_steps = self.propagations = 0
        self.has_gradient = False
        self._spares: dict[Tensor, Tensor] = {}
        self._follow_base()

    def gradient(self, closure: Callable[[], Any]) -> Any:
        """Leave this step's gradient in `.grad`, in one or two propagations.

        Args:
            closure: computes the loss, calls `backward()` and returns the loss. It must not zero gradients:
                this method does, before the first pass, and the second adds to what the first left.

        Returns:
            What the closure returned in the clean pass: the loss at θ, not at θ + ε.

        Raises:
            ValueError: past `total_steps`, or where the schedule gives no probability.
            RuntimeError: if the closure zeroes gradients or leaves none.
        """
        if self.steps >= self.total_steps:
            raise ValueError(
                f"step {self.steps + 1} is past the end of the run: total_steps={self.total_steps}"
            )
        p = self.schedule(self.steps, self.total_steps)
        if not -1e-9 <= p <= 1 + 1e-9:
            raise ValueError(f"the schedule gave p = {p} at step {self.steps}, which is no probability")
        is_sam = uniform(self.seed, self.steps) < p
        self.has_gradient = False
        self.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self._sam_gradient(closure) if is_sam else self._clean_pass(closure)
        self.steps += 1
        self.sam_steps += is_sam
        self.propagations += 1 + is_sam
        self.has_gradient = True
        return loss

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base optimizer's step along `.grad`; with a closure, `gradient(closure)` first.

        Raises:
            RuntimeError: without a closure and without `gradient(closure)` since the last step.
        """
        loss = None if closure is None else self.gradient(closure)
        if not self.has_gradient:
            raise RuntimeError("step() has no gradient: call gradient(closure) before it, or step(closure)")
        self.has_gradient = False
        self.base.step()
        return loss

    def _pass(self, closure: Callable[[], Any]) -> Any:
        """Call the closure, and see that it adds to the gradients rather than zeroing them.

        Looked at in every pass: a plain step would forgive it, a SAM step, hours later perhaps, would not.
        """
        probe = min(self._parameters(), key=Tensor.numel, default=None)
        if probe is None:
            raise RuntimeError("no parameter of the optimizer requires a gradient")
        was_none = probe.grad is None
        if was_none:
            probe.grad = torch.zeros_like(probe)
        with refuse_zeroing(probe) as reached:
            result = closure()
        if was_none and not reached:
            probe.grad = None
        return result

    def _clean_pass(self, closure: Callable[[], Any]) -> Any:
        loss = self._pass(closure)
        if all(p.grad is None for p in self._parameters()):
            raise RuntimeError("the closure left no gradients: it must call backward() on the loss")
        return loss

    def _sam_gradient(self, closure: Callable[[], Any]) -> Any:
        devices = {p.device for p in self._parameters()}
        before = random_state(devices)
        local = hasattr(self.module, "no_sync") and not self.sync_perturbation
        sync = self.module.no_sync() if local else nullcontext()  # type: ignore[union-attr, operator]
        with true_gradient(self.module), sync:
            loss = self._clean_pass(closure)
        after = random_state(devices)
        perturbed = self._write_perturbed()
        self._keep_share_of_clean_gradient()
        set_random_state(before)
        _swap(perturbed)
        try:
            with frozen_batchnorm(self.module):
                self._pass(closure)
        finally:
            _swap(perturbed)
            set_random_state(after)
        if self.gamma != 1:
            torch._foreach_mul_([p.grad for p in self._parameters() if p.grad is not None], self.gamma)
        for p in perturbed:
            if p.grad is None:  # used in the clean pass only, so ∇L(θ + ε) is 0 there
                p.grad = torch.zeros_like(p)
        return loss

    @torch.no_grad()
    def _write_perturbed(self) -> dict[Tensor, Tensor]:
        """θ + ε for each parameter with a gradient, in tensors allocated once: the only extra memory."""
        grads = {p: p.grad for p in self._parameters() if p.grad is not None}
        spares = {p: self._spare(p) for p in grads}
        directions = grads
        if self.adaptive:
            directions = spares
            torch._foreach_copy_(list(spares.values()), list(grads.values()))
            torch._foreach_mul_(list(spares.values()), list(grads))  # ‖θ·g‖ = ‖|θ|·g‖
        norm = get_total_norm(list(directions.values()))
        if self.adaptive:
            torch._foreach_mul_(list(spares.values()), list(grads))
        for group in self.param_groups:
            rho = group.setdefault("rho", self.defaults["rho"])  # a group that the base was given alone
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                of_group = [spares[p] for p in params], params, [directions[p] for p in params]
                _write_sum(*of_group, _divide(rho, norm))
        return spares

    @torch.no_grad()
    def _keep_share_of_clean_gradient(self) -> None:
        """Scale ∇L(θ) so that γ·(what is kept + ∇L(θ + ε)) is the mix: it needs no second buffer."""
        if self.gamma == 1:
            self.zero_grad(set_to_none=True)  # its memory is free for the perturbed pass
            return
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        share = (1 - self.gamma) / self.gamma
        normalized = self.mix == "normalized"
        torch._foreach_mul_(grads, _divide(share, get_total_norm(grads)) if normalized else share)

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"] if p.requires_grad)

    def _spare(self, p: Tensor) -> Tensor:
        spare = self._spares.get(p)
        if spare is None or (spare.shape, spare.dtype, spare.device) != (p.shape, p.dtype, p.device):
            spare = self._spares[p] = torch.empty_like(p.data)
        return spare

    def _follow_base(self) -> None:
        """Share the base's groups and state, also when `load_state_dict` gives it new ones."""

        def share(base: torch.optim.Optimizer) -> None:
            rst = reference()
            if rst is None:
                return
            for old, new in zip(rst.param_groups, base.param_groups, strict=True):
                new.setdefault("rho", old["rho"])  # not in a state that was saved without RST
            rst.param_groups, rst.state = base.param_groups, base.state

        # Weak, as a cycle would keep the memory of a finished run until the garbage collector comes by.
        reference = weakref.ref(self)
        self.base.register_load_state_dict_post_hook(share)
        share(self.base)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not hasattr(self, "base"):  # Optimizer.__init__ lists the base's own groups
            super().add_param_group(param_group)
            return
        param_group.setdefault("rho", self.defaults["rho"])
        _check_rho(param_group["rho"])
        self.base.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # Optimizer's own would leave the base behind in a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_base()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and the counters, under "rst"."""
        counters = {"steps": self.steps, "sam_steps": self.sam_steps, "propagations": self.propagations}
        return {**self.base.state_dict(), "rst": counters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: ValueError if the state is not one of `RST`."""
        if "rst" not in state_dict:
            raise ValueError("this state_dict has no RST counters; load a base optimizer's into `.base`")
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "rst"})
        for counter in ("steps", "sam_steps", "propagations"):
            setattr(self, counter, state_dict["rst"][counter])
        self.has_gradient = False


def _swap(perturbed: dict[Tensor, Tensor]) -> None:
    for parameter, spare in perturbed.items():
        kept = parameter.data
        parameter.data = spare
        perturbed[parameter] = kept
    # An autocast region around the whole step would go on with its low-precision copy of the other weights.
    torch.clear_autocast_cache()


def _write_sum(out: list[Tensor], params: list[Tensor], directions: list[Tensor], scale: Tensor) -> None:
    """out = params + scale·directions; `out` may be `directions`."""
    if all(p.device.type == "cpu" for p in params):
        _write_sum_in_one_pass(out, params, directions, scale)
    else:
        _write_sum_in_few_kernels(out, params, directions, scale)


def _write_sum_in_one_pass(
    out: list[Tensor], params: list[Tensor], directions: list[Tensor], scale: Tensor
) -> None:
    for to, p, direction in zip(out, params, directions, strict=True):
        torch.addcmul(p, direction, scale, out=to)


def _write_sum_in_few_kernels(
    out: list[Tensor], params: list[Tensor], directions: list[Tensor], scale: Tensor
) -> None:
    if out[0] is not directions[0]:
        torch._foreach_copy_(out, directions)
    torch._foreach_mul_(out, scale)
    torch._foreach_add_(out, params)


def _divide(numerator: float, norm: Tensor) -> Tensor:
    """numerator / norm, and 0 for a gradient of norm 0: without a direction there is no perturbation."""
    return torch.where(norm > 0, numerator / norm, 0.0)


def _check_rho(rho: float) -> None:
    if not isinstance(rho, float | Real) or not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number of at least 0, got {rho!r}")


def _resolve_gamma(gamma: float | str, schedule: Schedule, total_steps: int) -> float:
    if gamma == "matched":
        mean = expected_propagations(schedule, total_steps) / total_steps - 1
        if mean <= 0:
            raise ValueError("gamma='matched' is 1 / mean p, and this schedule has mean p = 0")
        return 1 / mean
    if not isinstance(gamma, float | Real) or not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be a finite number above 0, or 'matched', got {gamma!r}")
    return float(gamma)
