"""Lines on the terminal."""

import sys

from tqdm import tqdm


def show_line(text: str) -> None:
    """Print a line above the progress bar, if there is one; what the terminal cannot show is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    printable = text.encode(encoding, "backslashreplace").decode(encoding)  # a class name must not stop a run
    with tqdm.external_write_mode():  # takes the bars away while we print, as `tqdm.write` does
        print(printable, flush=True)
