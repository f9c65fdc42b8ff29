"""Paths of the repository."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ARGS = REPOSITORY / "yolo-v3" / "args.yaml"
MAIN = REPOSITORY / "yolo-v3" / "main.py"
