"""RST in timm: for `create_optimizer_v2(model, "rst", ...)`, and a loss scaler for its training script."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor

from rst.optim import RST
from rst.schedule import Linear

OPTIONS = [name for name in inspect.signature(RST).parameters if name != "base"]


def register() -> None:
    """Let timm create RST by the name "rst":

        create_optimizer_v2(model, "rst", lr=1e-3, weight_decay=0.05,
                            base="adamw", schedule=Linear(0.0, 1.0), total_steps=total_steps, rho=0.05)

    with `base`, timm's name of the base optimizer, and RST's arguments. On a command line,

        --opt rst --opt-kwargs base=adamw "schedule=(0,1)" total_steps=93750 rho=0.05

    where a pair (start, end) stands for `Linear(start, end)`. After the model is wrapped, if it is, set
    `optimizer.module = model`.
    """
    default_registry.register(
        OptimInfo(
            "rst",
            _create,  # type: ignore[arg-type]  # called as a class would be
            "Randomized Sharpness-Aware Training",
            has_eps=True,
            has_momentum=True,
            has_betas=True,
        )
    )


def _create(params: Any, base: str = "sgd", **options: Any) -> RST:
    of_rst = {name: options.pop(name) for name in OPTIONS if name in options}
    if isinstance(of_rst.get("schedule"), tuple):
        of_rst["schedule"] = Linear(*of_rst["schedule"])
    return RST(create_optimizer_v2(params, base, **options), **of_rst)


class LossScaler(NativeScaler):
    """Takes the place of `NativeScaler` in timm's training script, with the function that computes the loss
    instead of the loss:

        loss = loss_scaler(_forward, optimizer, clip_grad=args.clip_grad, parameters=model_parameters(model))

    It calls the function once or twice, unscales and clips the step's gradient, makes the step and returns
    what the function returned in the clean pass. If it returns a tuple, as in newer timm scripts
    (`_loss, result`), the first element is the loss.

    Args:
        device: type of the device.
        enabled: whether losses are scaled, which float16 needs. Unlike with `NativeScaler` it is used anyway.

    Raises:
        TypeError: for a loss that was computed already.
        ValueError: for `need_update=False`, and where `optimizer.module` was not set, which the statistics of
            BatchNorm need.
    """

    def __init__(self, device: str = "cuda", enabled: bool = True) -> None:
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)

    def __call__(
        self,
        loss: Callable[[], Tensor | tuple[Any, ...]],
        optimizer: RST,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> Any:
        if not callable(loss):
            raise TypeError("RST may need the loss twice: pass the function that computes it, _forward")
        if not need_update:
            raise ValueError("RST needs all micro-batches of a step at once: use --grad-accum-steps 1")
        if optimizer.module is None:
            raise ValueError("set optimizer.module = model, after the model was wrapped")

        def closure() -> Any:
            returned = loss()
            value, *more = returned if isinstance(returned, tuple) else (returned,)
            self._scaler.scale(value).backward(create_graph=create_graph)
            return (value.detach(), *more) if more else value.detach()

        value = optimizer.gradient(closure)
        if clip_grad is not None:
            self._scaler.unscale_(optimizer)
            dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
        self._scaler.step(optimizer)
        self._scaler.update()
        if optimizer.has_gradient:  # the step was skipped, and clipping by value may hide the overflow
            optimizer.zero_grad()
        return value
