"""RST in Lightning's Trainer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from types import MethodType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rst.optim import RST


class RSTCallback(Callback):
    """What Lightning's Trainer needs for an RST: `Trainer(callbacks=[RSTCallback()])`.

        class Classifier(LightningModule):
            def configure_optimizers(self):
                base = torch.optim.SGD(self.parameters(), lr=0.1)
                return RST(base, Linear(0.0, 1.0), total_steps=self.trainer.estimated_stepping_batches)

    Lightning unscales and clips gradients wherever a closure ends, so after each pass. With this callback it
    does so once, to the step's gradient, and calls `on_before_optimizer_step` once. `training_step` runs once
    or twice a step; `log` and what `training_step` returns are the clean pass's. (Metric objects that it
    updates see both passes.) `global_step` counts steps. The RST's `module` becomes the model, wrapped in
    DistributedDataParallel where it is.

    With manual optimization:

        optimizer = self.optimizers()
        for _ in optimizer.passes():
            self.manual_backward(...)
        optimizer.step()

    Raises:
        ValueError: when training begins, where `configure_optimizers` returned no RST, with
            `accumulate_grad_batches`, with strategies that make the step themselves (DeepSpeed), and for a
            model that RST cannot train.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, RST)]
        if not optimizers:
            raise ValueError("RSTCallback needs configure_optimizers to return an RST")
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "RST needs all micro-batches of a step at once: instead of accumulate_grad_batches use "
                "larger batches, automatic_optimization=False and a loop over their parts in passes()"
            )
        if trainer.strategy.handles_gradient_accumulation:
            name = type(trainer.strategy).__name__
            raise ValueError(f"RST does not work with {name}: use 'ddp' or ModelParallelStrategy")
        for optimizer in optimizers:
            optimizer.module = trainer.strategy.model
            self._replace(optimizer, "step", _without_passes(optimizer))
        if pl_module.automatic_optimization:
            step = partial(_after_passes, pl_module, pl_module.optimizer_step)
            self._replace(pl_module, "optimizer_step", wraps(pl_module.optimizer_step)(step))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._undo.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo.close()

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._undo.enter_context(_replaced(owner, name, function))


class _SkippedError(Exception):
    """`training_step` returned None: no step for this batch."""


def _after_passes(
    module: LightningModule,
    optimizer_step: Callable[..., None],
    epoch: int,
    batch_idx: int,
    optimizer: Any,
    closure: Any,
) -> None:
    """`LightningModule.optimizer_step`, whose closure has run as often as RST wants it."""
    results: list[Any] = []
    if optimizer.optimizer.has_gradient:  # the last step was skipped, and clipping by value may hide why
        optimizer.optimizer.zero_grad()

    def propagate() -> Any:
        with _replaced(module, "log", _nothing if results else module.log):
            loss = closure()
        results.append(closure.consume_result())
        if loss is None:
            raise _SkippedError
        return loss

    with _replaced(module, "optimizer_zero_grad", _nothing):  # RST does that itself
        try:
            loss = optimizer.optimizer.gradient(propagate)
        except _SkippedError:
            optimizer_step = _nothing
    closure._result = results[0]
    optimizer_step(epoch, batch_idx, optimizer, lambda: loss)


def _without_passes(optimizer: RST) -> Callable[..., Any]:
    """`RST.step` for a closure that only unscales, clips and calls hooks."""
    step = optimizer.step

    @wraps(step)  # learning-rate schedulers have left a mark on it
    def step_after(_: RST, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure else None
        step()
        return loss

    return MethodType(step_after, optimizer)  # schedulers made in training wrap the function of a method


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
