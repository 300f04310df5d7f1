"""What the two passes of a SAM step must share, and what only the clean one may change."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def frozen_batchnorm(module: nn.Module | None) -> Iterator[None]:
    """BatchNorm layers in training mode normalise by the batch and leave their running statistics alone.

    May be nested. Setting the momentum to 0 instead would let one nan into the statistics for good.
    """
    layers = [
        layer
        for layer in _modules(module)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.track_running_stats
    ]
    with _set(layers, "track_running_stats", False):
        yield


@contextmanager
def true_gradient(module: nn.Module | None) -> Iterator[None]:
    """Submodules with an attribute `true_gradient` have it True, and what it was before on leaving.

    Such modules compute something else in their backward pass than the derivative of their forward pass,
    unless it is True. May be nested.
    """
    with _set(
        [layer for layer in _modules(module) if hasattr(layer, "true_gradient")], "true_gradient", True
    ):
        yield


def _modules(module: nn.Module | None) -> Iterable[nn.Module]:
    return module.modules() if module is not None else ()


@contextmanager
def _set(layers: Sequence[nn.Module], name: str, value: bool) -> Iterator[None]:
    before = [getattr(layer, name) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, name, value)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            setattr(layer, name, old)


@contextmanager
def refuse_zeroing(parameter: Tensor) -> Iterator[list[bool]]:
    """Raise if the gradient that `parameter` has on entry is zeroed or dropped before backward adds to it.

    Looks at the gradient's identity and version counter just before the first accumulation: no host
    synchronisation, and in-place zeroing is seen too. Yields a list that is empty while backward has not
    reached the parameter.

    Raises:
        RuntimeError: on leaving.
    """
    assert parameter.grad is not None
    # A copy, as a view into DistributedDataParallel's bucket shares its counter with other gradients.
    grad = parameter.grad = parameter.grad.clone()
    version = grad._version

    def is_untouched() -> bool:
        if parameter.grad is grad:
            return grad._version == version
        # DistributedDataParallel moves a gradient into its bucket when it builds its buckets anew.
        return parameter.grad is not None and parameter.grad._is_view()

    seen: list[bool] = []
    handle = parameter.register_hook(lambda _: seen.append(is_untouched()))
    try:
        yield seen
    finally:
        handle.remove()
    if not (seen[0] if seen else is_untouched()):
        raise RuntimeError(
            "the closure must not zero gradients: remove zero_grad() from it, RST.gradient does that itself"
        )


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
