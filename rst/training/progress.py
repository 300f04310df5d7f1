"""What a run shows while it trains: a bar on a terminal, a line per epoch elsewhere."""

import logging
import sys
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from rst.training.loop import Training

log = logging.getLogger("train")


class Progress:
    """Used as a with-block. Without `shown` it shows nothing. `split`: what the error is measured on."""

    def __init__(self, training: Training, split: str, shown: bool) -> None:
        self.training, self.split, self.shown = training, split, shown
        steps, total = training.optimizer.steps, training.optimizer.total_steps
        self.bar = tqdm(total=total, initial=steps, unit="step", disable=not (shown and sys.stderr.isatty()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.shown and kind is SystemExit:
            steps = self.training.optimizer.steps
            log.info("interrupted after step %d: repeat the command to resume", steps)

    def update(self, metrics: dict[str, Any] | None) -> None:
        """Call it after each step, and with the metrics after each epoch."""
        self.bar.update(self.training.optimizer.steps - self.bar.n)
        if metrics is None:
            return
        is_evaluated = "test_accuracy" in metrics
        if is_evaluated:
            self.bar.set_postfix_str(f"epoch {metrics['epoch']}, {self.split} {metrics['test_accuracy']:.2%}")
        if self.shown and self.bar.disable:
            test = "{split} loss {test_loss:.4f}, {split} accuracy {test_accuracy:.4f}, " * is_evaluated
            line = "epoch {epoch}: train loss {train_loss:.4f}, " + test + "propagations {propagations:.10g}"
            log.info(line.format(split=self.split, **metrics))
