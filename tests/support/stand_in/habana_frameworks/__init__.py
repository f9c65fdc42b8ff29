"""Stands in for Habana's software in tests: device hpu computes on the CPU, and what is called is written down.

Importing `habana_frameworks.torch` brings `torch.hpu` into being, as the real package does. Every event is a line of
the file that the environment variable HPU_EVENTS names.
"""

import os


def record(event: str) -> None:
    with open(os.environ["HPU_EVENTS"], "a", encoding="utf-8") as file:
        file.write(f"{event}\n")
