"""The training loop: epochs of steps, each one call of `RST.gradient` and one of `step`."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rst.data import Augment, ImageData, evaluation_batches, steps_per_epoch, train_batches
from rst.draws import draw
from rst.optim import RST
from rst.training import distributed
from rst.training.calibration import cross_fitted_loss
from rst.training.device import PRECISIONS
from rst.training.guard import ADVICE, Guard


class _L2(torch.autograd.Function):
    """Zero, with gradient l2·θ: the term ½·l2·‖θ‖² of the loss without the cost of computing its value.

    In the loss rather than in the optimizer, it is part of ε, of both gradients and of the clip norm, scales
    with the loss under fp16, and is in place before DistributedDataParallel averages.
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
    """A run's model, optimizer and data, and the epochs over them.

    Of several ranks (`rst.training.distributed`) each takes its share of every batch and of the test images.

    Args:
        model: on its device; with several ranks, in DistributedDataParallel.
        optimizer: an `RST` over the model's parameters.
        lr_factor: factor on the learning rate of each step, as a function of progress in [0, 1].
        data: on the same device.
        batch_size: images per step, over all ranks.
        l2: coefficient of ½·l2·‖θ‖² in the loss, over all parameters.
        clip_norm: global norm to which the final gradient is clipped, or None.
        precision: "fp32", "bf16" or "fp16" (autocast; fp16 with loss scaling). "tf32" is fp32 here:
            `rst.training.device.allow_tf32` makes the difference.
        grad_accumulation: parts in which a batch is propagated, one after the other, to save memory.
            BatchNorm then normalises each part by itself.
        evaluate_every: epochs from one evaluation to the next; the last epoch is always evaluated.

    Attributes:
        metrics: a dict for each epoch so far.
        guard: raises when a number is no longer finite; `guard.stopping` says whether to end here, on all
            ranks after the same step.

    Raises:
        ValueError: settings that contradict each other, or do not fit the data or the number of ranks.
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
        grad_accumulation: int = 1,
        evaluate_every: int = 1,
    ) -> None:
        if precision == "fp16" and optimizer.mix == "normalized":
            raise ValueError(
                "method.mix=normalized does not commute with fp16's loss scaling; use bf16 or fp32"
            )
        self.rank, self.ranks = distributed.rank(), distributed.ranks()
        if self.ranks > 1 and batch_size % (2 * self.ranks):
            raise ValueError(
                f"batch_size={batch_size} must be divisible by {2 * self.ranks}, twice the number of ranks"
            )
        if batch_size // self.ranks % grad_accumulation:
            raise ValueError(
                f"grad_accumulation must divide the {batch_size // self.ranks} images of a batch on each "
                f"rank, got {grad_accumulation}"
            )
        self.model, self.optimizer, self.data, self.augment = model, optimizer, data, augment
        self.network: Any = model.module if self.ranks > 1 else model
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.l2, self.clip_norm, self.dtype = l2, clip_norm, PRECISIONS[precision]
        self.grad_accumulation, self.evaluate_every = grad_accumulation, evaluate_every
        self.device = data.train_images.device
        self.steps_per_epoch = steps_per_epoch(data, batch_size)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr_factor = lr_factor
        self.initial_lrs = [group["lr"] for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        if hasattr(optimizer, "scaler"):  # a rule in which the scale does not cancel
            optimizer.scaler = self.scaler
        self.metrics: list[dict[str, Any]] = []
        self.guard = Guard(self.device, self.scaler.is_enabled(), self.steps_per_epoch)
        # torch.manual_seed formats a stack trace for each kind of device that is not there: 0.1 ms per step.
        on_cpu = self.device.type == "cpu"
        self._seed_generators = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
        self._begin_epoch()
        _, channels, height, width = data.train_images.shape
        augment.check(channels, height, width, batch_size, not isinstance(data.train_images, Tensor))

    def _begin_epoch(self) -> None:
        self._done = 0  # steps of the epoch
        # Sums of losses and of correct answers, on the device: to read them at every step would stall a GPU.
        self._sums = torch.zeros(2, dtype=self._sum_dtype, device=self.device)
        self._seconds_train = self._seconds_data = 0.0

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    def run(self, stop: Callable[[], bool] = lambda: False) -> Generator[dict[str, Any] | None, None, None]:
        """Train what is left of the run.

        Yields None after each step and after each batch of an evaluation, and the metrics after each epoch:
        times in seconds, losses in nats, test metrics where the epoch is evaluated. At each of these points
        the run can be saved and left.

        Args:
            stop: called before each of these points; once it returns True on any rank, `guard.stopping` is
                True.

        Raises:
            FloatingPointError: a loss, gradient norm or weight is not finite: before the optimizer's step; on
                a GPU, which would have to wait, before the next one.
        """
        while len(self.metrics) < self.epochs:
            yield from self._train_epoch(stop)
            self._settle()
            epoch = len(self.metrics) + 1
            metrics = {"epoch": epoch, **self._train_metrics()}
            if epoch % self.evaluate_every == 0 or epoch == self.epochs:
                metrics |= yield from self._evaluate(stop, epoch)
            self.metrics.append(metrics)
            self._begin_epoch()
            yield metrics

    def _train_epoch(self, stop: Callable[[], bool]) -> Iterator[None]:
        self.model.train()
        epoch = len(self.metrics)
        arguments = self.data, self.batch_size, self.augment, self.seed, epoch, self._done
        with closing(train_batches(*arguments, self.rank, self.ranks)) as batches:
            while self._done < self.steps_per_epoch:
                asked = time.perf_counter()
                images, labels = next(batches)
                begun = time.perf_counter()
                self._step(images, labels, epoch * self.steps_per_epoch + self._done, stop)
                self._done += 1
                self._seconds_data += begun - asked
                self._seconds_train += time.perf_counter() - begun
                yield

    def _settle(self) -> None:
        begun = time.perf_counter()
        self.guard.settle()
        self._seconds_train += time.perf_counter() - begun

    def _train_metrics(self) -> dict[str, Any]:
        loss_sum, n_correct = self._sums.tolist()
        n_images = self.steps_per_epoch * self.batch_size
        return {
            "lr": self.optimizer.param_groups[0]["lr"],  # of the last step
            "steps": self.optimizer.steps,
            "sam_steps": self.optimizer.sam_steps,
            "propagations": self.optimizer.propagations,
            "skipped_steps": self.guard.skipped,
            "train_loss": loss_sum / self.steps_per_epoch,
            "train_accuracy": n_correct / n_images,
            "images": n_images,
            "seconds_train": self._seconds_train,
            "seconds_data": self._seconds_data,
        }

    def _step(self, images: Tensor, labels: Tensor, step: int, stop: Callable[[], bool]) -> None:
        passes: list[list[tuple[Tensor, Tensor]]] = []  # loss and logits of each part of the batch
        size = len(images) // self.grad_accumulation

        def closure() -> None:
            passes.append([])
            n = self.optimizer.images(len(images))
            parts = list(zip(images[:n].split(size), labels[:n].split(size), strict=True))
            for i, (x, y) in enumerate(parts):
                is_last = i == len(parts) - 1
                with self._local_unless(is_last):
                    with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                        logits = self.model(x)
                        loss = F.cross_entropy(logits, y) / (n / len(x))
                    passes[-1].append((loss.detach(), logits.detach()))
                    if self.l2 and is_last:
                        loss = loss + _L2.apply(self.l2, *self.parameters)
                    self.scaler.scale(loss).backward()

        factor = self.lr_factor(step / (self.epochs * self.steps_per_epoch))
        for group, initial_lr in zip(self.optimizer.param_groups, self.initial_lrs, strict=True):
            group["lr"] = float(initial_lr * factor)
        # For dropout and the like; each rank has its own stream.
        self._seed_generators(draw(self.seed, "model", self.rank * self.optimizer.total_steps + step))
        self.optimizer.gradient(closure)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        gradient_norm = get_total_norm(gradients)
        if self.clip_norm is not None:
            clip_grads_with_norm_(self.parameters, self.clip_norm, gradient_norm)
        loss = torch.stack([loss for loss, _ in passes[0]]).sum()
        answers = torch.cat([logits for _, logits in passes[0]]).argmax(1)
        # Of mixed labels, the image's own one has at least half of the weight.
        unmixed = labels if labels.ndim == 1 else labels.argmax(1)
        n_correct = (answers == unmixed[: len(answers)]).sum() * (len(labels) / len(answers))
        with torch.no_grad():
            weight_norm = get_total_norm(self.parameters)
        stop_here = torch.full((), float(stop()), device=self.device)  # a kernel, not a copy that waits
        numbers = [loss / self.ranks, n_correct, gradient_norm, weight_norm, stop_here]
        summed = distributed.sum_over_ranks(torch.stack([x.to(self._sum_dtype) for x in numbers]))
        self._sums += summed[:2]
        self.guard.check(summed, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.guard.count(self.optimizer.has_gradient, step)  # left there when the scaler skips the step

    def _local_unless(self, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients go to the other ranks after the last of several backward passes only."""
        return self.model.no_sync() if self.ranks > 1 and not is_last else nullcontext()  # type: ignore[operator]

    def _evaluate(self, stop: Callable[[], bool], epoch: int) -> Generator[None, None, dict[str, Any]]:
        """The test metrics; after the last epoch, also the loss at the right temperature."""
        distributed.share_buffers(self.network)
        self.network.eval()
        sums = torch.zeros(2, dtype=self._sum_dtype, device=self.device)
        seconds = 0.0
        batch_size, n_images = self.batch_size // self.ranks, len(self.data.test_labels)
        n_batches = math.ceil(math.ceil(n_images / self.ranks) / batch_size)  # on the rank with the most
        kept: list[Tensor] = []  # logits of this rank's images
        with closing(evaluation_batches(self.data, batch_size, self.rank, self.ranks)) as batches:
            for _ in range(n_batches):
                begun = time.perf_counter()
                if (batch := next(batches, None)) is not None:
                    logits, of_batch = self._evaluate_batch(*batch)
                    sums += of_batch.to(sums)
                    kept += [logits] * (epoch == self.epochs)
                self.guard.stopping = distributed.any_rank(stop(), self.device)
                seconds += time.perf_counter() - begun
                yield
        begun = time.perf_counter()
        loss_sum, n_correct = distributed.sum_over_ranks(sums).tolist()
        metrics = {"test_loss": loss_sum / n_images, "test_accuracy": n_correct / n_images}
        if not math.isfinite(metrics["test_loss"]):
            raise FloatingPointError(f"the test loss is not finite after epoch {epoch}; {ADVICE}")
        if epoch == self.epochs and n_images > 1:
            everyones = self._of_all_ranks(kept, n_images).numpy(force=True)
            labels = self.data.test_labels.numpy(force=True)
            if (calibrated := cross_fitted_loss(everyones, labels)) is not None:
                metrics["calibrated_test_loss"] = calibrated
        return metrics | {"seconds_evaluate": seconds + time.perf_counter() - begun}

    def _of_all_ranks(self, kept: list[Tensor], n_images: int) -> Tensor:
        """The logits of all test images in order, from those that each rank kept, [n_images, classes]."""
        positions = torch.arange(n_images).tensor_split(self.ranks)[self.rank].to(self.device)
        logits = torch.zeros(n_images, len(self.data.classes), device=self.device)
        if kept:
            logits[positions] = torch.cat(kept).float()
        return distributed.sum_over_ranks(logits)

    @torch.inference_mode()
    def _evaluate_batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits; sum of the losses, and number of correct answers."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        return logits, torch.stack([loss, (logits.argmax(1) == labels).sum().to(loss)])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs. Random numbers need no state (see `rst.draws`).

        Raises:
            FloatingPointError: a weight is not finite.
        """
        self._settle()
        if not math.isfinite(get_total_norm([p.detach() for p in self.parameters])):
            raise FloatingPointError(
                f"a weight is not finite after step {self.optimizer.steps - 1}; {ADVICE}"
            )
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "data": self._data_facts(),
            "skipped": [self.guard.skipped, self.guard.skipped_in_a_row],
            "metrics": self.metrics,
            "epoch": {
                "steps": self._done,
                "sums": self._sums.tolist(),
                "seconds": [self._seconds_train, self._seconds_data],
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the data have changed since."""
        data = self._data_facts()
        if state.get("data", data) != data:  # older checkpoints have none
            raise ValueError(
                "the data are not those that the run began with: put them back, or remove the run's folder"
            )
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.guard.skipped, self.guard.skipped_in_a_row = state["skipped"]
        self.metrics = state["metrics"]
        epoch = state["epoch"]
        self._done = epoch["steps"]
        self._sums = torch.tensor(epoch["sums"], dtype=self._sum_dtype, device=self.device)
        self._seconds_train, self._seconds_data = epoch["seconds"]

    def _data_facts(self) -> list[Any]:
        """What tells other data from those that a run began with; of image folders, the means tell pixels."""
        data = self.data
        n = [len(data.train_labels), len(data.test_labels)]
        return [*n, list(map(str, data.classes)), list(map(float, data.mean)), list(map(float, data.std))]
