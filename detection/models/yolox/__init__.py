"""Anchor-free detectors: a decoupled head with one prediction per cell, and assignments that see the predictions."""
