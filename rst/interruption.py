"""Stopping a run between two steps when the process is told to end."""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

# TERM from schedulers and `kill`, INT from Ctrl-C, USR1 and USR2 from Slurm before a job's time is up.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interruption:
    """A with-block in which the first of `SIGNALS` is only noted, for the run to end in order; any further
    one ends the process at once, as it does outside of the block.

    In a thread other than the main one, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in SIGNALS:  # the system's own action, which needs no Python code to run first
            signal.signal(each, signal.SIG_DFL)

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def end(self) -> None:
        """End the process with 128 + the signal's number, SIGTERM's where it was another rank that got one;
        call it when all is saved.

        Where somebody else had a handler for the signal, it gets it now: submitit's puts a Slurm job back
        into the queue. If that returns, so does this, and the run goes on.
        """
        number = self.signal or signal.SIGTERM
        handler: Callable[[int, None], object] | int | None = self._former.get(signal.Signals(number))
        if not callable(handler) or handler is signal.default_int_handler:
            sys.exit(128 + number)
        handler(number, None)
        self.signal = None
        for each in self._former:
            signal.signal(each, self._note)
