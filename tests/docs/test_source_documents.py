"""docs/source_documents.md: no row is empty, and every file, flag and setting that it names exists."""

import functools
import re

import pytest
import yaml

from tests.support.paths import ARGS, REPOSITORY

PAGE = REPOSITORY / "docs" / "source_documents.md"
# Rows are about programs whose flags their own parsers know; these belong to torchrun, pip and tensorboard.
FOREIGN_FLAGS = {"--nproc_per_node", "--master_port", "--logdir"}
MMDETECTION = ("optimizer.", "lr_config.", "checkpoint_config.")  # keys of --cfg-options
FILE = re.compile(r"(?<![\w./-])[\w.-]*/?[\w./-]*(?:\.(?:py|sh|yaml|md|txt|png|pt)|/)(?![\w*])")
SETTING = re.compile(
    r"^(?:run|data|model|yolo|train|scheduler|evaluation)\.[\w.]+(?==|$)|(?<= )[a-z]+\.[\w.]+(?==)(?!=\d*ms)"
)
MADE_UP = {"logs/", "best.pt", "metrics.jsonl", "train.log", "recipes/NAME.yaml"}


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line[1:-1])] for line in lines]
    return [row for row in cells if row[0] != "there"]


@functools.cache
def known_flags() -> str:
    files = [
        *REPOSITORY.glob("*.py"),
        REPOSITORY / "benchmarks/small_sets.py",
        *(REPOSITORY / "detection").rglob("*.py"),
        REPOSITORY / "yolo-v3" / "main.py",
    ]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def test_no_row_is_empty() -> None:
    table = rows()
    assert len(table) > 130
    for row in table:
        assert len(row) == 4 and all(row), row


def test_every_flag_of_the_efficientdet_program_has_a_row() -> None:
    answered = re.findall(r"^\| `(--\w+)", (REPOSITORY / "docs/efficientdet_commands.md").read_text(), re.MULTILINE)
    assert len(answered) > 35
    page = PAGE.read_text(encoding="utf-8")
    assert [flag for flag in answered if f"`{flag}" not in page] == []


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_what_a_row_names_exists(row: list[str]) -> None:
    ours = [word for cell in row[1:3] for word in re.findall(r"`([^`]+)`", cell)]
    for name in [name for text in ours for name in FILE.findall(text)]:
        if name in MADE_UP or name.startswith("/") or name in ("args.yaml", "main.py"):
            continue
        assert (REPOSITORY / name).exists() or list(REPOSITORY.glob(f"*/{name}")), f"{row[0]}: {name}"
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", row[2])) - FOREIGN_FLAGS:
        found = f'"{flag}"' in known_flags() or f'"{flag[2:]}"' in known_flags()
        assert found, f"{row[0]}: {flag}"
    # Keys of settings: those with a value in either cell, and the plain names of sections in the second.
    for path in {word for text in ours for word in re.findall(SETTING, text)}:
        if path in ("yolo.encoder", "train.log") or path.startswith(MMDETECTION):
            continue
        place = yaml.safe_load(ARGS.read_text(encoding="utf-8"))
        for key in path.split("."):
            assert key in place, f"{row[0]}: {path}"
            place = place[key]
