"""Inference with trained weights: load a detector, read images and videos, write results."""
