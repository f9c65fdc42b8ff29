"""Pure functions on tensors: boxes, NMS, the letterbox."""
