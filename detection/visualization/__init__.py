"""Pictures of datasets, targets, anchors and augmentation."""
