"""Environment of Habana's software. Imports no torch.

`import torch` loads Habana's plugin if it is installed, and the plugin reads its mode from the environment, so scripts
call `prepare_habana` before they import torch.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.config.command_line import DEFAULTS
from detection.config.loading import leaf_items
from detection.config.setting_names import FLAT_NAMES
from detection.config.yaml_files import read_settings_file, read_yaml
from detection.errors import SettingsError

LAZY_MODE = "PT_HPU_LAZY_MODE"  # 1 lazy, 0 eager; which one is the default depends on Habana's version


def prepare_habana(arguments: Sequence[str]) -> None:
    """Set the lazy or eager mode that the command line selects, unless the environment has set one.

    Does nothing without Habana's software. `check_lazy` reports a conflict later; the script's parser reports invalid
    arguments.
    """
    if importlib.util.find_spec("habana_frameworks") is not None:
        os.environ.setdefault(LAZY_MODE, "1" if wants_lazy(arguments) else "0")


def wants_lazy(arguments: Sequence[str]) -> bool:
    """Return the value that `run.lazy` will have, from args.yaml, a resumed run, overlays, words or --lazy."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[], type=Path)
    parser.add_argument("--lazy", action="store_true")
    parser.add_argument("--resume", nargs="?", const="")
    parser.add_argument("--replay", type=Path)
    try:
        known, _ = parser.parse_known_args(list(arguments))
        words: dict[str, Any] = {}
        for word in arguments:
            key, separator, text = word.partition("=")
            if separator and key in ("run", "run.lazy", "run.logs_path", "logs_path"):
                words.update(leaf_items({FLAT_NAMES.get(key, key): read_yaml(text, word)}))
        values = dict(leaf_items(read_settings_file(DEFAULTS)))
        if known.resume is not None:
            logs = Path(words.get("run.logs_path", values["run.logs_path"]))
            newest = max(logs.glob("*/last.pt"), key=lambda path: path.stat().st_mtime, default=logs / "none").parent
            named = known.resume and "=" not in known.resume  # `--resume train.steps=9` names no directory
            values.update(leaf_items(read_settings_file((Path(known.resume) if named else newest) / "args.yaml")))
        if known.replay is not None:
            values.update(
                leaf_items(json.loads((known.replay / "report.json").read_text(encoding="utf-8"))["settings"])
            )
        for file in known.config:
            values.update(leaf_items(read_settings_file(file)))
    except (SettingsError, argparse.ArgumentError, OSError, ValueError, KeyError):
        return False
    return known.lazy or {**values, **words}["run.lazy"] is True
