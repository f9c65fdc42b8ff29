"""Printing of lines beside a progress bar."""

import sys

from tqdm import tqdm

from detection.errors import escape


def show_line(text: str) -> None:
    """Print a line above the progress bar, if there is one; escapes characters that the terminal cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    printable = escape(text).encode(encoding, "backslashreplace").decode(encoding)  # class names may have any character
    with tqdm.external_write_mode():  # hides the bars, as `tqdm.write` does
        print(printable, flush=True)
