"""From an annotation file and its images to batches."""
