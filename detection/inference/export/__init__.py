"""From a trained detector to ONNX and Darknet files, compared with PyTorch before they get their names."""
