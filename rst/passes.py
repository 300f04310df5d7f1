"""What the two passes of a SAM step must share, and what only the clean one may change."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rst.perturbation import is_sharded, local

NOT_THE_WRAPPER = (
    "RST's module is not the DistributedDataParallel wrapper, so a SAM step averages gradients twice, as "
    "with sync_perturbation=True: set optimizer.module to the wrapper"
)


@contextmanager
def true_gradient(module: nn.Module | None) -> Iterator[None]:
    """Submodules with an attribute `true_gradient` have it True, and what it was before on leaving.

    Such modules compute something else in their backward pass than the derivative of their forward pass,
    unless it is True. May be nested.
    """
    layers: list[nn.Module] = [layer for layer in _modules(module) if hasattr(layer, "true_gradient")]
    before = [layer.true_gradient for layer in layers]
    try:
        for layer in layers:
            layer.true_gradient = True  # type: ignore[assignment]
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.true_gradient = old


@contextmanager
def buffers_kept(module: nn.Module | None) -> Iterator[None]:
    """On leaving, all buffers of `module`, such as BatchNorm's running statistics, are as they were before.

    DistributedDataParallel may give every rank the buffers of rank 0 at the start of a pass. Those stay.
    """
    kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    @torch.no_grad()
    def keep(*_: object) -> None:
        if begun:
            begun.pop().remove()
        kept[:] = [
            (layer, name, buffer, buffer.clone())
            for layer in _modules(module)
            for name, buffer in layer._buffers.items()
            if buffer is not None
        ]

    begun: list[torch.utils.hooks.RemovableHandle] = []
    keep()
    if isinstance(module, DistributedDataParallel):
        begun.append(module.module.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        while begun:
            begun.pop().remove()
        with torch.no_grad():
            for layer, name, buffer, value in kept:
                buffer.copy_(value)
                layer._buffers[name] = buffer  # some layers put another tensor in its place


@contextmanager
def gradients_kept(parameters: Iterable[Tensor]) -> Iterator[None]:
    """On leaving, the parameters' gradients are those from before."""
    kept = [(p, p.grad) for p in parameters]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in kept:
            p.grad = grad


@contextmanager
def accumulating(parameters: list[Tensor], is_local: bool) -> Iterator[None]:
    """On leaving, the gradients are the sum of those on entering and those computed inside, also where
    `zero_grad` is called inside. That is seen when the first gradient of one parameter arrives.

    Args:
        parameters: all have a gradient.
        is_local: whether these gradients still have to be averaged over ranks, together with the new ones.

    Raises:
        RuntimeError: where gradients were zeroed inside, and nothing can be added afterwards.
    """
    if not parameters:
        yield
        return
    held = [(p, p.grad, _version(p.grad)) for p in parameters]
    probe, of_probe, version = min(held, key=lambda each: each[0].numel())
    zeroed: list[bool] = []

    def look(_: Tensor) -> None:
        grad = probe.grad  # DistributedDataParallel may have moved it into a bucket, but not dropped it
        zeroed.append(grad is None or (grad is of_probe and _version(grad) != version))

    handle = probe.register_hook(look)
    try:
        yield
    finally:
        handle.remove()
    if all(p.grad is grad and _version(grad) == version for p, grad, version in held):
        raise RuntimeError(
            "the second pass left no gradients: it must call backward() on the loss, as the first did"
        )
    if not (zeroed[0] if zeroed else probe.grad is not of_probe):
        return
    if is_local or probe.grad is of_probe:
        way = "under DistributedDataParallel" if is_local else "with set_to_none=False"
        raise RuntimeError(
            f"gradients were zeroed {way} in the second pass, which adds to those of the first unless gamma "
            "is 1: remove zero_grad() from the loop over passes() or from the closure"
        )
    for p, grad, _ in held:
        p.grad = grad if p.grad is None else p.grad.add_(grad)  # type: ignore[arg-type]


def _version(tensor: Tensor | None) -> int:
    """Counts the changes in place."""
    return local(tensor)._version  # type: ignore[arg-type]


def can_skip_averaging(module: Any, has_others: bool) -> bool:
    """Whether `module.no_sync()` may leave the clean pass's gradients to each rank.

    Args:
        has_others: whether `module` has trainable parameters that no optimizer of RST's has.

    Raises:
        ValueError: where that would go wrong.
    """
    if not hasattr(module, "no_sync"):
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            sharded = module is not None and any(map(is_sharded, module.parameters()))
            if not sharded:
                warnings.warn(NOT_THE_WRAPPER, stacklevel=2)
        return False
    if getattr(module, "static_graph", False):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) cannot leave a pass out of its averaging: use "
            "static_graph=False or RST(sync_perturbation=True)"
        )
    if has_others:
        raise ValueError(
            "the module has trainable parameters that are in no base: under DistributedDataParallel give RST "
            "all optimizers, RST([base, other], ...), or freeze these parameters"
        )
    return True


RandomState = dict[torch.device, Tensor]


def random_state(devices: Iterable[torch.device]) -> RandomState:
    """State of the default generators of the CPU and of `devices`, read without waiting for a device."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in set(devices) - states.keys():
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(states: RandomState) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def _modules(module: nn.Module | None) -> Iterable[nn.Module]:
    return module.modules() if module is not None else ()
