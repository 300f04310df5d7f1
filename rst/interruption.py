"""Stopping a run between two steps when the process is told to end."""

import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

# TERM from schedulers and `kill`, INT from Ctrl-C, USR1 and USR2 from Slurm before a job's time is up.
# Windows has but the first two.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# Seconds in which a second signal, but for Ctrl-C, is taken for the first one's echo: Slurm tells every
# process, and torchrun, told too, tells its own again.
ECHO = 5.0


class Interruption:
    """A with-block in which the first of `SIGNALS` is only noted, for the run to end in order; a second one
    ends the process at once, with 128 + its number, unless it is an echo (see `ECHO`).

    Signals that the process was started to ignore, as by nohup, it ignores. In a thread other than the main
    one, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[int, Any] = {}
        self._noted_at = 0.0
        self._listener: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Python runs handlers in the main thread, which may be within one long backward pass, and two
            # signals by then are one to it. Through the pipe each is heard as it comes.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._former = {number: signal.signal(number, lambda *_: None) for number in heard}
            self._former_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listener is not None:
            signal.set_wakeup_fd(self._former_fd)
            for number, handler in self._former.items():
                signal.signal(number, handler)
            os.write(self._write, b"\0")  # no signal's number: its end
            self._listener.join()
            os.close(self._write)
            os.close(self._read)

    def _listen(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number not in SIGNALS:  # one that has a handler of its own
                continue
            if self.signal is None:
                self.signal, self._noted_at = number, time.monotonic()
            elif number == signal.SIGINT or time.monotonic() - self._noted_at > ECHO:
                os._exit(128 + number)

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
        handler = self._former.get(number)
        if not callable(handler) or handler is signal.default_int_handler:
            sys.exit(128 + number)
        handler(number, None)
        self.signal = None
