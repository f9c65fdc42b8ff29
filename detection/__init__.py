"""Object detection in plain PyTorch: imported by the scripts at the repository root, never run."""
