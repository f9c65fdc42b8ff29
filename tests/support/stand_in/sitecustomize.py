"""Python imports this at its start: writes down the environment that torch finds when it is imported."""

import os
import sys
from importlib.machinery import PathFinder
from typing import Any

from habana_frameworks import record


class Watch(PathFinder):
    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "torch":
            record(f"import torch, PT_HPU_LAZY_MODE={os.environ.get('PT_HPU_LAZY_MODE')}")
        return None


sys.meta_path.insert(0, Watch)
