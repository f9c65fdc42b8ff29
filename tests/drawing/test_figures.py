"""Figures, checked by their pixels."""

import sys
from pathlib import Path

import numpy as np
import pytest

from detection.drawing.figures import draw_curves, figure_pixels, new_figure, save_figure


def has_color(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Return the mask (H, W) of exactly this colour."""
    return (image == color).all(axis=2)


# Curves. Colours from matplotlib's documentation: C0 is #1f77b4, C1 is #ff7f0e.


def curve_pixels(curves: dict[str, list[tuple[float, float]]]) -> np.ndarray:
    figure, (axes,) = new_figure()
    draw_curves(axes, curves, "title", "step", "loss")
    return figure_pixels(figure)


def test_each_curve_has_its_color() -> None:
    picture = curve_pixels({"falling": [(0.0, 1.0), (1.0, 0.1)], "rising": [(0.0, 0.1), (1.0, 1.0)]})
    assert has_color(picture, (0x1F, 0x77, 0xB4)).sum() > 100 and has_color(picture, (0xFF, 0x7F, 0x0E)).sum() > 100
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_single_point_shows_and_gaps_are_allowed() -> None:
    curves = {"one": [(5.0, 1.0)], "gap": [(0.0, 1.0), (1.0, float("nan")), (2.0, 2.0)], "none": []}
    # More than the legend's own line and marker, about 30 x 2 + 25 pixels.
    assert has_color(curve_pixels(curves), (0x1F, 0x77, 0xB4)).sum() > 90


def test_figures_are_written_in_the_format_of_the_suffix(tmp_path: Path) -> None:
    figure, (axes,) = new_figure()
    draw_curves(axes, {}, "title", "step", "loss")
    save_figure(tmp_path / "empty.svg", figure)
    assert b"<svg" in (tmp_path / "empty.svg").read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        save_figure(tmp_path / "file" / "curves.png", figure)


def test_figure_as_pixels() -> None:
    figure, axes = new_figure((4, 3), rows=1, columns=2)
    assert len(axes) == 2
    axes[0].bar([0], [1], color="#ff0000")
    pixels = figure_pixels(figure)
    assert pixels.shape == (360, 480, 3) and pixels.dtype == np.uint8  # 4 x 3 inches of 120 dots
    assert has_color(pixels, (255, 0, 0)).sum() > 1000
