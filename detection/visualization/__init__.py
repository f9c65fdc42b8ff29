"""Statistics and pictures of datasets, targets, anchors and augmentation."""
