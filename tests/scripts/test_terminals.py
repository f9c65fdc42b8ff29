"""Names that the terminal's encoding lacks, or that a terminal obeys: every script ends well and escapes them."""

import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

import anchor_creator
import batch_overfit
import check_dataset
import convert_dataset
import detect
import export
import lr_scheduler_creator
import pack
import validation
import visualization
import visualize_batch
from detection.errors import UNPRINTABLE, exit_with_message, name_list
from tests.support.darknet_files import CATEGORIES, Files

NAMES = {"airplane": "avión", "motorcycle": "オートバイ", "couch": "кресло, 沙发"}  # none of cp1252 but the first
WEIGHTS = ["--weights", "net.weights", "--cfg", "net.cfg", "--names", "net.names"]
SCRIPTS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "validation": (validation.main, WEIGHTS),
    "detect": (detect.main, [*WEIGHTS, "val", "--class", "オートバイ"]),
    "detect of an unknown class": (detect.main, [*WEIGHTS, "val", "--class", "猫"]),
    "check_dataset": (check_dataset.main, []),
    "visualization": (visualization.main, ["--split", "val", *WEIGHTS]),
    "pack": (pack.main, []),
    "convert_dataset": (convert_dataset.main, ["yolo", "--names", "net.names"]),
}


@pytest.fixture
def foreign(files: Files) -> Files:
    """The known network and data with class names of three scripts."""
    path = files.root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": number, "name": NAMES[name]} for number, name in CATEGORIES]
    path.write_text(json.dumps(content))
    (files.root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    (files.root / "train").symlink_to("val")
    files("net.names", "avión\nオートバイ\nкресло, 沙发\n")
    (files.root / "yolo").symlink_to("val")
    for number in (1, 2, 3):
        files(f"val/{number}.txt", "1 0.5 0.5 0.5 0.5\n")
    return files


def run_on_terminal(
    main: Callable[[], None], arguments: list[Any], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run a script whose stdout and stderr have an encoding and refuse what it lacks, as Python opens stdout."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors="strict", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        exit_with_message(main)
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    return int(left.value.code or 0), out, err


@pytest.mark.parametrize(
    ("name", "encoding"), [("validation", "ascii"), ("detect", "ascii"), *((name, "cp1252") for name in SCRIPTS)]
)
def test_names_that_the_terminal_lacks(
    name: str, encoding: str, foreign: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, arguments = SCRIPTS[name]
    monkeypatch.chdir(foreign.root)
    output = foreign.root.with_name(f"{foreign.root.name}_out")
    words = [] if main is convert_dataset.main else foreign.arguments
    code, out, err = run_on_terminal(main, [*arguments, *words, "--output", output], encoding, monkeypatch)
    refused = name == "detect of an unknown class"
    assert (code, "Traceback" in err) == (2 if refused else 0, False), out + err
    if name not in ("detect", "pack"):  # which print no names
        assert ascii("沙发")[1:-1] in (err if refused else out)
    assert refused or any(output.iterdir())


def test_results_are_written_before_they_are_printed(foreign: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that fails at the first table, whatever the reason, costs no result."""
    monkeypatch.chdir(foreign.root)
    monkeypatch.setattr(sys, "argv", ["validation.py", *WEIGHTS, *foreign.arguments, "--output", "out"])

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            if "Average Precision" in text:
                raise BrokenPipeError
            return len(text)

        def fileno(self) -> int:
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(SystemExit):
        exit_with_message(validation.main)
    written = {path.name for path in (foreign.root / "out").iterdir()}
    assert {"metrics.json", "detections.json", "classes.csv", "confusion_matrix.png"} <= written


def test_a_name_with_a_comma_is_one_name() -> None:
    assert name_list(["cat", "dog, small", " bird"]) == "cat, 'dog, small', ' bird'"
    assert name_list([]) == ""


FORGED = "a\n2026-01-01 INFO forged\x1b[31m"
SMALL = [
    "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[32, 32, 32]", "train.batch_size=2",
    "train.image_size=96", "evaluation.image_size=96",
]  # fmt: skip
HOSTILE: dict[str, tuple[Callable[[], None], list[str]]] = {
    **{name: SCRIPTS[name] for name in ("detect", "check_dataset", "pack", "convert_dataset")},
    "validation of an unknown class": SCRIPTS["validation"],
    "visualization": (visualization.main, ["--split", "val"]),
    "detect of an unknown class": (detect.main, [*WEIGHTS, "val", "--class", FORGED]),
    "anchor_creator of unknown shapes": (anchor_creator.main, SMALL),
    "batch_overfit": (batch_overfit.main, ["--steps", "1", "--images", "2", *SMALL]),
    "export": (export.main, [*WEIGHTS, "--format", "darknet"]),
    "lr_scheduler_creator": (lr_scheduler_creator.main, ["--images", "9", *SMALL]),
    "visualize_batch": (visualize_batch.main, SMALL),
    "an unknown option": (detect.main, [*WEIGHTS, "val", "--" + FORGED.replace(" ", "")]),
    "an unknown setting": (visualize_batch.main, [f"train.{FORGED}=1"]),
}


@pytest.fixture
def hostile(foreign: Files) -> Files:
    """The same data; the names of its folder, of a class and of a damaged image would forge a line of a log."""
    for split in ("val", "train"):
        path = foreign.root / "annotations" / f"instances_{split}.json"
        path.write_text(path.read_text().replace(json.dumps(NAMES["motorcycle"]), json.dumps(FORGED)))
    foreign(f"val/9{FORGED}.png", b"damaged")
    foreign(f"val/9{FORGED}.txt", "1 0.5 0.5 0.5 0.5\n")
    return Files(foreign.root.rename(foreign.root.with_name(foreign.root.name + FORGED)))


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_reaches_the_terminal_raw(name: str, hostile: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    main, arguments = HOSTILE[name]
    monkeypatch.chdir(hostile.root)
    monkeypatch.setattr(validation, "draw_evaluation", lambda *_: {})
    output = hostile.root.with_name(f"{hostile.root.name}_out")
    words = [f"data.root={json.dumps(str(hostile.root))}", "run.logs_path=logs", *hostile.arguments[1:4]]
    words = [] if main is convert_dataset.main else words
    code, out, err = run_on_terminal(main, [*arguments, *words, "--output", output], "utf-8", monkeypatch)
    assert "Traceback" not in err and (code == 2) == ("unknown" in name), out + err
    assert "forged\\x1b[31m" in out + err
    lines = (out + err).splitlines()
    assert not [line for line in lines if UNPRINTABLE.search(line) or line.startswith("2026")]
