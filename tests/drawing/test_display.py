"""Windows: on a virtual display if one is installed, and the one-line error without a display."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.paths import REPOSITORY

PROGRAM = """
import numpy as np
from matplotlib.backend_bases import KeyEvent
from detection import display

pages = [np.full((40, 60, 3), 80 * number, np.uint8) for number in range(3)]
keys, shown = {keys}, []

class Typed(display.Window):
    def show(self, image, title=""):
        shown.append(image[0, 0, 0] // 80)
        return super().show(image, title)

    def wait(self):
        canvas = self._figure.canvas
        key = keys.pop(0)
        if key == "close":
            canvas.get_tk_widget().after(50, self.close)
        else:
            canvas.get_tk_widget().after(50, lambda: KeyEvent("key_press_event", canvas, key)._process())
        return super().wait()

display.Window = Typed
display.browse("pages", 3, pages.__getitem__)
print(*shown, len(keys))
"""


@pytest.fixture(scope="module")
def screen() -> Iterator[str]:
    pytest.importorskip("tkinter")
    if shutil.which("Xvfb") is None:
        pytest.skip("no virtual screen: Debian's package xvfb is not installed")
    read, write = os.pipe()
    with open(read, encoding="utf-8") as chosen:
        process = subprocess.Popen(
            ["Xvfb", "-displayfd", str(write), "-screen", "0", "640x480x24"],
            pass_fds=[write],
            stderr=subprocess.DEVNULL,
        )
        os.close(write)
        try:
            yield f":{chosen.readline().strip()}"
        finally:
            process.terminate()
            process.wait(10)


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=without | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (["right", "right", "right", "left", "q"], "0 1 2 0 2 0"),  # on, around the end, and back
        (["close", "unused"], "0 1"),
    ],
)
def test_pages_are_turned_until_the_window_is_left(screen: str, keys: list[str], shown: str) -> None:
    result = run(PROGRAM.replace("{keys}", repr(keys)), DISPLAY=screen)
    assert result.stdout.strip() == shown, result


def test_no_screen_is_one_line() -> None:
    started = time.monotonic()
    result = run(
        "from detection import errors\nfrom detection.drawing import window\n"
        "errors.exit_with_message(lambda: window.Window('x'))"
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no display" in result.stderr, result
    assert time.monotonic() - started < 60
