"""Export of trained detectors to ONNX, and comparison of the result with PyTorch."""
