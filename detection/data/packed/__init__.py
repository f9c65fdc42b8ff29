"""Datasets packed into tar shards: the index, reading, writing, and TFRecord files read for packing."""
