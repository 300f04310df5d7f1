"""Stops a run whose numbers are no longer finite, without making a GPU wait for the host."""

import math

import torch
from torch import Tensor

MAX_OVERFLOWS = 20  # skipped steps in a row, each of which halves the loss scale
ADVICE = "the last checkpoint is kept: try a smaller optimizer.lr or method.rho"


class Guard:
    """Reads five numbers of each step: loss, correct answers, gradient norm, weight norm, request to stop.

    Args:
        device: where the numbers are. On a GPU, whose queue a read would drain, they are read during the next
            step; elsewhere at once.
        scaled: the loss is scaled (fp16), so an infinite gradient is an overflow: its step is skipped and
            counted, and only `MAX_OVERFLOWS` of them in a row stop the run.

    Attributes:
        stopping: whether the numbers read last asked to stop.
        skipped, skipped_in_a_row: numbers of steps.
    """

    def __init__(self, device: torch.device, scaled: bool, steps_per_epoch: int) -> None:
        self.device, self.scaled, self.steps_per_epoch = device, scaled, steps_per_epoch
        self.stopping = False
        self.skipped = self.skipped_in_a_row = 0
        self._unread: tuple[Tensor, torch.cuda.Event, int] | None = None

    def check(self, numbers: Tensor, step: int) -> None:
        """Raises FloatingPointError, naming the step, when a number that has been read is not finite."""
        if self.device.type != "cuda":
            self._read(numbers.tolist(), step)
            return
        self.settle()
        host = torch.empty(len(numbers), dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._unread = host, event, step

    def settle(self) -> None:
        """Wait for the device, and read what is unread. Raises like `check`."""
        if self._unread is not None:
            host, event, step = self._unread
            self._unread = None
            event.synchronize()
            self._read(host.tolist(), step)

    def _read(self, numbers: list[float], step: int) -> None:
        loss, _, gradient_norm, weight_norm, stop = numbers
        self.stopping = stop > 0
        checked = {"loss": loss, "gradient norm": gradient_norm, "norm of the weights": weight_norm}
        if self.scaled:
            del checked["gradient norm"]
        for name, value in checked.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value} at {self._at(step)}; {ADVICE}")

    def count(self, skipped: bool, step: int) -> None:
        """Count a step. Raises FloatingPointError after too many skipped ones in a row."""
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
