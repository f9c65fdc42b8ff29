"""From files of weights to a detector in use: `open_weights`, and validation.py as its user sees it.

The network of these tests is made by hand: whatever the image, its one cell says "class 1, a box of 16 x 16 pixels in
the middle of the 32 x 32 input", so every number of an evaluation is known.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import validation
from detection.checkpoints import save_checkpoint
from detection.config.loading import load_settings
from detection.errors import CheckpointError, SettingsError
from detection.inference.weights import open_weights, read_names
from detection.models import build_detector
from detection.models.backbones.darknet import DarknetBatchNorm2d
from detection.models.darknet.weights import Header, write_darknet_weights
from tests.support.darknet_files import CFG, NAMES, SEEN, Files, Run, known_weights
from tests.support.paths import ARGS, REPOSITORY

PROTOCOL = REPOSITORY / "recipes" / "darknet_protocol.yaml"
# sigmoid(5) * sigmoid(6)
SCORE = 1 / (1 + np.exp(-5)) / (1 + np.exp(-6))


def open_here(
    files: Files, weights: str = "net.weights", cfg: str | None = "net.cfg", names: str | None = None, *words: str
) -> Any:
    return open_weights(
        files.root / weights,
        None if cfg is None else files.root / cfg,
        None if names is None else files.root / names,
        ARGS,
        words=words,
    )


def named(weights: str = "net.weights", cfg: str = "net.cfg", names: str = "net.names") -> list[str]:
    return ["--weights", weights, "--cfg", cfg, "--names", names]


def with_classes(count: int) -> str:
    return CFG.replace("filters=8", f"filters={5 + count}").replace("classes=3", f"classes={count}")


# open_weights


def test_open_darknet(files: Files) -> None:
    opened = open_here(files, "net.weights", "net.cfg", "net.names")
    assert opened.names == opened.class_names() == ("aeroplane", "motorbike", "sofa")
    assert (opened.num_classes, opened.step, opened.seen) == (3, 0, SEEN)
    assert (opened.settings.model.backbone, opened.settings.model.cfg) == ("darknet_cfg", CFG.rstrip() + "\n")
    assert opened.settings.evaluation.image_size == 32
    assert not any(module.training for module in opened.detector.model.modules())
    assert opened.lines == [
        "cfg         not used, the settings decide: [yolo] ignore_thresh",
        "cfg         unknown keys, ignored: [convolutional] jitter",
        "net.weights: Darknet weights of the whole network, version 0.2.5, 64,000 images seen",
        "loaded all 2 convolutions",
    ]
    with torch.no_grad():
        (found,) = opened.detector.postprocess(opened.detector.model(torch.rand(1, 3, 32, 32)))
    assert found["labels"].tolist() == [1]
    assert found["scores"].item() == pytest.approx(SCORE, abs=1e-6)
    assert found["boxes"][0].tolist() == pytest.approx([8, 8, 24, 24], abs=1e-4)


def test_names_may_be_missing(files: Files) -> None:
    opened = open_here(files)
    assert opened.names is None
    assert opened.class_names() == ("class_0", "class_1", "class_2")


def test_settings_of_the_command_line_win(files: Files) -> None:
    words = ("evaluation.image_size=96", "model.batch_norm=darknet", "evaluation.confidence_threshold=0.9")
    opened = open_here(files, "net.weights", "net.cfg", None, *words)
    assert opened.settings.evaluation.image_size == 96
    assert opened.detector.postprocess.confidence_threshold == 0.9
    assert isinstance(opened.detector.model.backbone[0][1], DarknetBatchNorm2d)


def test_input_of_a_rectangular_description(files: Files) -> None:
    files("wide.cfg", CFG.replace("height=32", "height=96"))
    assert open_here(files, "net.weights", "wide.cfg").settings.evaluation.image_size == 96


def test_without_a_description_the_file_tells_the_number_of_classes(files: Files) -> None:
    """Network of the settings with 3 anchors per level: 3 * 3 more filters than for 2 classes at both outputs."""
    anchors = "yolo.anchors=[[[10,14],[23,27],[37,58]],[[81,82],[135,169],[344,319]]]"
    words = ("model.backbone=darknet_tiny", "yolo.neck_channels=[16, 8]", anchors)
    settings, _ = load_settings(ARGS, words=words)
    torch.manual_seed(0)
    model = build_detector(settings, 5).model
    write_darknet_weights(model, files.root / "tiny.weights", Header(seen=7))
    opened = open_here(files, "tiny.weights", None, None, *words)
    assert (opened.num_classes, opened.names, opened.seen) == (5, None, 7)
    for name, value in opened.detector.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert open_here(files, "tiny.weights", None, files("5.names", "a\nb\nc\nd\ne").name, *words).num_classes == 5
    with pytest.raises(CheckpointError, match=r"tiny\.weights has 5 classes, the network 3"):
        open_here(files, "tiny.weights", None, "net.names", *words)


@pytest.mark.parametrize(
    ("kind", "content", "word"),
    [
        *(("names", "\n".join("abcd"[:count]), f"has {count} names, the network 3 classes") for count in (1, 2, 4)),
        *(("names", content, "one class name per line") for content in ("", "\n\n", "a\n\nb\n")),
        ("names", "a\nb\na\n", "'a' occurs twice"),
        *(("names", content, "cannot be read") for content in (b"\xff\xfea\x00", None)),
        ("cfg", CFG.replace("[convolutional]", "[local]"), "layer [local] is not supported"),
        ("cfg", CFG.replace("filters=8", "filters=9"), "filters = 1 * (5 + 3) = 8"),
        ("cfg", "", "[net]"),
        *(("cfg", content, "is this a .cfg file?") for content in ("just text", b"\xff\xfe\x00\x01")),
        ("cfg", b"[net]\nwidth=\xe9", "width = \u00e9 must be a finite number"),
        ("cfg", None, "cannot be read"),
        ("weights", known_weights()[: 20 + 4 * 62], "backbone weights only (1 convolutions)"),
        ("weights", known_weights()[:-1], "has 363 bytes, this network needs 364 (-1)"),  # 20 + 4 * (62 + 8 + 16)
        ("weights", None, "No such file"),
    ],
)
def test_files_that_do_not_fit(files: Files, kind: str, content: str | bytes | None, word: str) -> None:
    (files.root / f"net.{kind}").unlink()
    if content is not None:
        files(f"net.{kind}", content)
    with pytest.raises(CheckpointError if kind == "weights" else SettingsError) as caught:
        open_here(files, names="net.names")
    message = str(caught.value)
    assert f"net.{kind}" in message and word in message and "\n" not in message


def test_image_size_must_fit(files: Files) -> None:
    with pytest.raises(SettingsError, match=r"evaluation.image_size = 48: must be a multiple of 32"):
        open_here(files, "net.weights", "net.cfg", None, "evaluation.image_size=48")


@pytest.mark.parametrize("content", ["a\nb", "a\nb\n", "a\r\nb\r\n\r\n", " a \n\tb\n\n\n", "\ufeffa\nb\n"])
def test_names_of_many_editors(files: Files, content: str) -> None:
    assert read_names(files("some.names", content)) == ("a", "b")


def test_names_keep_spaces_and_any_script(files: Files) -> None:
    assert read_names(files("some.names", "traffic light\nчайка\n鷗\n")) == ("traffic light", "чайка", "鷗")


# Our own checkpoints


def checkpoint(files: Files, average: bool, **changes: Any) -> Path:
    """Checkpoint of the hand-made network after 5 steps of 4 x 2 images; EMA and model predict different classes."""
    words = ["model.backbone=darknet_cfg", f"model.cfg={files.root / 'net.cfg'}", "evaluation.image_size=32"]
    words += ["train.batch_size=4", "train.subdivisions=2"]
    words += ["run.device=hpu", "run.lazy=true", "run.deterministic=true", "run.precision=off"]  # of another machine
    settings, _ = load_settings(ARGS, words=words)
    states = []
    for label in (0, 1):
        model = build_detector(settings, 3).model
        (last,) = model.output_convolutions()
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0, 0, 0, 0, 5, *[6.0 if number == label else -9 for number in range(3)]]))
        states.append(model.state_dict())
    stored = settings.model_dump(mode="json")
    stored["yolo"]["num_classes"] = stored["model"].pop("num_classes")  # its earlier name
    content: dict[str, Any] = {
        "step": 5,
        "settings": stored,
        "categories": {"names": ["airplane", "motorcycle", "couch"], "ids": [5, 4, 63]},
        "model": states[0],
        "average": states[1] if average else None,
    }
    path = files.root / "best.pt"
    save_checkpoint(path, {**content, **changes})
    return path


@pytest.mark.parametrize("average", [True, False])
def test_open_checkpoint(files: Files, average: bool) -> None:
    """The EMA is used if there is one; settings, cfg and names come from the file."""
    opened = open_here(files, checkpoint(files, average).name, None)
    assert opened.names == ("airplane", "motorcycle", "couch")
    assert (opened.num_classes, opened.step, opened.seen) == (3, 5, 5 * 8)
    assert opened.category_ids == (5, 4, 63)
    assert opened.settings.evaluation.image_size == 32
    run = opened.settings.run
    assert (run.device, run.lazy, run.deterministic, run.precision) == ("auto", False, False, "off")
    kind = "EMA" if average else "weights"
    assert opened.lines[-1].endswith(f"best.pt: {kind} after 5 steps, darknet_cfg, 3 classes")
    assert opened.lines[:-1] == ["stored settings: yolo.num_classes is now model.num_classes"]
    with torch.no_grad():
        (found,) = opened.detector.postprocess(opened.detector.model(torch.rand(1, 3, 32, 32)))
    assert found["labels"].tolist() == [1 if average else 0]


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "word"),
    [
        ({}, ["net.cfg"], SettingsError, "--cfg belongs to Darknet weights"),
        ({}, [None, "net.names"], SettingsError, "--names belongs to Darknet weights"),
        *(
            (changes, [None], CheckpointError, "best.pt")
            for changes in ({"model": {}}, {"categories": {"names": ["a"]}}, {"categories": None}, {"settings": None})
        ),
    ],
)
def test_checkpoints_that_do_not_fit_themselves(
    files: Files, changes: Any, arguments: list[Any], error: Any, word: str
) -> None:
    with pytest.raises(error) as caught:
        open_here(files, checkpoint(files, False, **changes).name, *arguments)
    assert word in str(caught.value) and "\n" not in str(caught.value)


# validation.py


def results_of(files: Files) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read metrics.json and detections.json of the only run directory."""
    (directory,) = (files.root / "logs").iterdir()
    assert re.fullmatch(r"\d{6}-\d{6}_validation_\w+", directory.name)
    assert (directory / "validation.png").is_file()
    return json.loads((directory / "metrics.json").read_text()), json.loads((directory / "detections.json").read_text())


def assert_everything_found(files: Files) -> None:
    """Both motorcycles match exactly, and the false one of equal score is on a later image: AP 1."""
    metrics, detections = results_of(files)
    found = {row["image_id"]: row for row in detections}
    assert len(detections) == 3 and set(found) == {1, 2, 3}
    assert all(row["category_id"] == 4 for row in detections)
    assert found[1]["bbox"] == pytest.approx([8, 8, 16, 16], abs=1e-3)
    assert found[2]["bbox"] == pytest.approx([16, 16, 32, 32], abs=1e-3)
    assert all(row["score"] == pytest.approx(SCORE, abs=1e-5) for row in detections)
    assert metrics["AP"] == pytest.approx(1) and metrics["AR1"] == pytest.approx(1)
    assert metrics["boxes"] == 3 and metrics["dropped_non_finite"] == 0 and metrics["backend"] == "arrays"
    assert metrics["settings"]["image_size"] == 32


@pytest.mark.slow
def test_validation_as_a_user_starts_it(files: Files) -> None:
    """Run in a separate process from another directory, with Darknet's file names."""
    elsewhere = files.root / "elsewhere"
    elsewhere.mkdir()
    arguments = [argument if argument.startswith("--") else files.root / argument for argument in named()]
    result = subprocess.run(
        [sys.executable, REPOSITORY / "validation.py", *arguments, *files.arguments],
        cwd=elsewhere,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=240,
        check=False,
    )
    out = result.stdout.decode()
    assert (result.returncode, result.stderr.decode()) == (0, ""), result
    assert_everything_found(files)
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000" in out
    assert re.search(r"^ motorcycle +1\.000 +1\.000 +2$", out, re.MULTILINE)
    assert re.search(r"^ airplane +not defined +not defined +0$", out, re.MULTILINE)
    for line in ("loaded all 2 convolutions", "[yolo] ignore_thresh", "32 px letterbox", "3 boxes on 3 images"):
        assert line in out
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ({"coco.names": "airplane\nmotorcycle\ncouch\n"}, named(names="coco.names")),
        # no criterion, so no losses; sigmoid(0) = 1/2: centre in the middle, 4 * 1/4 times the anchor, as before
        ({"new.cfg": CFG.replace("=linear", "=logistic") + "new_coords=1\n"}, named(cfg="new.cfg")),
        # a COCO detector on a file that lists only some of its categories
        (
            {"four.cfg": with_classes(4), "four.weights": known_weights(4), "four.names": NAMES + "giraffe\n"},
            named("four.weights", "four.cfg", "four.names"),
        ),
    ],
    ids=["spelling of COCO", "new_coords", "more classes than the data"],
)
def test_validation_finds_everything(files: Files, run: Run, written: dict[str, Any], arguments: list[str]) -> None:
    for name, content in written.items():
        files(name, content)
    code, _, err = run(*arguments)
    assert (code, err) == (0, "")
    assert_everything_found(files)
    assert (results_of(files)[0]["losses"] == {}) == ("new.cfg" in written)


def test_validation_of_a_checkpoint(files: Files, run: Run) -> None:
    code, out, err = run("--weights", checkpoint(files, average=True))
    assert (code, err) == (0, "") and "EMA after 5 steps" in out
    assert_everything_found(files)
    assert results_of(files)[0]["step"] == 5


def test_validation_by_the_darknet_protocol(files: Files, run: Run) -> None:
    """The recipe does not override the image size of the cfg."""
    code, out, err = run("--config", PROTOCOL, *named())
    assert (code, err) == (0, "") and "32 px letterbox (darknet)" in out and "objectness above 0.005 only" in out
    assert_everything_found(files)


def test_validation_without_names_takes_ascending_ids(files: Files, run: Run) -> None:
    """Label 1 is then the airplane, which the data does not have."""
    code, _, err = run("--weights", "net.weights", "--cfg", "net.cfg")
    assert (code, err) == (0, "")
    metrics, detections = results_of(files)
    assert {row["category_id"] for row in detections} == {5}
    assert metrics["AP"] == pytest.approx(0)


def test_validation_without_detections(files: Files, run: Run) -> None:
    code, out, err = run(*named(), "evaluation.confidence_threshold=0.999")
    assert (code, err) == (0, "") and "0 boxes on 3 images" in out
    metrics, detections = results_of(files)
    assert detections == [] and metrics["AP"] == pytest.approx(0)


def test_validation_of_fewer_classes_than_the_data(files: Files, run: Run) -> None:
    files("two.cfg", with_classes(2))
    files("two.weights", known_weights(2))
    code, _, err = run("--weights", "two.weights", "--cfg", "two.cfg")
    assert code == 2 and err.count("\n") == 1
    assert "the network has 2 classes, the data 3" in err and "--names" in err
    files("two.names", "airplane\nmotorcycle\n")
    two = named("two.weights", "two.cfg", "two.names")
    code, _, err = run(*two)
    assert code == 2 and err.count("\n") == 1 and "couch" in err
    code, _, err = run(*two, "data.class_names=[airplane, motorcycle]")
    assert (code, err) == (0, "")
    assert_everything_found(files)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--weights", "gone.weights", "--cfg", "net.cfg"], 7, "gone.weights cannot be read: No such file"),
        (["--weights", "yolov3.weights", "--cfg", "net.cfg"], 7, "download_weights.sh yolov3.weights"),
        (["--weights", "gone.pt"], 7, "gone.pt does not exist"),
        (["--weights", "net.weights", "--cfg", "gone.cfg"], 2, "gone.cfg"),
        (["--weights", "net.weights", "--cfg", "net.weights"], 2, "net.weights"),
        (["--weights", "net.cfg", "--cfg", "net.cfg"], 7, "net.cfg is a text file (it begins with [net] width=32"),
        (["--weights", "net.weights", "--cfg", "net.cfg", "--names", "gone.names"], 2, "gone.names"),
        (["--weights", "val", "--cfg", "net.cfg"], 7, "val is a directory without best.pt"),
        (["--cfg", "net.cfg"], 2, "--weights"),
    ],
)
def test_validation_refuses_in_one_line(files: Files, run: Run, arguments: list[str], code: int, word: str) -> None:
    found, _, err = run(*arguments)
    assert found == code and err.count("\n") == 1 and word in err, err
    assert not (files.root / "logs").exists()


def test_validation_on_a_full_disk(files: Files, run: Run, full_disk) -> None:
    with full_disk(4000):  # the output is shorter, which pytest captures in a file; the picture is longer
        code, _, err = run(*named())
    assert code == 6 and err.count("\n") == 1 and "cannot be written" in err


# Darknet's own numbers


@pytest.mark.parametrize(
    ("name", "ap50"),
    [
        ("yolo-fastest-1.1", 0.315),
        pytest.param("yolo-fastest-1.1-xl", 0.401, marks=pytest.mark.slow),
        pytest.param("MobileNetV2-YOLOv3-Nano-coco", 0.378, marks=pytest.mark.slow),
    ],
)
def test_ap50_is_that_of_the_darknet_program(
    name: str, ap50: float, shared_weights, shared_data, tmp_path: Path, monkeypatch
) -> None:
    """What pjreddie's program gives on the 79 validation images of coco_mini, measured by others; 0.01 is allowed."""
    arguments = [
        "validation.py", "--config", PROTOCOL, "--weights", shared_weights(f"{name}.weights"),
        "--cfg", shared_weights(f"{name}.cfg"), "--names", shared_weights("coco.names"), "--output", tmp_path / "out",
        f"data.root={shared_data('coco_mini')}", "data.num_workers=0", "evaluation.batch_size=8", "run.device=cpu",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    validation.main()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["AP50"] == pytest.approx(ap50, abs=0.01)
