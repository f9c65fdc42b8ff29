"""Pre-training of a backbone as a classifier: a set of images with one class each, the parts of a run from below."""
