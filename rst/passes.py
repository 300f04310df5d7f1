"""What the two passes of a SAM step must share, and what only the clean one may change."""

import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.parallel import DistributedDataParallel

from rst.perturbation import divide, is_sharded, local, total_norm

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
    """On leaving, all buffers of `module`, such as BatchNorm's running statistics, are what they were."""
    kept = [
        (layer, name, buffer, buffer.clone() if _is_writable(buffer) else None)
        for layer in _modules(module)
        for name, buffer in layer._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, name, buffer, value in kept:
                if value is not None:
                    buffer.copy_(value)
                layer._buffers[name] = buffer  # some layers put another tensor in its place


def fully_sharded(module: nn.Module | None) -> list[Any]:
    """The layers that fully_shard was applied to."""
    return [layer for layer in _modules(module) if hasattr(layer, "set_reshard_after_backward")]


@contextmanager
def gradients_kept(parameters: Iterable[Tensor]) -> Iterator[None]:
    """On leaving, the parameters' gradients are those from before."""
    # Copies, as DistributedDataParallel may have the next gradients in the same memory.
    kept = [(p, p.grad if p.grad is None else p.grad.clone()) for p in parameters]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in kept:
            p.grad = grad


@contextmanager
def mixed(
    parameters: list[Tensor], gamma: float, mix: str, is_local: bool, finds_unused: bool
) -> Iterator[None]:
    """Of gradients g on entering and g_s computed inside, (1 − γ) g + γ g_s on leaving, where `mix` is
    "normalized" (1 − γ) g/‖g‖ + γ g_s. It needs no buffer: γ·(what is kept of g + g_s) is the mix.

    Args:
        parameters: a gradient that is missing on one side is zero there.
        is_local: see `accumulating`.
        finds_unused: whether DistributedDataParallel finds unused parameters. It needs a gradient of those
            that the clean pass used, even if the perturbed one does not.
    """
    clean = [p for p in parameters if p.grad is not None]
    if gamma == 1:
        for p in clean:
            # Its memory is free for the perturbed pass.
            p.grad = p.grad.zero_() if finds_unused else None  # type: ignore[union-attr]
    else:
        factor = (1 - gamma) / gamma
        grads = [local(p.grad) for p in clean]  # type: ignore[arg-type]
        with torch.no_grad():
            if mix == "normalized":
                scale = divide(factor, total_norm([p.grad for p in clean]))  # type: ignore[misc]
                for grad in grads:
                    grad.mul_(scale.to(grad.device))
            else:
                torch._foreach_mul_(grads, factor)
    with nullcontext() if gamma == 1 else accumulating(parameters, is_local):
        yield
    grads = [p.grad for p in parameters if p.grad is not None]
    require_gradients(grads)
    if gamma != 1:
        with torch.no_grad():
            torch._foreach_mul_([local(grad) for grad in grads], gamma)
    for p in clean:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def require_gradients(grads: list[Tensor]) -> None:
    """Refuse a pass that left none, or sparse ones."""
    if not grads:
        raise RuntimeError(
            "a pass left no gradients: the body of the loop over passes() (or the closure) must call "
            "backward() on the loss"
        )
    if any(grad.is_sparse for grad in grads):
        raise TypeError("RST does not take sparse gradients: make the embedding with sparse=False")


@contextmanager
def accumulating(parameters: list[Tensor], is_local: bool) -> Iterator[None]:
    """On leaving, the gradients are the sum of those on entering and those computed inside, also where
    `zero_grad` is called inside. That is seen when the first gradient of a backward pass arrives.

    Args:
        parameters: a gradient that is missing is zero.
        is_local: whether these gradients still have to be averaged over ranks, together with the new ones.

    Raises:
        RuntimeError: where no gradients are computed inside, or where gradients are zeroed inside and nothing
            can be added afterwards.
    """
    held = {p: (p.grad, versions_of(p.grad)) for p in parameters if p.grad is not None}
    zeroed: set[Tensor] | None = None

    def look(_: object = None) -> None:
        nonlocal zeroed
        if zeroed is None:
            zeroed = {p for p, (grad, versions) in held.items() if _is_zeroed(p, grad, versions[0])}
        else:  # another backward pass of the body
            zeroed |= {p for p in held if p.grad is None}

    handle = register_multi_grad_hook(parameters, look, mode="any")
    try:
        yield
    finally:
        handle.remove()
    if zeroed is None and all(p.grad is g and versions_of(g) == v for p, (g, v) in held.items()):
        raise RuntimeError(
            "the second pass left no gradients: it must call backward() on the loss, as the first did"
        )
    look()  # now, where no hook was called: with fully_shard, gradients do not arrive at the parameters
    for p in zeroed or ():
        grad, versions = held[p]
        if is_local or p.grad is grad or versions_of(grad) != versions:
            raise RuntimeError(
                "the second pass adds to the gradients of the first, as gamma is not 1, but they were zeroed "
                "in place (set_to_none=False), after another backward() or under DistributedDataParallel: "
                "remove zero_grad() from the loop over passes() or from the closure"
            )
        with torch.no_grad():
            p.grad = grad if p.grad is None else p.grad.add_(grad)


@torch.compiler.disable  # in a compiled backward pass, versions are not what they are
def _is_zeroed(p: Tensor, grad: Tensor | None, version: int) -> bool:
    """Whether `grad` of that version was zeroed, or set to None, since it was the gradient of p."""
    if p.grad is grad:
        return grad is not None and grad._version != version  # fully_shard adds to its local tensor
    return p.grad is None or is_sharded(p)  # DistributedDataParallel moves gradients into a bucket


def versions_of(tensor: Tensor | None) -> tuple[int, int]:
    """Count the changes in place, of a DTensor those of itself and of its local tensor."""
    return tensor._version, local(tensor)._version  # type: ignore[arg-type, union-attr]


def mark_as_spent(grads: Iterable[Tensor]) -> None:
    """A step has used them. They may stay in `.grad`, and what is added to them is still noticed."""
    for grad in grads:
        grad.spent = versions_of(grad)  # type: ignore[attr-defined]


def unspent(grads: Iterable[Tensor]) -> list[Tensor]:
    """Of `grads`, those that no step has used, or that were added to since."""
    return [grad for grad in grads if getattr(grad, "spent", None) != versions_of(grad)]


def refuse_to_drop(grads: Iterable[Tensor], has_gradient: bool) -> None:
    """Raises RuntimeError before a step that would lose some of `grads`.

    Args:
        has_gradient: whether they are those of a step that was not taken.
    """
    unused = unspent(grads)
    if not unused:  # after a step; what follows waits for the device
        return
    norm = total_norm(unused)  # on every rank the same
    if norm == 0 or (has_gradient and not norm.isfinite()):  # GradScaler has skipped it
        return
    if has_gradient:
        raise RuntimeError(
            "passes() was called again before step(): to accumulate gradients, loop over the "
            "micro-batches within one loop over passes(); to leave a step out, call zero_grad()"
        )
    raise RuntimeError(
        "passes() would drop gradients that were computed or changed outside it: call backward() in the "
        "loop over passes(), also to accumulate micro-batches, or drop them by zero_grad()"
    )


def refuse_to_step(grads: Iterable[Tensor], has_gradient: bool) -> None:
    """Raises RuntimeError where `grads` are not those of a step, which is yet to be taken: `has_gradient`."""
    unused = unspent(grads)
    if not unused:
        raise RuntimeError(
            "step() has no gradient: loop over passes() to the end before it, or call step(closure)"
        )
    # Zero gradients are how torch.distributed.checkpoint has an optimizer set up its state.
    if not has_gradient and total_norm(unused) != 0:
        raise RuntimeError(
            "step() was called after a backward() outside a loop over passes(), or within the loop: call "
            "backward() in the loop, and step() after it"
        )


def require_same_coins(module: Any, parameters: Iterable[Tensor], state: dict[str, Any]) -> None:
    """Raises ValueError on all ranks of DistributedDataParallel, or of the DTensors' meshes, if they do not
    have the same coin: they would average gradients at θ with gradients at θ + ε, or wait for ever."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    meshes = list(dict.fromkeys(p.device_mesh for p in parameters if is_sharded(p)))  # type: ignore[attr-defined]
    if isinstance(module, DistributedDataParallel):
        groups, device = [module.process_group], next(module.parameters()).device
    elif meshes:
        groups, device = [group for mesh in meshes for group in mesh.get_all_groups()], meshes[0].device_type
    else:
        return
    coin = {name: state[name] for name in ("steps", "total_steps", "seed", "schedule")}
    number = zlib.crc32(repr(coin).encode())
    largest = torch.tensor([number, -number], device=device)
    for group in groups:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    if largest.sum() != 0:
        raise ValueError(f"the ranks must take the same SAM steps, but do not agree in all of these: {coin}")


def can_skip_averaging(module: Any, parameters: Iterable[Tensor], has_others: bool) -> bool:
    """Whether `module.no_sync()` may leave the clean pass's gradients to each rank.

    Args:
        parameters: those of RST's optimizers.
        has_others: whether `module` has trainable parameters that no optimizer of RST's has.

    Raises:
        ValueError: where that would go wrong.
    """
    if not hasattr(module, "no_sync"):
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1 and not any(map(is_sharded, parameters)):
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


def check_module(module: nn.Module | None) -> None:
    """Raises TypeError for what is no model, ValueError for a model that RST cannot train."""
    if not isinstance(module, nn.Module | None):
        raise TypeError(f"module must be an nn.Module (of several models, nn.ModuleList), got {module!r}")
    for layer in _modules(module):
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise ValueError("RST does not take sparse gradients: make the embedding with sparse=False")
        if type(layer).__name__ == "FullyShardedDataParallel":
            raise ValueError("RST works with fully_shard (FSDP2), not with FullyShardedDataParallel (FSDP1)")


def devices_of(parameters: Iterable[Tensor], module: Any) -> set[torch.device]:
    """Where a pass computes: where the parameters are, and `nn.DataParallel`'s replicas of them."""
    replicas = module.device_ids if isinstance(module, nn.DataParallel) else ()
    return {p.device for p in parameters if not p.is_meta} | {torch.device(device) for device in replicas}


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


def _is_writable(tensor: Tensor) -> bool:
    """Not if made under `torch.inference_mode`, or if some elements share memory, as `expand` makes them."""
    expanded = tensor.layout == torch.strided and any(
        size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return not (expanded or tensor.is_inference())


def _modules(module: nn.Module | None) -> Iterable[nn.Module]:
    return module.modules() if module is not None else ()
