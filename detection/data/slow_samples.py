"""Names the images that take too long to load and augment, also one that never ends."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


class SlowSamples:
    """A clock for each process that loads images; costs two assignments per image.

    A thread looks at the clock: it names an image while that still runs. Where the thread cannot run because other
    code holds Python's lock, the image is named when it is done. Each image at most once per process.

    Args:
        seconds: limit for one image; None: no limit.
        describe: image index -> how to name it.
    """

    def __init__(self, seconds: float | None, describe: Callable[[int], str]) -> None:
        self.seconds, self.describe = seconds, describe
        self.forget()

    def forget(self) -> None:
        self.process = 0  # whose thread looks at the clock
        self.running: tuple[int, float] | None = None  # image index, time of its start
        self.named: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "describe": self.describe}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def time(self, load: Callable[[Any], Any], position: int | tuple[int, int, int]) -> Any:
        """`load(position)`, on the clock."""
        if self.seconds is None:
            return load(position)
        if self.process != os.getpid():  # a forked worker has the object, but no thread
            self.forget()
            self.process = os.getpid()
            threading.Thread(target=self.look, name="slow samples", daemon=True).start()
        index, started = position if isinstance(position, int) else position[0], time.monotonic()
        self.running = (index, started)
        try:
            return load(position)
        finally:
            self.running = None
            if time.monotonic() - started > self.seconds:
                self.name(index, f"took {time.monotonic() - started:.1f} s")

    def look(self) -> None:
        assert self.seconds is not None
        while True:
            time.sleep(self.seconds / 4)
            running = self.running
            if running is not None and time.monotonic() - running[1] > self.seconds:
                self.name(running[0], f"has been loading for {time.monotonic() - running[1]:.1f} s")

    def name(self, index: int, what: str) -> None:
        if index not in self.named:
            self.named.add(index)
            line = f"warning: {self.describe(index)} {what} (data.slow_sample_seconds)"
            print(line, file=sys.stderr, flush=True)
