"""Matplotlib figures without a window, written atomically."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detection.drawing.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(
    size_inches: tuple[float, float] = (8, 5), rows: int = 1, columns: int = 1
) -> "tuple[Figure, list[Axes]]":
    """Create an empty figure of 120 dots per inch and its axes, row by row."""
    # Not with pyplot, which chooses a backend for the whole process and keeps every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a figure atomically; the suffix selects the format (.png, .svg, .pdf).

    Raises:
        OSError: the file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:] or "png")
    replace_file(path, content.getvalue())


def figure_pixels(figure: "Figure") -> np.ndarray:
    """Render a figure as RGB uint8, (H, W, 3)."""
    figure.canvas.draw()
    return np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])  # type: ignore[attr-defined]


def add_second_x(axes: "Axes", factor: float, label: str) -> None:
    """Add a second x axis at the top, with values x * factor."""

    def there(x: np.ndarray) -> np.ndarray:
        return x * factor

    def back(x: np.ndarray) -> np.ndarray:
        return x / factor

    axes.secondary_xaxis("top", functions=(there, back)).set_xlabel(label)  # type: ignore[arg-type]


def draw_curves(
    axes: "Axes", curves: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str
) -> None:
    """Draw named curves, a grid and a legend on axes.

    Args:
        curves: (x, y) points of each name; a NaN leaves a gap.
        x_label, y_label: with their units.
    """
    for index, (name, points) in enumerate(curves.items()):
        x, y = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
        line_style = ("-", "--", ":", "-.")[index // 10 % 4]  # matplotlib has ten colours
        # A line through one point is invisible, and a few points are easier to read as such.
        axes.plot(x, y, line_style, label=name, marker="o" if len(points) < 20 else "", markersize=4, linewidth=1.5)
    axes.set_title(title, wrap=True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
