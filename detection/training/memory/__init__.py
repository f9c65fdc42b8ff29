"""How much memory a training step needs, and the batch size that fits."""
