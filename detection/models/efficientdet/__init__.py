"""Detectors with anchors, focal loss and heads that all levels share: EfficientDet and RetinaNet."""
