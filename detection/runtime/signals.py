"""Graceful shutdown on signals."""

import os
import signal
import sys
import time
from typing import Any

from detection.errors import StoppedBySignal

ECHO_SECONDS = 1.0  # a repeated signal within this time is the same request
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Turns the first stop signal into a request that a loop checks between two steps; a second one kills the process.

    Handles Ctrl-C, SIGTERM, SIGHUP (terminal closed) and SIGUSR1 (Slurm's warning before the time limit), from the call
    of `install` on.

    Args:
        unit: what the loop finishes first, for the message.

    Attributes:
        signal_number: the first signal received; None: none yet.
    """

    def __init__(self, unit: str = "step") -> None:
        self.unit = unit
        self.signal_number: int | None = None
        self._received = 0.0

    def install(self) -> None:
        """Install the signal handlers; call it from the main thread of a script.

        A signal that is ignored when the script starts stays ignored: a shell's `&` and `nohup` rely on it.
        """
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._received = number, now
            name = signal.Signals(number).name
            text = f"{name} received: finishing the {self.unit} and saving; once more ends at once"
            print(text, file=sys.stderr, flush=True)
        elif now - self._received > ECHO_SECONDS:  # both the terminal and torchrun forward the same Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def check(self) -> None:
        """Raise if a signal was received.

        Raises:
            StoppedBySignal: a signal was received.
        """
        if self.signal_number is not None:
            raise stopped_by(self.signal_number)


def stopped_by(number: int) -> StoppedBySignal:
    """Return the error of a run stopped by a signal; SIGUSR1 exits like SIGTERM, with 143."""
    code = signal.SIGTERM if number == signal.SIGUSR1 else number
    return StoppedBySignal(f"stopped by {signal.Signals(number).name}", code)
