"""Self-contained HTML report of text, tables and images in one file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np

from detection.drawing.files import replace_file

STYLE = (
    "body{font-family:sans-serif;max-width:1640px;margin:1.5em auto;padding:0 1em;color:#222}"
    "img{max-width:100%;height:auto}figure{margin:1em 0}figcaption{color:#555}"
    "table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}"
)
JPEG_QUALITY = 85  # a tenth of the size of PNG for photographs


class HtmlReport:
    """Builder of an HTML page. All text is escaped, because names come from untrusted files."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def heading(self, text: str) -> None:
        """Add a heading."""
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def lines(self, texts: Iterable[str]) -> None:
        """Add a paragraph with a line break between the texts."""
        self.parts.append(f"<p>{'<br>'.join(escape(text) for text in texts)}</p>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table; cells are shown as `str` gives them."""

        def row(cells: Sequence[object], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

        body = "\n".join(row(cells, "td") for cells in rows)
        self.parts.append(f"<table>\n{row(header, 'th')}\n{body}\n</table>")

    def png(self, content: bytes, caption: str) -> None:
        """Add the content of a PNG file with a caption below."""
        self._picture(content, "png", caption)

    def photograph(self, image: np.ndarray, caption: str) -> None:
        """Add an RGB uint8 image (H, W, 3) as JPEG."""
        encoded, content = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        assert encoded, "OpenCV encodes every RGB image as JPEG"
        self._picture(content.tobytes(), "jpeg", caption)

    def _picture(self, content: bytes, kind: str, caption: str) -> None:
        text = escape(caption, quote=True)
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        self.parts.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')

    def write(self, path: Path) -> None:
        """Write the page atomically.

        Raises:
            OSError: the file cannot be written.
        """
        title = escape(self.title)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        body = "\n".join(self.parts)
        page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n'
        replace_file(path, page.encode("utf-8", "backslashreplace"))
