"""Figures of dataset statistics: boxes per class, and sizes, shapes and positions of boxes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detection.drawing.figures import new_figure, save_figure
from detection.drawing.fonts import figure_names
from detection.visualization.dataset_statistics import SIZE_LIMITS, SIZE_NAMES, DatasetStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

BAR_COLOR = "#3572b0"
DENSITY_COLORS = "viridis"
MAX_NAMES = 150  # classes; the names of more would overlap
LONGEST_NAME = 24  # characters


def draw_class_distribution(path: Path, statistics: DatasetStatistics) -> None:
    """Plot the number of boxes of each class, in descending order on a logarithmic axis.

    Raises:
        OSError: the file cannot be written.
    """
    order = np.argsort(-statistics.boxes_per_class, kind="stable")
    counts = statistics.boxes_per_class[order]
    width = min(max(7.0, 2 + 0.18 * len(counts)), 20.0)
    names = figure_names(statistics.class_names)
    figure, (axes,) = new_figure((width, 5.5))
    bars = axes.bar(np.arange(len(counts)), counts, color=BAR_COLOR)
    if counts.any():
        axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(0.5, max(int(counts.max()), 1) * 3)
    axes.set_xlim(-0.7, len(counts) - 0.3)
    axes.set_ylabel("boxes (logarithmic)")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.35)
    images = len(statistics.boxes_per_image)
    axes.set_title(f"{counts.sum():,} boxes of {len(counts)} classes on {images:,} images")
    if len(counts) <= MAX_NAMES:
        _name_bars(axes, [names[label] for label in order], counts)
        axes.bar_label(bars, fontsize=8 if len(counts) <= 100 else 6, padding=3, rotation=90 if len(counts) > 15 else 0)
    else:
        axes.set_xlabel("rank of the class; the names are in statistics.json")
    save_figure(path, figure)


def _name_bars(axes: "Axes", names: Sequence[str], counts: np.ndarray) -> None:
    short = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
    upright = len(names) > 10 or sum(map(len, short)) > 80
    size = 9 if len(names) <= 100 else 6
    labels = axes.set_xticks(np.arange(len(names)), short, rotation=90 if upright else 0, fontsize=size)
    for tick, count in zip(labels, counts.tolist(), strict=True):
        tick.label1.set_color("black" if count else "red")


def draw_box_statistics(path: Path, statistics: DatasetStatistics) -> None:
    """Plot six panels: width and height, COCO sizes, aspect ratio, relative area, boxes per image, centres.

    Raises:
        OSError: the file cannot be written.
    """
    figure, axes = new_figure((16, 9), rows=2, columns=3)
    panels = (_draw_sizes, _draw_size_shares, _draw_aspects, _draw_relative_areas, _draw_boxes_per_image, _draw_centres)
    for panel, draw in zip(axes, panels, strict=True):
        draw(panel, statistics)
    save_figure(path, figure)


def _logarithmic_bins(values: np.ndarray, count: int) -> np.ndarray:
    """Return bin edges around all values, equidistant on a logarithmic axis, (count + 1,)."""
    smallest, largest = float(values.min()), float(values.max())
    if largest < smallest * 1.1:
        smallest, largest = smallest / 1.5, largest * 1.5
    return np.geomspace(smallest, largest * 1.0001, count + 1)


def _pixel_bins(lengths: np.ndarray) -> np.ndarray:
    """Return edges as `_logarithmic_bins`, but on whole pixels: bins between whole pixels would often be empty."""
    edges = _logarithmic_bins(lengths, 40)
    edges = np.unique(np.where(edges < 1, edges, np.floor(edges)))  # 0 has no place on a logarithmic axis
    last = np.floor(lengths.max()) + 1
    return np.append(edges[edges < last], last)


def _plain_logarithmic(axis: "Axis") -> None:
    """Label ticks at 1, 2, 5, 10, ... with plain numbers: matplotlib's 3 x 10^1 would overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_tick_params(labelsize=9)


def _empty(axes: "Axes", title: str, text: str = "no boxes") -> None:
    axes.set_title(title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="grey")


def _histogram(axes: "Axes", values: np.ndarray, title: str, x_label: str, unit: str = "") -> None:
    """Plot a histogram of positive values on a logarithmic axis, with the median."""
    median = float(np.median(values))
    bins = _logarithmic_bins(values, 50)
    axes.hist(values, bins=bins.tolist(), color=BAR_COLOR)
    axes.set_xscale("log")
    axes.set_xlim(bins[0], bins[-1])
    if bins[-1] < bins[0] * 1e4:  # over more decades the labels would overlap
        _plain_logarithmic(axes.xaxis)
    axes.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median {median:.3g}{unit}")
    axes.set(title=title, xlabel=x_label, ylabel="boxes")
    axes.legend()


def _draw_sizes(axes: "Axes", statistics: DatasetStatistics) -> None:
    from matplotlib.colors import LogNorm

    title = "width and height of the boxes"
    if not len(statistics.sizes):
        return _empty(axes, title)
    widths, heights = statistics.sizes.T
    bins = [_pixel_bins(values) for values in (widths, heights)]
    *_, image = axes.hist2d(widths, heights, bins=bins, norm=LogNorm(), cmap=DENSITY_COLORS)
    axes.figure.colorbar(image, ax=axes, label="boxes")
    limits = axes.get_xlim(), axes.get_ylim()
    x = np.geomspace(*limits[0], 50)
    for area, name in zip(SIZE_LIMITS, ("32² px", "96² px"), strict=True):
        axes.plot(x, area / x, color="red", linewidth=1, linestyle="--" if area == SIZE_LIMITS[0] else "-", label=name)
    axes.set(xscale="log", yscale="log", xlim=limits[0], ylim=limits[1], title=title)
    axes.set(xlabel="width, px of the image", ylabel="height, px of the image")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_logarithmic(axis)
    axes.legend(title="area", loc="lower right")


def _draw_size_shares(axes: "Axes", statistics: DatasetStatistics) -> None:
    counts = statistics.size_counts
    share = counts / max(int(counts.sum()), 1)
    names = [f"{name}\n{limit}" for name, limit in zip(SIZE_NAMES, ("< 32²", "32² to 96²", "≥ 96²"), strict=True)]
    bars = axes.bar(names, share * 100, color=BAR_COLOR)
    labels = [f"{count:,} ({part:.1%})" for count, part in zip(counts.tolist(), share.tolist(), strict=True)]
    axes.bar_label(bars, labels, padding=2)
    axes.set(title="COCO's sizes (area of the annotation, px)", ylabel="% of the boxes")
    axes.margins(y=0.12)


def _draw_aspects(axes: "Axes", statistics: DatasetStatistics) -> None:
    title = "aspect of the boxes"
    if not len(statistics.sizes):
        return _empty(axes, title)
    _histogram(axes, statistics.sizes[:, 0] / statistics.sizes[:, 1], title, "width / height")


def _draw_relative_areas(axes: "Axes", statistics: DatasetStatistics) -> None:
    title = "area of the boxes in their image"
    if not len(statistics.relative_areas):
        return _empty(axes, title, "the file states no image sizes" if len(statistics.sizes) else "no boxes")
    _histogram(axes, statistics.relative_areas * 100, title, "% of the image", " %")


def _draw_boxes_per_image(axes: "Axes", statistics: DatasetStatistics) -> None:
    values = statistics.boxes_per_image
    largest, mean, median = int(values.max()), float(values.mean()), float(np.median(values))
    step = math.ceil((largest + 1) / 50)  # at most 50 bins
    axes.hist(values, bins=(np.arange(0, largest + step + 1, step) - 0.5).tolist(), color=BAR_COLOR, edgecolor="white")
    axes.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median {median:g}, mean {mean:.1f}")
    axes.set(title=f"boxes per image ({(values == 0).sum():,} images with none)", xlabel="boxes", ylabel="images")
    axes.legend()


def _draw_centres(axes: "Axes", statistics: DatasetStatistics) -> None:
    title = "centres of the boxes"
    if not len(statistics.centres):
        return _empty(axes, title, "the file states no image sizes" if len(statistics.sizes) else "no boxes")
    x, y = statistics.centres.T
    counts, _, _ = np.histogram2d(y, x, bins=32, range=[[0, 1], [0, 1]])
    image = axes.imshow(counts, extent=(0, 1, 1, 0), cmap=DENSITY_COLORS, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="boxes")
    axes.set(title=title, xlabel="x, share of the image's width", ylabel="y, share of its height")
