"""Pure functions on tensors: boxes, non-maximum suppression, the letterbox."""
