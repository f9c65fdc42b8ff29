"""Warnings about images that take too long to load and augment, even those that never finish."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from detection.errors import say


class SlowSamples:
    """Times the loading of images in each process and warns about slow ones.

    A thread reports an image while it is still loading. If other code holds the GIL, the image is reported when it is
    done. Each image is reported at most once per process. The overhead is two assignments per image.

    Args:
        seconds: time limit of one image; None: no limit.
        describe: maps an image index to its description.
    """

    def __init__(self, seconds: float | None, describe: Callable[[int], str]) -> None:
        self.seconds, self.describe = seconds, describe
        self.forget()

    def forget(self) -> None:
        """Reset what belongs to one process."""
        self.process = 0  # id of the process that the watching thread runs in
        self.running: tuple[int, float] | None = None  # image index, start time
        self.named: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "describe": self.describe}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def load_timed(self, load: Callable[[Any], Any], position: int | tuple[int, ...]) -> Any:
        """Return `load(position)` and warn if it takes too long."""
        if self.seconds is None:
            return load(position)
        if self.process != os.getpid():  # a forked worker inherits the object but not its thread
            self.forget()
            self.process = os.getpid()
            threading.Thread(target=self.watch, name="slow samples", daemon=True).start()
        index, started = position if isinstance(position, int) else position[0], time.monotonic()
        self.running = (index, started)
        try:
            return load(position)
        finally:
            self.running = None
            if time.monotonic() - started > self.seconds:
                self.warn(index, f"took {time.monotonic() - started:.1f} s")

    def watch(self) -> None:
        """Warn of an image that is still being loaded; runs in a thread."""
        assert self.seconds is not None
        while True:
            time.sleep(self.seconds / 4)
            running = self.running
            if running is not None and time.monotonic() - running[1] > self.seconds:
                self.warn(running[0], f"has been loading for {time.monotonic() - running[1]:.1f} s")

    def warn(self, index: int, what: str) -> None:
        """Name an image once."""
        if index not in self.named:
            self.named.add(index)
            line = f"warning: {self.describe(index)} {what} (data.slow_sample_seconds)"
            say(line, error=True)
