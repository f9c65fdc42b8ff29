"""One-stage detectors with anchors, focal loss and class and box networks shared by all levels: EfficientDet, RetinaNet."""
