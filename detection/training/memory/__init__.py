"""Memory of a training step: estimate, and the largest batch size that fits."""
