"""Stopping a run whose numbers are no longer finite, without making a GPU wait for the host."""

import math

import torch
from torch import Tensor

MAX_OVERFLOWS = 20  # steps skipped one after the other; the loss scale has then been halved as often
ADVICE = "the last checkpoint is kept: try a smaller optimizer.lr or method.rho"


class Guard:
    """Reads each step's figures: loss, right answers, gradient norm, norm of the weights, request to stop.

    Args:
        device: where the figures are. On a GPU, whose queue a read would drain, a step's are read during the
            next step, elsewhere at once.
        scaled: whether the loss is scaled (fp16), so that an infinite gradient is an overflow: its step is
            skipped and counted, and only `MAX_OVERFLOWS` of them in a row stop the run.

    Attributes:
        stopping: whether the figures read last asked to stop.
        skipped, skipped_in_a_row: steps.
    """

    def __init__(self, device: torch.device, scaled: bool, steps_per_epoch: int) -> None:
        self.device, self.scaled, self.steps_per_epoch = device, scaled, steps_per_epoch
        self.stopping = False
        self.skipped = self.skipped_in_a_row = 0
        self._unread: tuple[Tensor, torch.cuda.Event, int] | None = None

    def look_at(self, figures: Tensor, step: int) -> None:
        """Raises FloatingPointError naming the step where one that has been read is not finite."""
        if self.device.type != "cuda":
            self._read(figures.tolist(), step)
            return
        self.settle()
        host = torch.empty(len(figures), dtype=figures.dtype, pin_memory=True)
        host.copy_(figures, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._unread = host, event, step

    def settle(self) -> None:
        """Wait for the device, and read what is unread. Raises as `look_at`."""
        if self._unread is not None:
            host, event, step = self._unread
            self._unread = None
            event.synchronize()
            self._read(host.tolist(), step)

    def _read(self, figures: list[float], step: int) -> None:
        loss, _, gradient_norm, weight_norm, stop = figures
        self.stopping = stop > 0
        checked = {"loss": loss, "gradient norm": gradient_norm, "norm of the weights": weight_norm}
        if self.scaled:
            del checked["gradient norm"]
        for name, value in checked.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value} at {self._at(step)}; {ADVICE}")

    def count(self, skipped: bool, step: int) -> None:
        """Raises FloatingPointError after too many skipped steps in a row."""
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= MAX_OVERFLOWS:
            raise FloatingPointError(
                f"{MAX_OVERFLOWS} steps up to {self._at(step)} overflowed under fp16 and were skipped: use "
                "precision=bf16, or a smaller optimizer.lr or method.rho"
            )

    def _at(self, step: int) -> str:
        epoch, batch = divmod(step, self.steps_per_epoch)
        return f"step {step} (epoch {epoch + 1}, batch {batch})"
