"""What a table's driver shows while its runs go on: a bar on a terminal, elsewhere a line a run."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm

from rst.experiments.sweeps import Cell

POLL = 1.0  # seconds between two looks at the run folders


class RunProgress:
    """A with-block that reports each run when it ends, with the number of runs done and the time left.

    The runs are in other processes, or on other machines, so a thread looks for their results. The time left
    is that of the work left at the speed so far; it is unknown until the first run ends.

    Args:
        cells: the runs to be done.
        work: what each run id costs, in any unit.
        total: the number of runs, the complete ones included.
    """

    def __init__(self, cells: Sequence[Cell], work: Mapping[str, float], total: int) -> None:
        self.running, self.work = list(cells), work
        self.ended, self.failed, self.total = total - len(cells), 0, total
        self.began, self.work_done = time.monotonic(), 0.0
        self.end: float | None = None  # when all runs should have ended
        self.last = ""
        shape = "{n_fmt}/{total_fmt} |{bar:20}| {elapsed}{desc}"
        self.bar = tqdm(total=total, initial=self.ended, bar_format=shape, disable=not sys.stderr.isatty())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.look()
        self.bar.close()

    def tell(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stderr)

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            self.look()

    def look(self) -> None:
        """Report the runs that have ended since the last look."""
        for cell in list(self.running):
            run = cell.run
            if (result := run.result(warn=False)) is not None:
                self.work_done += self.work[run.id]
                self._report(cell, f"{run.split} accuracy {100 * result['test_accuracy']:.2f} %", shown=False)
            elif (failure := run.failure()) is not None:
                self.failed += 1
                self._report(cell, f"FAILED: {failure}", shown=True)
        if not self.bar.disable:
            self.bar.n = self.ended
            self.bar.set_description_str("".join(f", {text}" for text in (self._left(), self.last) if text))

    def _report(self, cell: Cell, end: str, shown: bool) -> None:
        """`shown`: on a terminal, too."""
        self.running.remove(cell)
        self.ended += 1
        if self.work_done:
            speed = self.work_done / (time.monotonic() - self.began)
            self.end = time.monotonic() + sum(self.work[other.run.id] for other in self.running) / speed
        self.last = f"{cell.title}: {end}"
        if self.bar.disable or shown:
            count = ", ".join(filter(None, [f"{self.ended}/{self.total}", self._left()]))
            self.tell(f"[{count}] {self.last}")

    def _left(self) -> str:
        parts = []
        if self.end is not None and self.running:
            parts.append(f"{in_words(max(0.0, self.end - time.monotonic()))} left")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)


def in_words(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
