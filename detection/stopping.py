"""Stopping a run from outside without losing work."""

import signal
import sys
from typing import Any

from detection.errors import StoppedBySignal


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop honours between two steps; a second ends at once.

    A signal that is ignored when the run starts stays ignored: a shell's `&` and `nohup` rely on it.
    """

    def __init__(self, unit: str = "step") -> None:
        """Args:
        unit: what the loop finishes first, for the message.
        """
        self.unit = unit
        self.signal_number: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: Any) -> None:
        self.signal_number = number
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        print(
            f"{name} received: finishing the {self.unit} and saving; once more ends at once",
            file=sys.stderr,
            flush=True,
        )

    def check(self) -> None:
        """Raises:
        StoppedBySignal: a signal has come.
        """
        if self.signal_number is not None:
            raise StoppedBySignal(f"stopped by {signal.Signals(self.signal_number).name}", self.signal_number)
