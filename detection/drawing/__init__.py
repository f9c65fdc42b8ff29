"""Pixels, axes, windows and pages. Knows no dataset and no model."""
