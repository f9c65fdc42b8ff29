"""Windows that show images, for `--show` of the scripts."""

from collections.abc import Callable
from typing import Any

import numpy as np

from detection.errors import SettingsError


class Window:
    """Window that shows one RGB uint8 image (H, W, 3) at a time.

    Raises:
        SettingsError: there is no display, or Python has no GUI toolkit.
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
        """Whether the user has not closed the window."""
        return bool(self._plot.fignum_exists(self._figure.number))

    def show(self, image: np.ndarray, title: str = "") -> str:
        """Show an image without waiting; returns the key pressed since the last call, or ""."""
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
        """Wait for a key or for the window to close; returns the key, or "" if the window was closed."""
        while self.open:
            if self._plot.waitforbuttonpress(0.5) and self._key:
                break
        key, self._key = self._key, ""
        return key

    def close(self) -> None:
        self._plot.close(self._figure)


def browse(title: str, count: int, page: Callable[[int], np.ndarray], first: int = 0) -> None:
    """Browse pages until the user closes the window or presses q; left and up go back, other keys forward.

    Args:
        count: number of pages.
        page: renders a page as RGB uint8 (H, W, 3); called when the page is shown.
        first: page to start with.
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
    raise SettingsError("--show: there is no display, or Python has no GUI toolkit; the files are written")
