"""Stopping a run between two steps when the process is told to end."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

# TERM from schedulers and `kill`, INT from Ctrl-C, USR1 and USR2 from Slurm before a job's time is up.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interruption:
    """A with-block in which the first of `SIGNALS` is only noted, so that the run ends in order. After it,
    Ctrl-C ends the process at once, and the others do nothing: Slurm and torchrun may send one twice.

    Signals that the process was started to ignore, by nohup say, stay ignored. Outside the main thread, where
    Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._former = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if signal.SIGINT in self._former:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would wait for PyTorch

    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def end(self) -> None:
        """End the process with code 128 + the signal's number, SIGTERM's if another rank got the signal.
        Call it when everything is saved.

        A handler that was there before is called instead: submitit's puts a Slurm job back into the queue. If
        it returns, so does this, and the run goes on.
        """
        number = self.signal or signal.SIGTERM
        handler = self._former.get(number)
        if not callable(handler) or handler is signal.default_int_handler:
            sys.exit(128 + number)
        self.signal = None
        if signal.SIGINT in self._former:
            signal.signal(signal.SIGINT, self._note)
        handler(number, None)
