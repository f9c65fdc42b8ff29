"""Backbones: images to one feature map per stride. Each declares channels, strides and pixel scaling."""
