"""Figure of two sets of anchors and the boxes that they are for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from detection.contract import Anchors
from detection.drawing.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")  # of the levels
MARKERS = (("o", 9, 1.0), ("D", 7, 1.8))  # of the two sets: shape, size and edge in points


def draw_anchors(
    shapes: np.ndarray,
    sets: Sequence[tuple[str, str, Anchors]],
    strides: Sequence[int],
    size: int,
    title: str,
) -> "Figure":
    """Plot two sets of anchors over the density of box shapes, and each set as rectangles in the network input.

    Args:
        shapes: (width, height) of the boxes in pixels of the network input, (N, 2).
        sets: (legend name, title, anchors) of two sets; the markers of the first are filled.
        strides: pixels per cell of each level.
        size: side of the network input in pixels.
        title: title of the figure.
    """
    figure, (density, *frames) = new_figure((14, 5.4), columns=3)
    largest = max(max(anchor) for _, _, levels in sets for level in levels for anchor in level)
    draw_density(density, shapes, 1.1 * max(size, largest))
    for number, (name, frame_title, levels) in enumerate(sets):
        marker, marker_points, edge_points = MARKERS[number]
        for level, anchors in enumerate(levels):
            color = COLORS[level % len(COLORS)]
            face, edge = (color, "white") if number == 0 else ("white", color)
            density.plot(
                *np.array(anchors).T,
                marker,
                markersize=marker_points,
                markerfacecolor=face,
                markeredgecolor=edge,
                markeredgewidth=edge_points,
                zorder=4 - number,  # the first set above the second
                label=f"{name}, stride {strides[level]}",
            )
            for width, height in anchors:
                draw_centred(frames[number], size, width, height, color)
        frames[number].set(title=frame_title, xlim=(0, size), ylim=(size, 0), aspect="equal")
        frames[number].set_xlabel(f"pixels of the network input of {size} px")
    density.legend(fontsize=8, loc="upper left")
    figure.suptitle(title)
    return figure


def draw_density(axes: "Axes", shapes: np.ndarray, high: float) -> None:
    """Plot the density of (width, height), (N, 2), on logarithmic axes up to `high` pixels."""
    from matplotlib.ticker import NullFormatter

    low = shapes.min() * 0.9
    edges = np.geomspace(low, high, 70)
    counts, *_ = np.histogram2d(shapes[:, 0], shapes[:, 1], bins=(edges, edges))
    mesh = axes.pcolormesh(edges, edges, np.where(counts, counts, np.nan).T, cmap="Greys", norm="log")
    mesh.set_clim(0.7, max(counts.max(), 2) ** 1.6)  # only up to a middle grey, so that the anchors stand out
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if low <= tick <= high]
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_minor_formatter(NullFormatter())
    axes.set(title=f"shapes of {len(shapes):,} boxes (darker: more)", xlabel="width, px", ylabel="height, px")


def draw_centred(axes: "Axes", size: int, width: float, height: float, color: str) -> None:
    """Draw a rectangle in the middle of the network input."""
    left, top = (size - width) / 2, (size - height) / 2
    x, y = np.array([0, width, width, 0, 0]) + left, np.array([0, 0, height, height, 0]) + top
    axes.fill(x, y, facecolor=color, alpha=0.06)
    axes.plot(x, y, color=color, linewidth=2)
