"""Shared by benchmarks: synthetic data, traces of operations, timers."""
