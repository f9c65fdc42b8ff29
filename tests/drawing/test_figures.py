"""Figures, looked at through their pixels."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from detection.drawing.figures import figure_pixels, new_figure, plot_curves


def read_rgb(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def has_color(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Where an image has exactly this colour, (H, W)."""
    return (image == color).all(axis=2)


# Curves. Colours from matplotlib's documentation: C0 is #1f77b4, C1 is #ff7f0e.


def test_each_curve_has_its_color(tmp_path: Path) -> None:
    curves = {"falling": [(0.0, 1.0), (1.0, 0.1)], "rising": [(0.0, 0.1), (1.0, 1.0)]}
    plot_curves(tmp_path / "curves.png", curves, "title", "step", "loss")
    picture = read_rgb(tmp_path / "curves.png")
    assert has_color(picture, (0x1F, 0x77, 0xB4)).sum() > 100 and has_color(picture, (0xFF, 0x7F, 0x0E)).sum() > 100
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_single_point_shows_and_gaps_are_allowed(tmp_path: Path) -> None:
    curves = {"one": [(5.0, 1.0)], "gap": [(0.0, 1.0), (1.0, float("nan")), (2.0, 2.0)], "none": []}
    plot_curves(tmp_path / "curves.png", curves, "title", "step", "AP")
    # More than the legend's own line and marker, about 30 x 2 + 25 pixels.
    assert has_color(read_rgb(tmp_path / "curves.png"), (0x1F, 0x77, 0xB4)).sum() > 90


def test_logarithmic_axis_leaves_out_zero(tmp_path: Path) -> None:
    plot_curves(tmp_path / "rate.png", {"lr": [(0, 0.0), (1, 1e-3), (2, 1e-5)]}, "t", "step", "lr", logarithmic=True)
    assert has_color(read_rgb(tmp_path / "rate.png"), (0x1F, 0x77, 0xB4)).sum() > 100


def test_no_curves_and_other_formats(tmp_path: Path) -> None:
    plot_curves(tmp_path / "empty.svg", {}, "title", "step", "loss")
    assert b"<svg" in (tmp_path / "empty.svg").read_bytes()


def test_plot_into_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        plot_curves(tmp_path / "file" / "curves.png", {}, "title", "step", "loss")


def test_figure_as_pixels() -> None:
    figure, axes = new_figure((4, 3), rows=1, columns=2)
    assert len(axes) == 2
    axes[0].bar([0], [1], color="#ff0000")
    pixels = figure_pixels(figure)
    assert pixels.shape == (360, 480, 3) and pixels.dtype == np.uint8  # 4 x 3 inches of 120 dots
    assert has_color(pixels, (255, 0, 0)).sum() > 1000
