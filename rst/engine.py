"""The training loop: epochs of steps, each one call of `RST.gradient` and one of `step`."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rst.data import Augment, ImageData, steps_per_epoch, test_batches, train_batches
from rst.device import PRECISIONS
from rst.draws import draw
from rst.optim import RST


class _L2(torch.autograd.Function):
    """Zero, with gradient l2·θ: the term ½·l2·‖θ‖² of the loss without the cost of its value.

    In the loss rather than in the optimizer, it is part of ε, of both gradients and of the clip norm, is
    scaled with the loss under fp16, and is there before DistributedDataParallel averages.
    """

    @staticmethod
    def forward(ctx: Any, l2: float, *parameters: Tensor) -> Tensor:
        ctx.l2 = l2
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, *torch._foreach_mul(ctx.saved_tensors, gradient * ctx.l2)


class Training:
    """One run's model, optimizer and data, and the epochs over them.

    Args:
        model: on its device.
        optimizer: an `RST` over the model's parameters.
        lr_factor: progress in [0, 1] → factor on the learning rate, per step.
        data: on the same device.
        l2: coefficient of ½·l2·‖θ‖² in the loss, over all parameters.
        clip_norm: global norm that the final gradient is clipped to, or None.
        precision: "fp32", "bf16" or "fp16" (autocast; fp16 with loss scaling).

    Attributes:
        metrics: one dict an epoch so far; with the state in `state_dict`, all there is to resume.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: RST,
        lr_factor: Callable[[float], float],
        data: ImageData,
        augment: Augment,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        l2: float = 0.0,
        clip_norm: float | None = None,
        precision: str = "fp32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if precision == "fp16" and optimizer.mix == "normalized":
            raise ValueError(
                "method.mix=normalized does not commute with fp16's loss scaling; use bf16 or fp32"
            )
        if l2 < 0:
            raise ValueError(f"l2 must be at least 0, got {l2}")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, or null for no clipping, got {clip_norm}")
        self.model, self.optimizer, self.data, self.augment = model, optimizer, data, augment
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.l2, self.clip_norm, self.dtype = l2, clip_norm, PRECISIONS[precision]
        self.device = data.train_images.device
        self.steps_per_epoch = steps_per_epoch(data, batch_size)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr_factor = lr_factor
        self.initial_lrs = [group["lr"] for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.metrics: list[dict[str, Any]] = []
        _, channels, height, width = data.train_images.shape
        augment.check(channels, height, width, batch_size, not isinstance(data.train_images, Tensor))

    def run(self, on_step: Callable[[], object] = lambda: None) -> Iterator[dict[str, Any]]:
        """Train the epochs that are left, yielding each one's metrics (times in seconds, loss in nats).

        Raises:
            FloatingPointError: after an epoch with a loss that is not finite, naming the step.
        """
        advice = "the checkpoint of the epoch before is kept: try a smaller optimizer.lr or method.rho"
        for epoch in range(len(self.metrics), self.epochs):
            metrics = {
                "epoch": epoch + 1,
                **self._train_epoch(epoch, on_step),
                **self._evaluate(),
            }
            if (bad_step := metrics.pop("first_bad_step")) >= 0:
                raise FloatingPointError(
                    f"the loss is not finite at step {bad_step} (epoch {epoch + 1}); {advice}"
                )
            if not math.isfinite(metrics["test_loss"]):
                raise FloatingPointError(f"the test loss is not finite after epoch {epoch + 1}; {advice}")
            self.metrics.append(metrics)
            yield metrics

    def _train_epoch(self, epoch: int, on_step: Callable[[], object]) -> dict[str, Any]:
        self.model.train()
        # Sums stay on the device: reading them at every step would stall a GPU.
        loss_sum = torch.zeros((), device=self.device)
        n_correct = torch.zeros((), device=self.device, dtype=torch.int64)
        first_bad = torch.full((), -1, device=self.device, dtype=torch.int64)
        batches = train_batches(self.data, self.batch_size, self.augment, self.seed, epoch)
        started, waited = time.perf_counter(), 0.0
        for index in range(self.steps_per_epoch):
            asked = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - asked
            step = epoch * self.steps_per_epoch + index
            loss, logits = self._step(images, labels, step)
            loss_sum += loss
            # Of mixed labels, the image's own: it has at least half of the weight.
            own = labels if labels.ndim == 1 else labels.argmax(1)
            n_correct += (logits.argmax(1) == own).sum()
            first_bad = torch.where((first_bad < 0) & ~loss.isfinite(), step, first_bad)
            on_step()
        bad_step = int(first_bad)  # waits for the device, so the time is the epoch's
        elapsed = time.perf_counter() - started
        n_images = self.steps_per_epoch * self.batch_size
        return {
            "first_bad_step": bad_step,
            "lr": self.optimizer.param_groups[0]["lr"],  # of the last step
            "steps": self.optimizer.steps,
            "sam_steps": self.optimizer.sam_steps,
            "propagations": self.optimizer.propagations,
            "train_loss": float(loss_sum) / self.steps_per_epoch,
            "train_accuracy": int(n_correct) / n_images,
            "images": n_images,
            "seconds_train": elapsed - waited,
            "seconds_data": waited,
        }

    def _step(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One step; returns loss and logits of the clean pass."""
        passes = []

        def closure() -> Tensor:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels)
            passes.append((loss.detach(), logits.detach()))
            if self.l2:
                loss = loss + _L2.apply(self.l2, *self.parameters)
            self.scaler.scale(loss).backward()
            return passes[0][0]

        factor = self.lr_factor(step / (self.epochs * self.steps_per_epoch))
        for group, initial_lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = initial_lr * factor
        torch.manual_seed(draw(self.seed, "model", step))  # dropout and the like
        self.optimizer.gradient(closure)
        self.scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return passes[0]

    @torch.inference_mode()
    def _evaluate(self) -> dict[str, Any]:
        self.model.eval()
        started = time.perf_counter()
        loss_sum = torch.zeros((), device=self.device)
        n_correct = torch.zeros((), device=self.device, dtype=torch.int64)
        for images, labels in test_batches(self.data, self.batch_size):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                logits = self.model(images)
                loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            n_correct += (logits.argmax(1) == labels).sum()
        n_images = len(self.data.test_labels)
        return {
            "test_loss": float(loss_sum) / n_images,
            "test_accuracy": int(n_correct) / n_images,
            "seconds_evaluate": time.perf_counter() - started,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; what is random needs nothing (see `rst.draws`)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.metrics = state["metrics"]
