"""Weights moved from θ to θ + ε and back."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

Direction = Callable[[Tensor], Any]  # of a parameter; None where it has none
GRADIENT: Direction = attrgetter("grad")


class Perturbation:
    """Moves parameters to θ + ε, and back bit for bit, with one extra copy of them, allocated once.

    They are overwritten where they are: CUDA graphs, flat buffers and views hold on to a parameter's address.
    """

    def __init__(self) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []

    @contextmanager
    def applied(
        self,
        groups: Sequence[tuple[list[Tensor], float]],
        adaptive: bool,
        layers: Sequence[Any],
        direction: Direction = GRADIENT,
    ) -> Iterator[None]:
        """θ + ε inside, θ after it: ε = ρ g/‖g‖, or ρ |θ|²g/‖|θ|·g‖ where `adaptive`. The norm is over all
        groups and all ranks' shards together.

        Args:
            groups: parameters and their ρ. Those without a g stay where they are.
            layers: those to `reshard`.
            direction: g, the gradient unless given. It is asked for again rather than kept.
        """
        moved = [
            ([p for p in parameters if p.requires_grad and direction(p) is not None], rho)
            for parameters, rho in groups
        ]
        try:
            with torch.no_grad():
                all_of_them = [p for parameters, _ in moved for p in parameters]
                norm = self._norm(all_of_them, adaptive, direction)
                self._keep(all_of_them)
                for parameters, rho in moved:
                    self._apply(parameters, divide(rho, norm), adaptive, direction)
            _drop_copies(layers)
            yield
        finally:
            with torch.no_grad():
                self._revert()
            _drop_copies(layers)

    def _norm(self, parameters: Sequence[Tensor], adaptive: bool, direction: Direction) -> Tensor:
        tensors = [direction(p) for p in parameters]
        if adaptive:
            tensors = [
                p * g if is_sharded(p) else torch.mul(p, g, out=self._copy(p))
                for p, g in zip(parameters, tensors, strict=True)
            ]
        return total_norm(tensors)

    def _keep(self, parameters: list[Tensor]) -> None:
        """Copy them, all before any moves, as some may share memory."""
        if parameters:
            torch._foreach_copy_([self._copy(p) for p in parameters], [local(p) for p in parameters])
        self._moved = parameters  # now that there is something to go back to

    def _apply(
        self, parameters: Sequence[Tensor], scale: Tensor, adaptive: bool, direction: Direction
    ) -> None:
        """θ ← θ + scale·g, or θ + scale·|θ|²·g where `adaptive`. `scale`: a scalar, on any device."""
        for p in parameters:
            theta, step = local(p), local(direction(p), p)
            step = step * theta * theta.conj() if adaptive else step
            theta.addcmul_(step, scale.to(theta.device))

    def _revert(self) -> None:
        if self._moved:
            torch._foreach_copy_([local(p) for p in self._moved], [self._copy(p) for p in self._moved])
        self._moved = []

    def _copy(self, p: Tensor) -> Tensor:
        theta, copy = local(p.detach()), self._copies.get(p)
        if copy is None or (copy.shape, copy.dtype, copy.device) != (theta.shape, theta.dtype, theta.device):
            copy = self._copies[p] = torch.empty_like(theta)
        return copy


def reshard(layers: Sequence[Any]) -> None:
    """Have the next forward pass gather the parameters of these fully_shard's layers from their shards, also
    where the one before was followed by no backward pass and left them gathered."""
    for layer in layers:
        layer.reshard()


def _drop_copies(layers: Sequence[Any]) -> None:
    """Drop copies of the weights: autocast's in low precision, and those that fully_shard has gathered."""
    torch.clear_autocast_cache()
    reshard(layers)


def check_rho(rho: float) -> None:
    if not isinstance(rho, float | Real) or not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number of at least 0, got {rho!r}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as fully_shard and tensor parallelism make them."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor, like: Tensor | None = None) -> Any:
    """This rank's part of a DTensor, laid out as that of `like` where given; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    return (sharded if like is None else sharded.redistribute(placements=like.placements)).to_local()  # type: ignore[attr-defined]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖₂ of all of them together, of DTensors over all ranks."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        by_mesh.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    norms: list[Any] = [get_total_norm(group) for group in by_mesh.values()]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else get_total_norm(norms)


def total_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩ of all of them together, of DTensors over all ranks; of complex numbers its real part."""
    products: list[Any] = [torch.sum(x.conj() * y).real for x, y in zip(a, b, strict=True)]
    products = [x.full_tensor() if is_sharded(x) else x for x in products]
    return torch.stack([x.to(products[0].device) for x in products]).sum()


def divide(numerator: float | Tensor, norm: Tensor) -> Tensor:
    """numerator / norm, and 0 for a gradient of norm 0: without a direction there is no perturbation."""
    return torch.where(norm > 0, numerator / norm, 0.0)
