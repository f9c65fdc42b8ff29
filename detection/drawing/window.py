"""Pictures on a screen, where there is one: `--show` of the scripts. Files are written whether or not."""

from collections.abc import Callable
from typing import Any

import numpy as np

from detection.errors import SettingsError


class Window:
    """One window that shows RGB uint8 images (H, W, 3), one after the other.

    Raises:
        SettingsError: this machine has no display, or Python no toolkit for windows.
    """

    def __init__(self, title: str) -> None:
        self._plot = _interactive_pyplot()
        self._figure = self._plot.figure(title, layout="constrained")
        self._axes = self._figure.add_subplot()
        self._axes.set_axis_off()
        self._picture: Any = None
        self._key = ""
        self._figure.canvas.mpl_connect("key_press_event", lambda event: setattr(self, "_key", event.key or ""))

    @property
    def open(self) -> bool:
        """Whether the user has not closed it."""
        return bool(self._plot.fignum_exists(self._figure.number))

    def show(self, image: np.ndarray, title: str = "") -> str:
        """Show an image without waiting; the key pressed since the last call, or ""."""
        if self._picture is None or self._picture.get_array().shape != image.shape:
            self._axes.clear()
            self._axes.set_axis_off()
            self._picture = self._axes.imshow(image)
        else:
            self._picture.set_data(image)
        self._axes.set_title(title)
        self._figure.canvas.draw_idle()
        self._plot.pause(0.001)
        key, self._key = self._key, ""
        return key

    def wait(self) -> str:
        """Wait for a key or for the user to close the window; the key, or "" when it was closed."""
        while self.open:
            if self._plot.waitforbuttonpress(0.5) and self._key:
                break
        key, self._key = self._key, ""
        return key

    def close(self) -> None:
        self._plot.close(self._figure)


def browse(title: str, count: int, page: Callable[[int], np.ndarray], first: int = 0) -> None:
    """Show pages until the user closes the window or presses q; any other key goes on, left and up go back.

    Args:
        count: number of pages.
        page: makes the image of a page, RGB uint8 (H, W, 3); called when the page is wanted.
        first: page to begin with.
    """
    window, number = Window(title), first
    while window.open:
        window.show(page(number), f"{number + 1} of {count}" if count > 1 else "")
        key = window.wait()
        if key in ("", "q", "escape"):
            break
        number = (number + (-1 if key in ("left", "up", "pageup", "backspace") else 1)) % count
    window.close()


def _interactive_pyplot() -> Any:
    import matplotlib
    from matplotlib import pyplot

    for backend in ("qtagg", "tkagg", "gtk4agg", "macosx"):
        try:
            pyplot.switch_backend(backend)
            return pyplot
        except (ImportError, RuntimeError):  # toolkit missing, or no display
            continue
    matplotlib.use("agg")
    raise SettingsError("--show: there is no display here, or Python has no toolkit for windows; the files are written")
