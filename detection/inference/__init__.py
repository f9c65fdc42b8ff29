"""A trained detector in use: from a file of weights, over images and videos, to results."""
