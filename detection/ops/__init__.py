"""Boxes, NMS, letterbox and pixel normalisation."""
